"""Compile the kernels: `rows.c` once for each tier of instructions, with the tier's flags, and one library of them all.

No other flags may differ, and `tiers.c` gets none of them: a newer instruction outside its tier ends the process on an
older CPU. Standard library only, as a wheel is built without celora's dependencies.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden")
_AVX2 = ("-mavx2", "-mfma")
_VNNI = (*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512")
_X86 = {
    "baseline": ("-msse4.2", "-mpopcnt"),
    "avx2": _AVX2,
    "avxvnni": (*_AVX2, "-mavxvnni"),
    "avx512vnni": _VNNI,
    "avx512": (*_VNNI, "-mavx512bf16"),
    "amx": (*_VNNI, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
}
_ARM = {
    "neon": (),
    "dotprod": ("-mcpu=generic+dotprod",),
    "i8mm": ("-mcpu=generic+dotprod+i8mm",),
}
NAMES = tuple(dict.fromkeys((*_X86, *_ARM)))
_SECONDS = 600  # on a busy machine, zig takes more than two minutes to link its first library for Windows


def tiers(architecture: str, system: str) -> dict[str, tuple[str, ...]]:
    """The tiers of an architecture, the lowest first, with their flags. `system`: Linux, Darwin or Windows."""
    if architecture.lower() in ("x86_64", "amd64"):
        return {name: flags for name, flags in _X86.items() if name != "amx" or system == "Linux"}
    if architecture.lower() in ("aarch64", "arm64"):
        return dict(_ARM)
    return {"baseline": ()}


def compile_library(compiler: Sequence[str], library: Path, *, architecture: str, system: str) -> list[str]:
    """Compile into the file `library`. Returns the tiers that the compiler knew; it must know the lowest.

    Raises:
        subprocess.SubprocessError: it could not compile, or took minutes.
        OSError: a file could not be written.
    """
    flags = FLAGS if system == "Windows" else (*FLAGS, "-fPIC")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        units = {name: Path(folder) / f"{name}.o" for name in tiers(architecture, system)}
        commands = {
            name: [*compiler, *flags, *own, f"-DTIER={name}", "-c", str(SOURCES / "rows.c"), "-o", str(units[name])]
            for name, own in tiers(architecture, system).items()
        }
        failed = _run(list(commands.values()))
        known = [name for name, failure in zip(units, failed, strict=True) if failure is None]
        if failed[0] is not None:
            raise failed[0]
        listed, shared = "".join(f"TIER({name})" for name in known), Path(folder) / "tiers.o"
        compiled = [*compiler, *flags, f"-DTIERS={listed}", "-c", str(SOURCES / "tiers.c"), "-o", str(shared)]
        objects = [str(shared), *(str(units[name]) for name in known)]
        more = {"Linux": ["-s", "-lm"], "Windows": ["-s"]}.get(system, ["-lm"])  # -s: without symbols
        for command in (compiled, [*compiler, "-shared", "-o", str(library), *objects, *more]):
            (failure,) = _run([command])
            if failure is not None:
                raise failure
    return known


def reason(failure: Exception) -> str:
    """Why a compiler failed: in a line of its own that says so, or in few words."""
    if isinstance(failure, subprocess.TimeoutExpired):
        return f"it took longer than {_SECONDS} s"
    if not isinstance(failure, subprocess.CalledProcessError):
        return str(failure)
    lines = str(failure.stderr or f"it ended with status {failure.returncode}").strip().splitlines()
    return next((line for line in lines if "error" in line), lines[-1]).strip()


def _run(commands: Sequence[list[str]]) -> list[subprocess.SubprocessError | None]:
    """Run commands side by side: what failed, of each, and what it wrote."""
    end = time.monotonic() + _SECONDS
    found: list[subprocess.SubprocessError | None] = []
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in commands]
        running = [
            subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=f) for c, f in zip(commands, files, strict=True)
        ]
        for process, file in zip(running, files, strict=True):
            try:
                status = process.wait(timeout=max(0, end - time.monotonic()))
                file.seek(0)
                failed = subprocess.CalledProcessError(status, process.args, stderr=file.read())
                found.append(failed if status else None)
            except subprocess.TimeoutExpired as late:
                process.kill()
                process.wait()
                found.append(late)
    return found
