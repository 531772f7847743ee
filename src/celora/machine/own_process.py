"""Commands that run a module of celora in a process of its own."""

from __future__ import annotations

import os
import sys


def of_module(module: str, *given: str) -> tuple[list[str], dict[str, str]]:
    """The command `python -m module given...`, and its environment.

    It finds modules where this process finds them. The folder it runs in is no such place, unless it is one here: a
    user's `datasets.py` would be imported for the library.
    """
    folders = [entry or os.getcwd() for entry in sys.path if isinstance(entry, str)]  # Python ignores other entries
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    return [sys.executable, "-P", "-W", "ignore", "-m", module, *given], environment
