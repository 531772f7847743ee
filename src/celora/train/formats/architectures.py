"""Tensors of Transformers' models under llama.cpp's names, and in its order. One row a family.

In some families llama.cpp rotates pairs of neighbouring rows, where Transformers rotates row i with row
i + head_dim / 2. So the rows of q and k stand in another order there:

    rows in GGUF = rows.reshape(heads, 2, head_dim / 2).swapaxes(1, 2)

Source: llama.cpp's `conversion/`, one file a family. The names come from the package `gguf`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from celora.errors import CELoraError


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp makes of a family.

    Attributes:
        name: `general.architecture` of its files.
        rotated: whether the rows of q and k stand in llama.cpp's order.
        norm_offset: what is added to the weights of RMS norms, where Transformers adds it in forward.
    """

    name: str
    rotated: bool = False
    norm_offset: float = 0.0


ARCHITECTURES = {  # by `model_type` of Transformers' configuration
    "llama": Architecture("llama", rotated=True),
    "mistral": Architecture("llama", rotated=True),
    "granite": Architecture("granite", rotated=True),
    "smollm3": Architecture("smollm3", rotated=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", norm_offset=1.0),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0),
    "phi3": Architecture("phi3"),
}


class Layout:
    """Names and order of the tensors of one model.

    Args:
        config: the model's configuration.

    Raises:
        CELoraError: the family has no row here.
    """

    def __init__(self, config: Any) -> None:
        kind = config.model_type
        if kind not in ARCHITECTURES:
            raise CELoraError(
                f"models of type {kind!r} cannot be written as GGUF here, only {', '.join(ARCHITECTURES)}; "
                "--merged --to safetensors works for any, and llama.cpp's convert_hf_to_gguf.py reads what it writes"
            )
        self.architecture = ARCHITECTURES[kind]
        self.heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        number = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[self.architecture.name]
        self._names = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def check_base(self, path: Path, architecture: Any) -> None:
        """Raise CELoraError if a GGUF file of this `general.architecture` holds a model of another family."""
        if architecture != self.architecture.name:
            kind = f"a model of {architecture!r}" if architecture else "no whole model"
            raise CELoraError(
                f"{str(path)!r} holds {kind}, and the adapter was trained on one of "
                f"{self.architecture.name!r}; give its own base model"
            )

    def gguf_name(self, name: str) -> str | None:
        """The name in GGUF of a parameter (`model.layers.0.mlp.up_proj.weight`); None if there is none."""
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        return None if found is None else str(found)

    def row_order(self, name: str, rows: int) -> Tensor | None:
        """`order` with `in GGUF = tensor[order]` for a parameter of so many rows; None if the order is the same."""
        heads = self.heads.get(name.split(".")[-2]) if self.architecture.rotated and name.count(".") > 1 else None
        if heads is None:
            return None
        return torch.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)

    def to_gguf(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter as it stands in GGUF."""
        order = self.row_order(name, len(tensor))
        found = tensor if order is None else tensor[order]
        return found + self._offset(name)

    def from_gguf(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter as it stands in Transformers' model, from how it stands in GGUF."""
        order = self.row_order(name, len(tensor))
        found = tensor if order is None else tensor[order.argsort()]
        return found - self._offset(name)

    def _offset(self, name: str) -> float:
        return self.architecture.norm_offset if name.endswith("norm.weight") else 0.0
