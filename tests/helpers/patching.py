"""Replace a function or a number of celora for a test, in every module that imports it by name."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

import celora

_SOURCES = Path(celora.__file__).parent


def patch_all(patch: pytest.MonkeyPatch, target: str, value: object) -> None:
    """Put `value` in the place of `target`, "module:name", in its module and in all modules that import it."""
    module, _, name = target.partition(":")
    replaced = getattr(import_module(module), name)
    _import_readers(name)
    for other in [m for n, m in sys.modules.items() if n.startswith("celora.")]:
        if vars(other).get(name, sys) is replaced:
            patch.setattr(other, name, value)


@functools.cache  # reading all sources takes longer than many a test
def _import_readers(name: str) -> None:
    """Import what imports this name. A module that is first imported during the test would keep the replacement."""
    imports = re.compile(rf"^from celora\S* import .*\b{name}\b|^    {name},$", re.MULTILINE)
    for file in _SOURCES.rglob("*.py"):
        if imports.search(file.read_text(encoding="utf-8")):
            with contextlib.suppress(ModuleNotFoundError):  # of the application, where the library alone is installed
                import_module(
                    ".".join(file.relative_to(_SOURCES.parent).with_suffix("").parts).removesuffix(".__init__")
                )
