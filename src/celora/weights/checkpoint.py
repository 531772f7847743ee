"""Reads the tensors of a checkpoint one by one, from a folder or from the hub's cache.

Each read opens the file and closes it again. The pages of a mapped file count as memory of the process. So a file that
stayed open would end up in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from celora.errors import CELoraError, Damaged, first_line
from celora.files import read_json

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file. Transformers reads it with `tensor[...]`, like a slice of such a file."""

    file: Path
    key: str

    def read(self) -> Tensor:
        """Read the tensor into new memory."""
        with safe_open(self.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(self.key)
            return tensor.clone()

    def __getitem__(self, index: object) -> Tensor:
        return self.read()[index]  # type: ignore[index]

    def get_shape(self) -> list[int]:
        """The tensor's sizes, from the header of the file."""
        with safe_open(self.file, framework="pt") as opened:
            shape: list[int] = opened.get_slice(self.key).get_shape()
            return shape

    def get_dtype(self) -> str:
        """The tensor's dtype in the spelling of safetensors, such as `BF16`."""
        with safe_open(self.file, framework="pt") as opened:
            dtype: str = opened.get_slice(self.key).get_dtype()
            return dtype


def stored_tensors(model: str, revision: str | None = None, *, offline: bool = False) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, by name. Reads none of them.

    Args:
        model: a folder, or a name on the hub.
        revision: the revision on the hub.
        offline: use only files that are on this machine.

    Raises:
        CELoraError: the checkpoint has no safetensors files; `Damaged` if one of them is no such file.
    """

    def found(name: str) -> Path | None:
        path = cached_file(
            model, name, revision=revision, local_files_only=offline, _raise_exceptions_for_missing_entries=False
        )
        return None if path is None else Path(path)

    if (single := found(SINGLE)) is not None:
        files = [single]
    elif (index := found(INDEX)) is not None:
        files = [_there(found(name), name, model) for name in sorted(set(read_json(index)["weight_map"].values()))]
    else:
        raise CELoraError(f"{model!r} holds neither {SINGLE} nor {INDEX}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {key: StoredTensor(file, key) for key in opened.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise Damaged(f"{str(file)!r} is damaged: {error}; fetch it again") from error
    return tensors


def stored_itemsize(model: str, revision: str | None = None) -> int:
    """Bytes of a number in a checkpoint, from the head of a file. 4 if it has no safetensors.

    Raises:
        Damaged: a file is no safetensors file.
    """
    try:
        return stored_dtype(stored_tensors(model, revision)).itemsize
    except Damaged:
        raise
    except (OSError, CELoraError):
        return 4


def stored_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype of a checkpoint: of its first tensor of floating-point numbers. float32 if it has none."""
    kinds = (tensor.get_dtype() for tensor in tensors.values())
    return next((_DTYPES[kind] for kind in kinds if kind in _DTYPES), torch.float32)


def _there(path: Path | None, name: str, model: str) -> Path:
    if path is None:
        raise CELoraError(f"{model!r} lacks {name}, which its index lists")
    return path


@dataclass(frozen=True)
class Origin:
    """Where a layer's weight came from: the name of a parameter, and the folder or hub name of its model."""

    model: str
    revision: str | None
    name: str

    def read(self) -> Tensor:
        """Read the parameter again, without a download.

        Raises:
            CELoraError: it is not on this machine.
        """
        try:
            tensors = stored_tensors(self.model, self.revision, offline=True)
        except (OSError, ValueError) as error:  # or a path, which is no name for the hub
            raise CELoraError(f"{self.model!r} is not on this machine: {first_line(error)}") from None
        # The checkpoint of a bare model lacks the prefix of the model around it.
        for key in (self.name, self.name.partition(".")[2]):
            if key in tensors:
                return tensors[key].read()
        raise CELoraError(f"{self.model!r} holds no {self.name!r}")
