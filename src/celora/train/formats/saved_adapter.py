"""A saved LoRA adapter as plain tensors, and what it makes of each tensor of its base model.

For a weight W: (out, in) under an adapter with A: (r, in), B: (out, r) and the scaling s:

    LoRA:       W + s B A
    DoRA:       m (W + s B A) / ||W + s B A||, row by row, with the magnitudes m: (out,)
    lora_bias:  bias + s b, with the bias b of B: (out,)
    embedding:  W + s (B A)^T, with A: (r, words), B: (hidden, r)

A tensor that was trained as a whole (`modules_to_save`, `bias`) takes the place of the base's. All of it is computed in
float32 and rounded once. PEFT's `merge_and_unload` is the twin that tests bind this to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from celora.errors import CELoraError
from celora.train.use.trained import WEIGHTS, adapter_config

PREFIX = "base_model.model."  # of names in the file
# Settings under which an adapter is more, or other, than these equations.
_OTHERS = ("use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config", "layer_replication",
           "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "fan_in_fan_out",
           "megatron_config", "ensure_weight_tying")  # fmt: skip
_CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that do
_IN_PYTHON = "in Python, PEFT's model.merge_and_unload() may take it"


@dataclass(frozen=True)
class LowRank:
    """The adapter of one layer."""

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    embedding: bool = False


class SavedAdapter:
    """The adapter in a folder.

    Attributes:
        config: PEFT's configuration.
        layers: the adapter of each layer, by the layer's name in the base model.
        whole: tensors that replace the base's, by name.

    Raises:
        CELoraError: it cannot be read, or it holds what these equations do not say.
    """

    def __init__(self, folder: Path) -> None:
        adapter_config(folder)
        try:
            self.config: Any = LoraConfig.from_pretrained(str(folder))
            tensors = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise CELoraError(f"cannot read the adapter in {str(folder)!r}: {error}") from error
        for name in _OTHERS:
            if getattr(self.config, name, None):
                raise CELoraError(f"{name} in {str(folder)!r} cannot be exported; {_IN_PYTHON}")
        if str(self.config.init_lora_weights).lower().startswith(_CHANGING_THE_BASE):
            raise CELoraError(
                f"init_lora_weights={self.config.init_lora_weights!r} has changed the base weights, which this export "
                f"would not; {_IN_PYTHON}"
            )
        self.layers: dict[str, LowRank] = {}
        self.whole: dict[str, Tensor] = {}
        self._sort({key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}, folder)

    def _sort(self, tensors: dict[str, Tensor], folder: Path) -> None:
        for key in [key for key in tensors if key.endswith((".lora_A.weight", ".lora_embedding_A"))]:
            layer, _, kind = key.removesuffix(".weight").rpartition(".")
            end = ".weight" if key.endswith(".weight") else ""
            A, B = tensors.pop(key), tensors.pop(f"{layer}.{kind[:-1]}B{end}", None)
            if kind.startswith("lora_embedding") and f"{layer}.lora_magnitude_vector" in tensors:
                raise CELoraError(f"DoRA on the embedding {layer!r} cannot be exported; {_IN_PYTHON}")
            if B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
                raise CELoraError(f"{layer!r} of the adapter in {str(folder)!r} is no pair of matrices; {_IN_PYTHON}")
            self.layers[layer] = LowRank(
                A.float(),
                B.float(),
                self._scaling(layer, len(A)),
                tensors.pop(f"{layer}.lora_magnitude_vector", None),
                tensors.pop(f"{layer}.lora_B.bias", None),
                kind.startswith("lora_embedding"),
            )
        for key, tensor in tensors.items():
            if ".lora_" in key:
                raise CELoraError(f"{key!r} of the adapter in {str(folder)!r} cannot be exported; {_IN_PYTHON}")
            self.whole[key.replace(".base_layer.", ".")] = tensor

    def _scaling(self, layer: str, rank: int) -> float:
        alphas = self.config.alpha_pattern or {}
        try:
            alpha = float(alphas.get(get_pattern_key(alphas.keys(), layer), self.config.lora_alpha))
        except (AttributeError, TypeError, ValueError) as error:
            raise CELoraError(f"lora_alpha or alpha_pattern in adapter_config.json is no number: {error}") from error
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    @cached_property
    def touched(self) -> set[str]:
        """The names of the base model's tensors that the adapter changes."""
        biases = {f"{layer}.bias" for layer, low_rank in self.layers.items() if low_rank.bias is not None}
        return {f"{layer}.weight" for layer in self.layers} | set(self.whole) | biases

    def homeless(self, name: str) -> str:
        """Why a bias cannot be merged into a model whose layer has none; empty if `name` is no such bias."""
        if not name.endswith(".bias") or name in self.whole:
            return ""
        return f"the adapter has {name!r} (lora_bias), and that layer of the base model has no bias to merge it with"

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """What becomes of the base's tensor of this name, in its dtype."""
        if name not in self.touched:
            return tensor
        base = self.whole.get(name, tensor)
        layer, _, kind = name.rpartition(".")
        if base.shape != tensor.shape or not tensor.is_floating_point():
            raise CELoraError(f"{name!r} is {_shape(tensor)} in the base model, {_shape(base)} in the adapter")
        low_rank = self.layers.get(layer)
        found = base.float()
        if low_rank is not None and kind == "bias" and low_rank.bias is not None:
            found = found + low_rank.scaling * low_rank.bias.float()
        elif low_rank is not None and kind == "weight":
            found = found + self.delta(layer, found)
            if low_rank.magnitude is not None:
                found = found * (low_rank.magnitude.float() / found.norm(dim=1))[:, None]
        return found.to(tensor.dtype)

    def delta(self, layer: str, weight: Tensor) -> Tensor:
        """`s B A` of a layer, in the shape of its weight."""
        low_rank = self.layers[layer]
        product = low_rank.B @ low_rank.A
        product = product.T if low_rank.embedding else product
        if product.shape != weight.shape:
            raise CELoraError(
                f"the adapter of {layer!r} is {_shape(product)} and the base model's weight {_shape(weight)}: this is "
                "another base model"
            )
        return low_rank.scaling * product

    def only_lora(self, file: str, instead: str, *, dora: bool = False) -> None:
        """Refuse what a file of LoRA pairs cannot hold.

        Args:
            file: what is to be written, for the error.
            instead: what would work, for the error.
            dora: whether the file holds DoRA's magnitudes.

        Raises:
            CELoraError: names what the file cannot hold, and where the adapter has it; or the adapter is empty.
        """
        copies = {f"{layer}.weight" for layer in self.layers}  # of the base's, which PEFT saves beside some adapters
        kinds = {
            "DoRA": [name for name, low_rank in self.layers.items() if low_rank.magnitude is not None and not dora],
            "a bias of lora_B (lora_bias)": [
                name for name, low_rank in self.layers.items() if low_rank.bias is not None
            ],
            "LoRA on an embedding": [name for name, low_rank in self.layers.items() if low_rank.embedding],
            "biases of the base (bias)": [name for name in self.whole if name.endswith(".bias")],
            "whole tensors (modules_to_save)": [
                name for name in self.whole if not name.endswith(".bias") and name not in copies
            ],
        }
        for kind, names in kinds.items():
            if names:
                raise CELoraError(f"{file} cannot hold {kind}, and the adapter has it in {names[0]!r}; {instead}")
        if not self.layers:
            raise CELoraError("the adapter holds no layer of LoRA; there is nothing to write")


def _shape(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape))} of {str(tensor.dtype).removeprefix('torch.')}"
