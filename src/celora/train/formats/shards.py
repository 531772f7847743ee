"""The weights of a model in a folder: safetensors files and their index. One new file is in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from celora.errors import CELoraError
from celora.weights.checkpoint import INDEX


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], most_bytes: int) -> set[str]:
    """Write tensors and read them back; gives their names.

    Args:
        folder: without weights yet.
        tensors: names and tensors, taken one by one.
        most_bytes: of one file, unless one tensor alone is larger.

    Raises:
        CELoraError: a tensor is not finite, or what was read is not what was written.
    """
    places: dict[str, int] = {}
    for number, group in enumerate(_groups(tensors, most_bytes)):
        write_file(folder / _file(number), group)
        places |= dict.fromkeys(group, number)
    _name_files(folder, places)
    return set(places)


def write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file and read it back.

    Raises:
        CELoraError: a tensor is not finite, or what was read is not what was written.
        OSError: the disk is full, or fails.
    """
    if wrong := next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None):
        raise CELoraError(f"{wrong!r} holds NaN or infinity, so nothing is written")
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        with safe_open(path, "pt") as file:
            same = set(file.keys()) == tensors.keys() and all(
                _equal(file.get_tensor(name), tensor) for name, tensor in tensors.items()
            )
    except SafetensorError as error:  # on a full disk, for example
        raise OSError(f"{path.name}: {error}") from error
    if not same:
        raise CELoraError(f"{path.name} does not read back as it was written; check the disk")


def _groups(tensors: Iterator[tuple[str, Tensor]], most_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Groups of tensors that go into one file together."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > most_bytes:
            yield group
            group, size = {}, 0
        group[name] = tensor.contiguous()
        size += tensor.nbytes
    yield group


def _equal(read: Tensor, written: Tensor) -> bool:
    return read.dtype == written.dtype and torch.equal(read, written)


def _file(number: int, count: int | None = None) -> str:
    """The name of a file of weights; the count is known at the end."""
    if count == 1:
        return "model.safetensors"
    return f"model-{number + 1:05d}" + (f"-of-{count:05d}.safetensors" if count else ".safetensors")


def _name_files(folder: Path, places: dict[str, int]) -> None:
    count = max(places.values()) + 1
    for number in range(count):
        (folder / _file(number)).rename(folder / _file(number, count))
    if count > 1:
        size = sum((folder / _file(number, count)).stat().st_size for number in range(count))
        index = {
            "metadata": {"total_size": size},
            "weight_map": {name: _file(number, count) for name, number in places.items()},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
