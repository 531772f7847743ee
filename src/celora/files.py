"""Small files, written whole or not at all, and read with errors that a user can act on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from celora.errors import CELoraError


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """What a JSON file holds; CELoraError if it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CELoraError(f"cannot read {path}: {error.strerror}.") from None
    except json.JSONDecodeError as error:
        raise CELoraError(f"{path}:{error.lineno}: not JSON: {error.msg}.") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise CELoraError(f"{path}: not JSON: {error}.") from None


def inside(path: str | os.PathLike[str], name: str) -> Path:
    """`path`, or the file `name` in it if it is a folder."""
    path = Path(path)
    return path / name if path.is_dir() else path
