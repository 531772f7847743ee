"""The weights of a checkpoint, read one by one: a folder, or a model of the hub that is on this machine already.

A file is opened for each tensor and closed after it. Mapped pages count as memory of the process: a file that stayed
open would in the end be in memory as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from celora.errors import CELoraError
from celora.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file. Transformers reads it as a slice of such a file: by `tensor[...]`."""

    file: Path
    key: str

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        with safe_open(self.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(self.key)
            return tensor.clone()

    def __getitem__(self, index: object) -> Tensor:
        return self.read()[index]  # type: ignore[index]

    def get_shape(self) -> list[int]:
        """Its sizes, from the head of the file."""
        with safe_open(self.file, framework="pt") as opened:
            shape: list[int] = opened.get_slice(self.key).get_shape()
            return shape

    def get_dtype(self) -> str:
        """Its dtype as safetensors spells it, `BF16`."""
        with safe_open(self.file, framework="pt") as opened:
            dtype: str = opened.get_slice(self.key).get_dtype()
            return dtype


def stored_tensors(model: str, revision: str | None = None, *, offline: bool = False) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name; none is read.

    Args:
        model: a folder, or a name on the hub.
        revision: on the hub.
        offline: take only what is on this machine.

    Raises:
        CELoraError: it holds no safetensors files.
    """

    def found(name: str) -> Path | None:
        path = cached_file(
            model, name, revision=revision, local_files_only=offline, _raise_exceptions_for_missing_entries=False
        )
        return None if path is None else Path(path)

    single = found(SINGLE)
    index = None if single is not None else found(INDEX)
    if single is None and index is None:
        raise CELoraError(f"{model!r} holds neither {SINGLE} nor {INDEX}")
    if single is not None:
        files = [single]
    else:
        assert index is not None
        files = [_there(found(name), name, model) for name in sorted(set(read_json(index)["weight_map"].values()))]
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            tensors |= {key: StoredTensor(file, key) for key in opened.keys()}  # noqa: SIM118 - no mapping
    return tensors


def _there(path: Path | None, name: str, model: str) -> Path:
    if path is None:
        raise CELoraError(f"{model!r} lacks {name}, which its index lists")
    return path


@dataclass(frozen=True)
class Origin:
    """Where the weight of a layer was read: a parameter of a model that a folder or the hub holds."""

    model: str
    revision: str | None
    name: str

    def read(self) -> Tensor:
        """The parameter as it is stored, from this machine.

        Raises:
            CELoraError: it cannot be found there.
        """
        try:
            tensors = stored_tensors(self.model, self.revision, offline=True)
        except OSError as error:
            raise CELoraError(f"{self.model!r} is not on this machine: {str(error).splitlines()[0]}") from None
        # A checkpoint of a bare model lacks the prefix that the model around it puts in front of names.
        for key in (self.name, self.name.partition(".")[2]):
            if key in tensors:
                return tensors[key].read()
        raise CELoraError(f"{self.model!r} holds no {self.name!r}")
