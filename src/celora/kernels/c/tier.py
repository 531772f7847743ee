"""One tier of the compiled kernels: which instructions they use, chosen once by what CPU and operating system offer.

`CELORA_KERNELS` names a tier below that one, to measure or to find a fault; `plain` or `0` turns all of them off.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from pathlib import Path

import torch

from celora.kernels.c.build import build_and_load
from celora.kernels.c.compiling import NAMES
from celora.kernels.c.team import Team
from celora.machine import cpu

_RUNTIMES = ("libtorch_cpu.so", "libtorch_cpu.dylib", "libiomp5md.dll")  # who brings OpenMP, in torch's folder
_FUNCTIONS = (
    "GOMP_parallel",
    "GOMP_barrier",
    "__kmpc_fork_call",
    "__kmpc_push_num_threads",
    "__kmpc_global_thread_num",
    "__kmpc_barrier",
    "omp_get_thread_num",
    "omp_get_num_threads",
)


class Kernels:
    """The kernels of one tier.

    Attributes:
        tier: its name.
        threaded: whether they run on torch's threads; else on Python's.
    """

    def __init__(self, loaded: ctypes.CDLL, tier: str) -> None:
        self.tier, self.threaded, self._team = tier, _share_threads(loaded), Team(loaded)
        self._number = list(_tiers(loaded)).index(tier)
        self._find, self._run = loaded.celora_kernel, loaded.celora_run
        self._find.argtypes, self._find.restype = [ctypes.c_int, ctypes.c_char_p], ctypes.c_void_p
        self._run.argtypes, self._run.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int], ctypes.c_int64
        self._found: dict[str, int] = {}

    def has(self, name: str) -> bool:
        if name not in self._found and (found := self._find(self._number, name.encode())) is not None:
            self._found[name] = found
        return name in self._found

    def run(self, name: str, slots: bytes, threads: int) -> int:
        """Call a kernel that there is with its arguments, each in a slot of eight bytes; what it returns."""
        if not self.has(name):
            raise KeyError(name)
        run = self._run if self.threaded else self._team.run
        returned: int = run(self._found[name], slots, threads)
        return returned


@functools.cache
def load() -> tuple[Kernels | None, str]:
    """The kernels of the tier that is used, and why there are none or why they are not kept."""
    loaded, reason = build_and_load()
    if loaded is None:
        return None, reason
    there, asked = offered(loaded), os.environ.get("CELORA_KERNELS", "")
    if not there:
        return None, "this CPU lacks SSE4.2"
    if asked in ("", "1"):
        return Kernels(loaded, there[-1]), reason
    if asked in there:
        return Kernels(loaded, asked), reason
    known = ", ".join(there)
    reason = f"CELORA_KERNELS={asked} asks for what this CPU or system lacks; it offers {known}"
    if asked not in NAMES:
        reason = f"CELORA_KERNELS={asked} is no tier; this CPU offers {known}, and plain turns them off"
    warnings.warn(f"celora: {reason}. torch's operators are used.", stacklevel=2)
    return None, reason


def why_not() -> str:
    """Why there are none, or ''."""
    loaded, reason = load()
    return "" if loaded is not None else reason


def why_not_kept() -> str:
    """Why each process compiles them anew, where it does, or ''."""
    loaded, reason = load()
    return "" if loaded is None else reason


def why_this() -> str:
    """The tier that is used, and why it is this one; '' without."""
    loaded, _ = load()
    library, _ = build_and_load()
    if loaded is None or library is None:
        return ""
    asked = os.environ.get("CELORA_KERNELS", "")
    why = f"the newest of {', '.join(offered(library))}" if asked in ("", "1") else f"CELORA_KERNELS={asked}"
    return f"{loaded.tier} ({why})" + ("" if loaded.threaded else ", on Python's threads: torch has no OpenMP to share")


def offered(loaded: ctypes.CDLL) -> list[str]:
    """The tiers of the library that CPU and operating system offer, the lowest first."""
    # Where oneDNN is kept from matrix instructions, so are the kernels.
    return [name for name, there in _tiers(loaded).items() if there and (name != "amx" or cpu.matrix_instructions())]


def _tiers(loaded: ctypes.CDLL) -> dict[str, bool]:
    """All tiers of the library, the lowest first, and whether CPU and operating system offer them."""
    loaded.celora_tier.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int)]
    loaded.celora_tier.restype = ctypes.c_char_p
    found: dict[str, bool] = {}
    there = ctypes.c_int()
    while (name := loaded.celora_tier(len(found), ctypes.byref(there))) is not None:
        found[name.decode()] = bool(there.value)
    return found


def _share_threads(loaded: ctypes.CDLL) -> bool:
    """Let the kernels run on the threads of the OpenMP runtime that torch has loaded; whether there is one."""
    found: list[int | None] = []
    for file in _RUNTIMES:
        with_runtime = Path(torch.__file__).parent / "lib" / file
        if with_runtime.is_file():
            found = _functions(str(with_runtime))  # loaded already; its symbols include those of what it loads
            if sys.platform == "linux":  # what was preloaded comes first for torch's library, too
                found = _functions(None) or found
    loaded.celora_use_runtime((ctypes.c_void_p * len(_FUNCTIONS))(*found))
    return bool(found)


def _functions(file: str | None) -> list[int | None]:
    """An OpenMP runtime's functions in this library, or in all that the process shares; [] if it lacks one."""
    library = ctypes.CDLL(file)
    functions = (getattr(library, name, None) for name in _FUNCTIONS)
    found = [ctypes.cast(f, ctypes.c_void_p).value if f else None for f in functions]
    return found if None not in found[-2:] and (None not in found[:2] or None not in found[2:6]) else []
