"""GGUF files: looked at before they are read, and read back after they were written.

The package `gguf` reads and writes them. It trusts a file: a count that is larger than the file would keep it busy for
ever. So `open_gguf` first walks over the header, where every number has to fit what is there.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from celora.errors import CELoraError
from celora.files import check_regular

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_ENTRIES, _MOST_TENSORS, _LONGEST_ARRAY, _LONGEST_NAME = 65_536, 262_144, 4_194_304, 65_536
_MOST_DIMENSIONS, _LARGEST_ALIGNMENT = 4, 2**20
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value of each type
_UINT32, _STRING, _ARRAY = 4, 8, 9


class _Header:
    """A walk over the header of a file of so many bytes; ValueError where it does not fit."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.alignment = gguf.GGUF_DEFAULT_ALIGNMENT

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise ValueError("it ends in the middle of its header")
        return self.file.read(count)

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError("it ends in the middle of its header")
        self.file.seek(count, 1)

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0])

    def bounded(self, what: str, code: str, most: int) -> int:
        if (found := self.number(code)) > most:
            raise ValueError(f"it says that it has {found:,} {what}, and the most that is read is {most:,}")
        return found

    def walk(self) -> None:
        if self.take(4) != _MAGIC:
            raise ValueError("it does not begin as a GGUF file does")
        if (version := self.number("I")) not in _VERSIONS:
            raise ValueError(f"it is of version {version}; versions 2 and 3 are read, little-endian")
        tensors = self.bounded("tensors", "Q", _MOST_TENSORS)
        for _ in range(self.bounded("metadata entries", "Q", _MOST_ENTRIES)):
            key = self.take(self.bounded("bytes in a name", "Q", _LONGEST_NAME))
            kind = self.number("I")
            if key == b"general.alignment" and kind == _UINT32:
                self.alignment = self.bounded("bytes of alignment", "I", _LARGEST_ALIGNMENT)
            else:
                self.value(kind)
        ends = [self.tensor() for _ in range(tensors)]
        start = math.ceil(self.file.tell() / max(self.alignment, 1)) * self.alignment
        if max(ends, default=0) > self.size - start:
            raise ValueError(f"its tensors end {max(ends) + start - self.size:,} bytes behind its end: it is cut off")

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.bounded("entries in a list", "Q", _LONGEST_ARRAY)
            if inner in _SIZES:
                self.skip(count * _SIZES[inner])
                return
            if inner != _STRING:
                raise ValueError(f"it has a list of values of type {inner}, which no model has")
            for _ in range(count):
                self.skip(self.number("Q"))
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise ValueError(f"it has a value of type {kind}, which is unknown")

    def tensor(self) -> int:
        """Where this tensor ends, counted from the first one."""
        name = self.take(self.bounded("bytes in a name", "Q", _LONGEST_NAME)).decode("utf-8", "replace")
        shape = [self.number("Q") for _ in range(self.bounded("dimensions", "I", _MOST_DIMENSIONS))]
        kind, offset = self.number("I"), self.number("Q")
        try:
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (KeyError, ValueError):
            raise ValueError(f"its tensor {name!r} is stored as type {kind}, which is unknown") from None
        if 0 in shape or not shape or shape[0] % block:
            raise ValueError(f"its tensor {name!r} cannot have the shape {shape}")
        return int(offset + math.prod(shape) // block * block_bytes)


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader` of a file whose header fits it.

    Raises:
        CELoraError: it cannot be read, it is damaged, or it is no GGUF file.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            _Header(file, path.stat().st_size).walk()
        return gguf.GGUFReader(path)
    except OSError as error:
        raise CELoraError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except (ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
        raise CELoraError(f"{str(path)!r} is no GGUF file that can be read: {' '.join(str(error).split())}") from None


def field(reader: Any, name: str) -> Any:
    """A value of the metadata, or None."""
    found = reader.get_field(name)
    return None if found is None else found.contents()


@dataclass(frozen=True)
class Written:
    """A tensor as it was handed to the writer: its shape (rows first), how it is stored, and its bytes' SHA-256."""

    shape: tuple[int, ...]
    kind: Any
    sha256: str

    @staticmethod
    def of(shape: tuple[int, ...], kind: Any, data: np.ndarray[Any, Any]) -> Written:
        return Written(shape, kind, hashlib.sha256(np.ascontiguousarray(data).data).hexdigest())


def check_written(path: Path, stated: Mapping[str, Any], tensors: Mapping[str, Written]) -> int:
    """Read a file back; gives the number of its tensors.

    Raises:
        CELoraError: a value of `stated`, or a name, shape, type or number of a tensor is not what was written.
    """
    reader = open_gguf(path)
    for name, value in stated.items():
        if field(reader, name) != value:
            raise CELoraError(f"{path.name} reads back {name} as {field(reader, name)!r}, and {value!r} was written")
    found = {
        tensor.name: Written.of(tuple(int(n) for n in reversed(tensor.shape)), tensor.tensor_type, tensor.data)
        for tensor in reader.tensors
    }
    if wrong := sorted(name for name in {*found, *tensors} if found.get(name) != tensors.get(name)):
        raise CELoraError(f"{path.name} does not read back as it was written: {wrong[0]} differs; check the disk")
    return len(found)
