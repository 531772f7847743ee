"""GGUF files: looked at before they are read, and read back after they were written.

The package `gguf` reads and writes them. It trusts a file: a count that is larger than the file would keep it busy for
ever. So `read_header` walks over the header first, where every number has to fit what is there.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from celora.errors import CELoraError
from celora.files import check_regular

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_ENTRIES, _MOST_TENSORS, _MOST_IN_LISTS, _LONGEST_NAME = 65_536, 262_144, 4_194_304, 65_536
_UNPACKED_AT_ONCE = 2**22  # numbers
_KEPT = 4_096  # a longer list is not kept: it belongs to the tokenizer
_LONGEST_HEADER = 2**28  # bytes; the words of 256,000 tokens and their merges take a tenth
_MOST_DIMENSIONS, _LARGEST_ALIGNMENT = 4, 2**20
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor stands in a file: its shape (rows first), how it is stored, its first byte and their number."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """The head of a file: metadata without the long lists and the lists of words, and where the tensors are."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        """`general.architecture`, or "" where it is not said."""
        found = self.fields.get(gguf.Keys.General.ARCHITECTURE)
        return found if isinstance(found, str) else ""


class _Walk:
    """A walk over the header of a file of so many bytes; ValueError where it does not fit."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.alignment = gguf.GGUF_DEFAULT_ALIGNMENT
        self.in_lists = 0

    def take(self, count: int) -> bytes:
        self.check(count)
        return self.file.read(count)

    def skip(self, count: int) -> None:
        self.check(count)
        self.file.seek(count, 1)

    def check(self, count: int) -> None:
        end = self.file.tell() + count
        if end > self.size:
            raise ValueError("it ends in the middle of its header")
        if end > _LONGEST_HEADER:
            raise ValueError(f"its header is longer than {_LONGEST_HEADER / 2**20:.0f} MiB")

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0])

    def bounded(self, what: str, code: str, most: int) -> int:
        if (found := self.number(code)) > most:
            raise ValueError(f"it says that it has {found:,} {what}, and the most that is read is {most:,}")
        return found

    def header(self, path: Path) -> GGUFHeader:
        if self.take(4) != _MAGIC:
            raise ValueError("it does not begin as a GGUF file does")
        if (version := self.number("I")) not in _VERSIONS:
            raise ValueError(f"it is of version {version}; versions 2 and 3 are read, little-endian")
        tensors = self.bounded("tensors", "Q", _MOST_TENSORS)
        fields = {}
        for _ in range(self.bounded("metadata entries", "Q", _MOST_ENTRIES)):
            key = self.take(self.bounded("bytes in a name", "Q", _LONGEST_NAME)).decode("utf-8", "replace")
            kind = self.number("I")
            if key in fields:
                raise ValueError(f"it has the metadata entry {key!r} twice")
            if key == "general.alignment" and kind == _UINT32:
                fields[key] = self.alignment = self.bounded("bytes of alignment", "I", _LARGEST_ALIGNMENT)
            else:
                fields[key] = self.value(kind)
        if self.alignment.bit_count() != 1:
            raise ValueError(f"its alignment is {self.alignment}, and only powers of two are")
        found = [self.tensor() for _ in range(tensors)]
        start = math.ceil(self.file.tell() / self.alignment) * self.alignment
        end = max((tensor.start + tensor.nbytes for tensor in found), default=0)
        if end > self.size - start:
            raise ValueError(f"its tensors end {end + start - self.size:,} bytes behind its end: it is cut off")
        there = {
            tensor.name: GGUFTensor(tensor.name, tensor.shape, tensor.kind, tensor.start + start, tensor.nbytes)
            for tensor in found
        }
        if len(there) < len(found):
            raise ValueError("two of its tensors have the same name")
        return GGUFHeader(path, fields, there)

    def value(self, kind: int) -> Any:
        """A value; None for a long list, or one of words."""
        if kind == _STRING:
            return self.take(self.number("Q")).decode("utf-8", "replace")
        if kind in _CODES:
            return struct.unpack(f"<{_CODES[kind]}", self.take(struct.calcsize(f"<{_CODES[kind]}")))[0]
        if kind != _ARRAY:
            raise ValueError(f"it has a value of type {kind}, which is unknown")
        inner, count = self.number("I"), self.bounded("entries in a list", "Q", _MOST_IN_LISTS - self.in_lists)
        self.in_lists += count
        if inner in _CODES:
            code = f"<{count}{_CODES[inner]}"
            if count <= _KEPT:
                return list(struct.unpack(code, self.take(struct.calcsize(code))))
            self.skip(struct.calcsize(code))
            return None
        if inner != _STRING:
            raise ValueError(f"it has a list of values of type {inner}, which no model has")
        for _ in range(count):
            self.skip(self.number("Q"))
        return None

    def tensor(self) -> GGUFTensor:
        """The next tensor; its start is counted from the first one's."""
        name = self.take(self.bounded("bytes in a name", "Q", _LONGEST_NAME)).decode("utf-8", "replace")
        shape = [self.number("Q") for _ in range(self.bounded("dimensions", "I", _MOST_DIMENSIONS))]
        number, offset = self.number("I"), self.number("Q")
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (KeyError, ValueError):
            raise ValueError(f"its tensor {name!r} is stored as type {number}, which is unknown") from None
        if 0 in shape or not shape or shape[0] % block:
            raise ValueError(f"its tensor {name!r} cannot have the shape {shape}")
        nbytes = math.prod(shape) // block * block_bytes
        return GGUFTensor(name, tuple(reversed(shape)), kind, offset, nbytes)


def read_header(path: Path) -> GGUFHeader:
    """The header of a file. Every number in it fits the file.

    Raises:
        CELoraError: it cannot be read, it is damaged, or it is no GGUF file.
    """
    check_regular(path)
    with _readable(path), path.open("rb") as file:
        return _Walk(file, path.stat().st_size).header(path)


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader` of a file whose header fits it; raises as `read_header` does."""
    read_header(path)
    with _readable(path):
        return gguf.GGUFReader(path)


def read_tensor(header: GGUFHeader, tensor: GGUFTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of a tensor. A few rows at a time are unpacked in float32, then rounded.

    Raises:
        CELoraError: the file cannot be read.
    """
    rows = math.prod(tensor.shape[:-1])
    found = torch.empty(tensor.shape, dtype=dtype)
    flat, row_bytes = found.view(rows, tensor.shape[-1]), tensor.nbytes // rows
    step = max(1, _UNPACKED_AT_ONCE // tensor.shape[-1])
    with _readable(header.path), header.path.open("rb") as file:
        file.seek(tensor.start)
        for begin in range(0, rows, step):
            part = flat[begin : begin + step]
            packed = np.fromfile(file, np.uint8, len(part) * row_bytes).reshape(len(part), row_bytes)
            part.copy_(torch.from_numpy(gguf.dequantize(packed, tensor.kind).reshape(part.shape)))
    return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CELoraError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    # NotImplementedError: gguf unpacks no tensor of such a type, as of Q8_K.
    except (ValueError, KeyError, IndexError, OverflowError, NotImplementedError, struct.error) as error:
        raise CELoraError(f"{str(path)!r} is no GGUF file that can be read: {error}") from None


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
