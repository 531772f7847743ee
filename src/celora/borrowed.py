"""The private names of other libraries that celora uses, each looked up here, when it is used.

A private name may move or disappear in any release. `borrow` then returns None, says once what is not done without it,
and its caller takes the plain path, which gives the same result more slowly. So a new version of a library can cost
time, never a result, and never `import celora`. Whatever is not listed here is public, or is not used.
"""

from __future__ import annotations

import functools
import warnings
from importlib import import_module
from typing import Any

# "module:name", or "module:Class.attribute" -> what celora leaves out where the library does not have it.
NAMES: dict[str, str] = {}


def borrow(name: str) -> Any:
    """What `NAMES` lists as `name`, or None where the installed version of its library has no such thing."""
    found = _look_up(name)
    if found is None:
        _say_missing(name)
    return found


@functools.cache
def _look_up(name: str) -> Any:
    assert name in NAMES, f"{name} is not listed"
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


@functools.cache
def _say_missing(name: str) -> None:
    library = name.partition(":")[0].partition(".")[0]
    warnings.warn(f"celora: this version of {library} has no {name.replace(':', '.')}, so {NAMES[name]}.", stacklevel=3)


def forget() -> None:
    """Look everything up anew, and say again what is missing; for tests that take names away."""
    _look_up.cache_clear()
    _say_missing.cache_clear()
