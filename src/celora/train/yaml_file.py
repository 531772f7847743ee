"""The file behind --config, as it stands: a mapping of names to values, and the environment that it asks for.

`trl sft` reads such files, too. Like it, the command line sets what the file lists under `env`; it does so before torch
is imported, since some variables count at that moment only. What the names mean is for `arguments`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from celora.errors import CELoraError
from celora.files import check_regular

_MOST_VALUES = 10_000  # in a configuration file; aliases of aliases could make it billions


def read_document(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file without its `env`; an empty file is an empty one."""
    document = _parse(path)
    document.pop("env", None)
    return document


def set_environment(path: str | Path) -> None:
    """Set the variables that the file lists under `env`."""
    asked = _parse(path).get("env") or {}
    if not isinstance(asked, dict):
        raise CELoraError(f"env in --config {str(path)!r} is {asked!r}; expected a mapping of variables to values")
    os.environ.update({str(name): str(value) for name, value in asked.items()})


def _parse(path: str | Path) -> dict[str, Any]:
    check_regular(Path(path))
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CELoraError(f"cannot read --config {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date like 2001-99-99
        raise CELoraError(f"--config {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if document is None:
        return {}
    if _larger(document, _MOST_VALUES):
        raise CELoraError(f"--config {str(path)!r} expands to more than {_MOST_VALUES:,} values; expected settings")
    if not isinstance(document, dict):
        raise CELoraError(
            f"--config {str(path)!r} holds a {type(document).__name__}; expected a mapping of names to values"
        )
    return document


def _larger(value: object, most: int) -> bool:
    """Whether a document has more than `most` values, each counted as often as aliases repeat it, or holds itself."""
    rest = [value]
    while rest and most >= 0:
        inner = rest.pop()
        rest += inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ()
        most -= 1
    return most < 0
