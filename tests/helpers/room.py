"""Room for the frames of Python's calls.

CPython keeps them in chunks of 16 KB. It asks the kernel for the next chunk when a call needs it, and gives it back
when that call returns. A loop on the edge of a chunk does so in each turn, which is half of these tests' page faults.
A chunk is as large as its first frame needs, rounded up to a power of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def with_room(work: Callable[..., Any], *args: Any, **given: Any) -> Any:
    """Call it in a new chunk of 4 MB, of which it has half. Only what it uses takes memory."""
    return work(*args, **given)


with_room.__code__ = with_room.__code__.replace(co_stacksize=2**18)
