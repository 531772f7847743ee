"""Commands that run a module of celora in a process of its own."""

from __future__ import annotations

import os
import sys


def of_module(module: str, *given: str) -> tuple[list[str], dict[str, str]]:
    """The command `python -m module given...`, and its environment.

    It finds modules where this process finds them. The folder it runs in is no such place, unless it is one here: a
    user's `datasets.py` would be imported for the library.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return [sys.executable, "-P", "-W", "ignore", "-m", module, *given], environment
