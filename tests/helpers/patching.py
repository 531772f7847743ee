"""Replace a function or a number of celora's for a test, wherever it has been imported by name."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest


def patch_all(patch: pytest.MonkeyPatch, target: str, value: object) -> None:
    """Put `value` in the place of `target`, "module:name", in its module and in all that imported it from there."""
    module, _, name = target.partition(":")
    replaced = getattr(import_module(module), name)
    for other in [m for n, m in sys.modules.items() if n.startswith("celora.")]:
        if vars(other).get(name, sys) is replaced:
            patch.setattr(other, name, value)
