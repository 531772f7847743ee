"""Stores the frozen linear layers of a model in 8 bits: a quarter of float32's memory, half of bfloat16's.

The linear layers inside the decoder's blocks are replaced, one after the other. Embeddings, head, norms, biases and
everything that trains keep the model's own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from celora.errors import CELoraError
from celora.modeling.int8_linear import Int8Linear, prepared_for_lora_ga
from celora.modeling.language_model import check_module
from celora.weights.checkpoint import Origin
from celora.weights.read import is_trainable, plain_weight


@dataclass(frozen=True)
class Int8Base:
    """What `quantise_base` did.

    Attributes:
        layers: names of the layers whose weight is in 8 bits now.
        bytes_before, bytes_now: bytes of these weights, before and now.
    """

    layers: tuple[str, ...]
    bytes_before: int
    bytes_now: int

    def __str__(self) -> str:
        before, now = (size / 2**20 for size in (self.bytes_before, self.bytes_now))
        return f"{len(self.layers)} frozen linear layers in 8 bits: {now:,.1f} MiB, which were {before:,.1f} MiB."


def quantise_base(model: nn.Module) -> Int8Base:
    """Replace the weights of the frozen linear layers in `model`'s blocks by 8 bits: `W ~= diag(s) q`.

    `s_i = max_j |W_ij| / 127` is one float32 scale for each output channel; q is int8. Each weight is released before
    the next one is quantised. Call it before `celora.attach`, before or after `get_peft_model`. A second call changes
    nothing.

    Args:
        model: a model of Transformers, with or without PEFT's adapters, not merged. It is changed in place.

    Raises:
        CELoraError: there is no linear layer in a block, the adapters are merged, or a layer has hooks (attach celora
            after this call), is sharded, is offloaded or is not finite.

    The layers compute `x (diag(s) q)^T`, exactly for these weights. `celora.attach` with preset `fast` multiplies with
    the same bytes in both directions instead. Source: symmetric absmax quantisation as in LLM.int8 (arXiv 2208.07339).
    """
    check_module(model)
    prefix, causal = _language_model(model)
    already = list(held_in_8_bits(model))
    names = list(frozen_linears(model))
    if not names and not already:
        raise CELoraError(f"{type(model).__name__} has no frozen nn.Linear in numbered blocks to store in 8 bits.")
    for name in names:
        if reason := _cannot_replace(model.get_submodule(name)):
            raise CELoraError(f"{name!r} cannot be stored in 8 bits: {reason}.")
    before = now = 0
    for name in names:
        linear: Any = model.get_submodule(name)
        try:
            layer = Int8Linear.of(linear)
        except CELoraError as error:
            raise CELoraError(f"{name!r} cannot be stored in 8 bits: {error}.") from None
        before, now = before + linear.weight.nbytes, now + layer.W_q.nbytes + layer.scale.nbytes
        put(model, linear, layer)
    for name, layer in held_in_8_bits(model).items():
        if layer.origin is None:
            layer.origin = _origin(causal, name.removeprefix(prefix).replace(".base_layer", ""))
    return Int8Base((*already, *names), before, now)


def restore_base(model: nn.Module) -> None:
    """Undo `quantise_base`: read the original weights again, one by one, from the model's checkpoint.

    Raises:
        CELoraError: a weight cannot be read, or has changed. The layers before it are restored.
    """
    for name, layer in held_in_8_bits(model).items():
        try:
            layer.replace(layer.original())
        except CELoraError as error:
            raise CELoraError(f"{name!r} stays in 8 bits: {error}.") from None


@contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """For a while, compute with the original weights, read layer by layer in each forward.

    Raises:
        CELoraError: one of them cannot be read, or has changed.
    """
    layers = [layer for layer in held_in_8_bits(model).values() if layer.on_original is None]
    split = [isinstance(layer.W_q, DTensor) for layer in layers]  # whole in the layer's forward, which then compares
    for layer, compares in zip(layers, split, strict=True):
        layer.read_again() if compares else layer.original()
    try:
        for layer, compares in zip(layers, split, strict=True):
            layer.on_original = layer.original if compares else layer.read_again
        yield
    finally:
        for layer in layers:
            layer.on_original = None


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module by another one, everywhere in the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


def in_block(name: str) -> bool:
    """Whether a module of this name is inside one of a model's numbered blocks."""
    return any(part.isdigit() for part in name.split("."))


def held_in_8_bits(model: nn.Module) -> dict[str, Int8Linear]:
    """The layers whose weight is in 8 bits, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def frozen_linears(model: nn.Module) -> Iterator[str]:
    """The names of the linear layers in blocks that neither train nor belong to an adapter."""
    others: set[Any] = set()
    tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for tuner in tuners:
        if tuner.merged:
            raise CELoraError("the adapter is merged into its base; call model.unmerge_adapter() first.")
        others |= set(tuner.modules()) - set(tuner.get_base_layer().modules())
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            others |= set(module.modules())
        if isinstance(module, PreTrainedModel):
            others.add(module.get_output_embeddings())
    for name, module in model.named_modules():
        trained = bool(tuners) and is_trainable(module)  # without adapters, nothing is frozen yet
        linear = type(module) is nn.Linear and plain_weight(module) is not None
        if linear and in_block(name) and module not in others and not trained:
            yield name


def _cannot_replace(module: Any) -> str:
    """Why this linear layer cannot be replaced, or ''."""
    weight = module.weight
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return "it has hooks, as celora.attach, accelerate and FSDP2 put there; quantise first"
    if isinstance(weight, DTensor):
        return "it is sharded"
    if prepared_for_lora_ga(module):
        return "LoRA-GA is about to change its weight; call get_peft_model first"
    return "its weight is not in memory" if weight.is_meta or not weight.numel() else ""


def _language_model(model: nn.Module) -> tuple[str, PreTrainedModel | None]:
    """The prefix of the names of its modules, and Transformers' model in this one."""
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            return f"{name}." if name else "", module
    return "", None


def _origin(causal: PreTrainedModel | None, layer: str) -> Origin | None:
    """Where the weight of a layer came from, if that was a folder or the hub."""
    source = "" if causal is None else causal.config.name_or_path
    if causal is None or not source:
        return None
    return Origin(str(source), getattr(causal.config, "_commit_hash", None), f"{layer}.weight")
