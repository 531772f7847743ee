"""Find the compiled kernels: they came with the package, or are built once and kept where only the user can write."""

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
import warnings
from pathlib import Path

from celora.files import sync
from celora.kernels.c import compiling
from celora.kernels.c.compiling import FLAGS, SOURCES, compile_library, tiers
from celora.machine.cache import cache_folder, trusted

_COMPILERS = ("cc", "gcc", "clang")
OFF = ("0", "plain")


@functools.cache
def build_and_load() -> tuple[ctypes.CDLL | None, str]:
    """The library, and why there is none or why it is not kept."""
    asked = os.environ.get("CELORA_KERNELS")
    if asked in OFF:
        return None, f"CELORA_KERNELS={asked} turns them off"
    came, damaged = _packaged()
    if came is not None:
        return came, ""
    if sys.platform == "win32":
        return None, damaged or "they are not built on Windows, and this installation brought none"
    reason = damaged or f"no C compiler ({', '.join(_COMPILERS)}) is installed"
    for compiler in filter(None, map(shutil.which, _COMPILERS)):
        for folder in (_cache, _private):
            try:
                return _built(compiler, folder()), "" if folder is _cache else reason
            except subprocess.SubprocessError as failure:
                reason = f"{compiler} could not build them: {compiling.reason(failure)}"
                break  # nor could it elsewhere
            except (OSError, RuntimeError) as error:  # no home folder, one that cannot be used, or a full disk
                reason = f"they could not be kept or loaded: {' '.join(str(error).split())}"
    return None, reason


def _packaged() -> tuple[ctypes.CDLL | None, str]:
    """The library of a wheel, whose name says its content; what is wrong if it cannot be loaded, which is said once."""
    damaged = ""
    for file in SOURCES.glob("compiled/kernels-*.*"):  # in a folder: it is no module of Python's
        try:
            if hashlib.sha256(file.read_bytes()).hexdigest()[:16] == file.stem.partition("-")[2]:
                return _open(file), ""
            damaged = f"{file} is damaged: install celora again"
        except OSError as error:
            damaged = f"{file} cannot be loaded: {' '.join(str(error).split())}"
        warnings.warn(f"celora: {damaged}. Without it, the kernels are compiled here, if possible.", stacklevel=2)
    return None, damaged


def _open(file: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(file))
    if not hasattr(loaded, "celora_tier"):
        raise OSError(f"{file} is another library")
    return loaded


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
    system, architecture = platform.system(), platform.machine()
    real = Path(compiler).resolve()
    version = f"{real} {real.stat().st_size} {real.stat().st_mtime_ns}"  # a newer one may know more instructions
    made_of = [
        *(file.read_text(encoding="utf-8") for file in sorted(SOURCES.glob("*.[ch]"))),
        *(version, system, architecture, *FLAGS, str(tiers(architecture, system))),
    ]
    made = folder / f"kernels-{hashlib.sha256('|'.join(made_of).encode()).hexdigest()[:16]}.so"
    if made.is_file() and trusted(made):
        with contextlib.suppress(OSError):  # damaged: it is made anew
            return _open(made)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / made.name
        compile_library([compiler], built, architecture=architecture, system=system)
        built.chmod(0o755)
        sync(built)  # half a library ends the process that calls it
        built.replace(made)
    return _open(made)
