"""Readers: each turns a file into pairs (place, row). A place is `data.jsonl:17`, for error messages.

Files are read one row at a time, as strict text or Parquet. Nothing is unpickled. Text that is not valid JSON, CSV or
UTF-8 is refused, never repaired.
"""

from __future__ import annotations

import csv
import json
import re
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.parquet  # type: ignore[import-untyped]

from celora.errors import CELoraError
from celora.files import pairs_once

Placed = Iterator[tuple[str, Any]]


def fail(place: str, problem: str) -> NoReturn:
    """Raise CELoraError for the row at `place`, in one line."""
    raise CELoraError(f"{place}: {problem}.")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, without a byte order mark. Refuses what is not UTF-8, and NUL."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, _decoded(f"{path}:{number}", raw, "utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        fail(str(path), f"cannot be read: {error.strerror or error}; check the disk, or copy the file again")


def _decoded(place: str, raw: bytes, encoding: str) -> str:
    try:
        line = raw.decode(encoding)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{raw[error.start]:02x}"
        fail(place, f"not UTF-8 ({byte} at column {error.start + 1}); save the file as UTF-8")
    if "\0" in line:
        fail(place, "holds a NUL byte; expected UTF-8 text. Save the file again or drop the line")
    return line


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder(object_pairs_hook=pairs_once, parse_constant=_no_constant)


def _parse(path: Path, number: int, text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that starts at `start`, and where it ends; `number` is the line number of `text[start]`."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        line = number + text.count("\n", start, error.pos)
        fail(f"{path}:{line}", f"not JSON: {error.msg} at column {error.colno}; expected one JSON object per row")
    except (ValueError, RecursionError) as error:
        fail(f"{path}:{number}", f"not a usable JSON row: {error}; mend the row or drop it")


def _read_json(path: Path) -> Placed:
    lines = _lines(path)
    first = True
    for number, line in lines:
        text = line.strip()
        if not text:
            continue
        if first and text[0] == "[":
            yield from _read_json_list(path, number, line + "".join(rest for _, rest in lines))
            return
        first = False
        if text == "{":
            fail(
                f"{path}:{number}",
                "a row over several lines; put each row on one line, or all rows into one list: [...]",
            )
        row, end = _parse(path, number, text)
        if end < len(text):
            fail(f"{path}:{number}", f"not JSON: {reprlib.repr(text[end:])} after the object; put each row on a line")
        yield f"{path}:{number}", row


def _read_json_list(path: Path, line: int, text: str) -> Placed:
    at = 0

    def goto(position: int) -> str:
        """Move to the first character from `position` on that is not a space, and return it; '' at the end."""
        nonlocal at, line
        space = _SPACE.match(text, position)
        after = space.end() if space else position
        line += text.count("\n", at, after)
        at = after
        return text[at : at + 1]

    goto(0)
    if goto(at + 1) != "]":
        while True:
            row, end = _parse(path, line, text, at)
            yield f"{path}:{line}", row
            character = goto(end)
            if character == "]":
                break
            if character != ",":
                came = repr(character) if character else "the end of the file"
                fail(f"{path}:{line}", f"not JSON: {came} in a list of rows; expected ',' or ']'")
            goto(at + 1)
    if goto(at + 1):
        fail(f"{path}:{line}", f"not JSON: {text[at]!r} after the list of rows; remove it")


def _read_csv(path: Path) -> Placed:
    # Not pandas: it would read the completion "None" or "NA" as a missing value.
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    columns: list[str] = []
    allowed = csv.field_size_limit(2**31 - 1)
    try:
        while True:
            number = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fail(f"{path}:{number}", f"not CSV: {error}; quote texts that hold quotes, commas or line ends")
            if not values:
                continue
            if not columns:
                columns = _each_once(f"{path}:{number}", values)
            elif len(values) != len(columns):
                fail(f"{path}:{number}", f"{len(values)} values for {len(columns)} columns; quote texts with commas")
            else:
                yield f"{path}:{number}", dict(zip(columns, values, strict=True))
    finally:
        csv.field_size_limit(allowed)


def _read_parquet(path: Path) -> Placed:
    try:
        before = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            _each_once(str(path), file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1000):
                for number, row in enumerate(batch.to_pylist(), before + 1):
                    yield f"{path}, row {number}", row
                before += batch.num_rows
    except CELoraError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        fail(str(path), f"not readable as Parquet: {error}; write the file again")


def _each_once(place: str, columns: list[str]) -> list[str]:
    """The names of columns; refuses a name that comes twice, because one of its columns would be left out."""
    if len(set(columns)) < len(columns):
        fail(place, f"two columns have one name among {', '.join(map(repr, columns))}; rename or drop one")
    return columns


READERS: dict[str, Callable[[Path], Placed]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}
