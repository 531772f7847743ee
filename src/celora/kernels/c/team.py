"""Threads for compiled kernels where torch's cannot be shared: Python's own. None of them holds the GIL in a kernel."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

_SHARED, _BEGUN = 4, 2  # numbers of `shared` in team.h, and the place of `begun`


class Team:
    """Threads that run the parts of one kernel at a time.

    The parts of a kernel wait for each other. So a kernel that is called while another one runs has one thread.
    """

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._part = loaded.celora_run_part
        self._part.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        self._part.restype = ctypes.c_int64
        self._free = threading.Lock()
        self._others: list[SimpleQueue[Any]] = []  # what each of the other threads does next
        self._process = 0  # that has these threads; one that is forked has none

    def run(self, kernel: int, slots: bytes, threads: int) -> int:
        """Call a kernel with its arguments on so many threads, or on one. Returns what the first of them returns."""
        shared = (ctypes.c_int64 * _SHARED)()
        if threads > 1 and not sys.is_finalizing() and self._free.acquire(blocking=False):
            try:
                if self._has(threads - 1):
                    for i, other in enumerate(self._others[: threads - 1], 1):
                        other.put((kernel, slots, shared, i, threads))
                    return int(self._part(kernel, slots, shared, 0, threads))
            finally:
                if not shared[_BEGUN]:  # Ctrl-C came before the first part: the others do not begin
                    shared[_BEGUN] = -1
                self._free.release()
            shared = (ctypes.c_int64 * _SHARED)()
        return int(self._part(kernel, slots, shared, 0, 1))

    def _has(self, count: int) -> bool:
        """Whether there are so many other threads; starts those that are missing, if this system lets it."""
        if self._process != os.getpid():
            self._process, self._others = os.getpid(), []
        with contextlib.suppress(RuntimeError):
            while len(self._others) < count:
                other: SimpleQueue[Any] = SimpleQueue()
                threading.Thread(target=_work, args=(self._part, other), name="celora-kernel", daemon=True).start()
                self._others.append(other)
        return len(self._others) >= count


def _work(part: Callable[..., int], other: SimpleQueue[Any]) -> None:
    while True:
        part(*other.get())
