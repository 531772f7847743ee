"""Build the C kernels for this machine once, and keep them where only the user can write."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from celora.files import sync
from celora.machine.cache import cache_folder, trusted
from celora.machine.cpu import instruction_set

_SOURCE = Path(__file__).with_name("rows.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_COMPILERS = ("cc", "gcc", "clang")
_WIDE = "-mprefer-vector-width=512"


def why_not() -> str:
    """Why `library` is None, or ''."""
    loaded, reason = build_and_load()
    return "" if loaded is not None else reason


def why_not_kept() -> str:
    """Why each process compiles them anew, where it does, or ''."""
    loaded, reason = build_and_load()
    return "" if loaded is None else reason


@functools.cache
def build_and_load() -> tuple[ctypes.CDLL | None, str]:
    """The library, and why there is none or why it is not kept."""
    if os.environ.get("CELORA_KERNELS") == "0":
        return None, "CELORA_KERNELS=0 turns them off"
    if sys.platform == "win32":
        return None, "they are not built on Windows"
    reason = f"no C compiler ({', '.join(_COMPILERS)}) is installed"
    for compiler in filter(None, map(shutil.which, _COMPILERS)):
        for folder in (_cache, _private):
            try:
                return _built(compiler, folder()), "" if folder is _cache else reason
            except subprocess.SubprocessError:
                reason = f"{compiler} could not build them"
                break  # nor could it elsewhere
            except (OSError, RuntimeError) as error:  # no home folder, one that cannot be used, or a full disk
                reason = f"they could not be kept or loaded: {' '.join(str(error).split())}"
    return None, reason


def _cache() -> Path:
    """The user's folder for what is compiled; OSError where others could put a library there."""
    return cache_folder("kernels")


@functools.cache
def _private() -> Path:
    """A folder for this process alone."""
    folder = Path(tempfile.mkdtemp(prefix="celora-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _built(compiler: str, folder: Path) -> ctypes.CDLL:
    """Load what `folder` has, or compile into it, under a name that says what it was made of and for."""
    made_of = [
        *(file.read_text(encoding="utf-8") for file in sorted(_SOURCE.parent.glob("*.c"))),
        compiler,
        platform.machine(),
        instruction_set(),  # what -march=native would see: a home folder may be shared by machines that differ
        *_FLAGS,
    ]
    made = folder / f"rows-{hashlib.sha256('|'.join(made_of).encode()).hexdigest()[:16]}.so"
    if made.is_file() and trusted(made):
        with contextlib.suppress(OSError):  # damaged: it is made anew
            return ctypes.CDLL(str(made))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / made.name
        # Not every compiler knows the wide registers' option, or has an assembler that knows tiles.
        for flags in ((*_FLAGS, _WIDE), _FLAGS, (*_FLAGS, "-DNO_TILES")):
            done = subprocess.run(
                [compiler, *flags, "-o", str(built), str(_SOURCE)], capture_output=True, timeout=120, check=False
            )
            if done.returncode == 0:
                break
        done.check_returncode()
        built.chmod(0o755)
        sync(built)  # half a library ends the process that calls it
        built.replace(made)
    return ctypes.CDLL(str(made))
