"""Threads for compiled kernels where torch's cannot be shared: Python's own. None of them holds the GIL in a kernel."""

from __future__ import annotations

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor

_ALL_HAVE_COME = 2**62


class Team:
    """Threads that run the parts of one kernel at a time.

    The parts of a kernel wait for each other. So a kernel that is called while another one runs has one thread.
    """

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._part = loaded.celora_run_part
        self._part.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        self._part.restype = ctypes.c_int64
        self._free = threading.Lock()
        self._others: ThreadPoolExecutor | None = None
        self._made_for = (0, 0)  # process, since a forked one has none of these threads, and their number

    def run(self, kernel: int, slots: bytes, threads: int) -> int:
        """Call a kernel with its arguments on so many threads. Returns what the first of them returns."""
        shared = (ctypes.c_int64 * 2)()
        if threads == 1 or not self._free.acquire(blocking=False):
            return int(self._part(kernel, slots, shared, 0, 1))
        try:
            others = self._threads(threads - 1)
            try:
                parts = [others.submit(self._part, kernel, slots, shared, i, threads) for i in range(1, threads)]
                result = int(self._part(kernel, slots, shared, 0, threads))
                for part in parts:
                    part.result()
            except BaseException:  # Ctrl-C, perhaps before all parts have begun: nobody waits for them
                shared[1] = _ALL_HAVE_COME
                self._made_for = (0, 0)
                others.shutdown()  # the parts write to tensors that are about to go
                raise
            return result
        finally:
            self._free.release()

    def _threads(self, count: int) -> ThreadPoolExecutor:
        if self._others is None or self._made_for != (os.getpid(), count):
            self._others, self._made_for = ThreadPoolExecutor(count, "celora-kernel"), (os.getpid(), count)
        return self._others
