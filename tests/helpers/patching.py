"""Replace a function or a number of celora for a test, in every module that has imported it by name."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest


def patch_all(patch: pytest.MonkeyPatch, target: str, value: object) -> None:
    """Put `value` in the place of `target`, "module:name", in its module and in all modules that imported it."""
    module, _, name = target.partition(":")
    replaced = getattr(import_module(module), name)
    for other in [m for n, m in sys.modules.items() if n.startswith("celora.")]:
        if vars(other).get(name, sys) is replaced:
            patch.setattr(other, name, value)
