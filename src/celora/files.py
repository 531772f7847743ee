"""Files, written whole or not at all, and read with errors that a user can act on."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from celora.errors import CELoraError

T = TypeVar("T")
_WINDOWS, _PATIENCE_S = os.name == "nt", 2.0


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file name. At the end the file is flushed to disk and renamed to `path`.

    Raises:
        CELoraError: it cannot be written; `path` is unchanged then.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process, or a link that this would write through
        temporary.touch(exist_ok=False)
        yield temporary
        sync(temporary)
        patiently(os.replace, temporary, path)
        sync(path.parent)
    except OSError as error:
        raise _unchanged(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder. At the end its files are flushed to disk, and it is renamed to `path`.

    Raises:
        CELoraError: it cannot be written; `path` is unchanged then.
    """
    temporary, aside = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "replaced"))
    try:
        if aside.exists() and not path.exists():
            aside.rename(path)  # an earlier process died between the two renames below
        clear(temporary)
        temporary.mkdir()
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            sync(written)
        clear(aside)
        if path.exists():
            patiently(path.rename, aside)
        patiently(temporary.rename, path)
        sync(path.parent)
        clear(aside)
    except OSError as error:
        raise _unchanged(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            clear(temporary)


def _unchanged(path: Path, error: OSError) -> CELoraError:
    why = error.strerror or str(error)
    why += " bytes: is the disk full?" if why.endswith(" written") else ""  # numpy gives no other reason
    return CELoraError(f"cannot write {str(path)!r}: {why}; what was there is unchanged")


def clear(path: Path) -> None:
    """Remove a file, a folder, or a link (but not the link's target)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def patiently(act: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Move or read a file. Windows refuses it while another program has it open, so it is tried for two seconds."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return act(*arguments, **options)
        except PermissionError:
            if not _WINDOWS or time.monotonic() > until:
                raise
            time.sleep(0.05)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, where a loss of power cannot undo them."""
    if path.is_dir() and _WINDOWS:
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOTSUP):
            raise  # file systems that lack it for folders, such as a virtual machine's shared ones, cannot do more
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """`value` for JSON, which has no NaN and no infinity: such numbers become None (null)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON. A value of a type that JSON does not know is written as its `str`."""
    write_text(path, json.dumps(finite(value), indent=2, default=str, allow_nan=False) + "\n")


def json_lines(rows: Iterable[Mapping[str, Any]], *, ascii: bool = True) -> str:
    """Rows as the text of a file of JSON lines: an object a line, with other types and numbers as in `write_json`.

    `ascii`: write other characters as escapes. Half a surrogate pair, which no file can hold, is always escaped.
    """
    lines = (json.dumps(finite(row), ensure_ascii=ascii, default=str, allow_nan=False) + "\n" for row in rows)
    return "".join(lines).encode(errors="backslashreplace").decode()


def quoted(path: str | os.PathLike[str]) -> str:
    """A path as a command that the user may paste into the shell of this system names it."""
    named = os.fspath(path)
    if _WINDOWS:  # where a path has no quotation marks
        return named if re.fullmatch(r"[\w.:\\/-]+", named) else f'"{named}"'
    return shlex.quote(named)


def is_stream(path: Path) -> bool:
    """Whether this is a pipe or a device: reading one may never end."""
    try:
        return path.exists() and not path.is_file() and not path.is_dir()
    except (OSError, ValueError):  # not a valid name: opening it says why
        return False


def check_regular(path: Path) -> None:
    """Raise CELoraError for a pipe or a device."""
    if is_stream(path):
        raise CELoraError(f"cannot read {str(path)!r}: a pipe or a device; expected a file.")


def check_name(option: str, path: str | os.PathLike[str]) -> None:
    """Refuse a path that no file can have. The file need not exist.

    Raises:
        CELoraError: says what --`option` gives, and why it cannot be a path.
    """
    try:
        os.fspath(path).encode()
        os.stat(Path(path).expanduser())
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError, RuntimeError) as error:  # too long, not UTF-8, a NUL, links in a circle, no such user
        shown = os.fspath(path)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        reason = getattr(error, "strerror", None) or error
        raise CELoraError(f"--{option} {shown!a} cannot be a path: {reason}") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file. CELoraError if it cannot be read, is not JSON, or has a key twice in one object."""
    check_regular(path)
    try:
        return json.loads(patiently(path.read_text, encoding="utf-8"), object_pairs_hook=pairs_once)
    except OSError as error:
        raise CELoraError(f"cannot read {path}: {error.strerror}.") from None
    except json.JSONDecodeError as error:
        raise CELoraError(f"{path}:{error.lineno}: not JSON: {error.msg}.") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, nested too deeply, too many digits, a key given twice
        raise CELoraError(f"{path}: not JSON: {error}.") from None


def pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`. Raises ValueError if a key comes twice; Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice in one object")
    return found


def inside(path: str | os.PathLike[str], name: str) -> Path:
    """`path`, or the file `name` in it if it is a folder."""
    path = Path(path)
    return path / name if path.is_dir() else path
