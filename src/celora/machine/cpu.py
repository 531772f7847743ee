"""The name of this CPU, and the instructions it has that decide about speed here: Linux, macOS, Windows."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from celora.borrowed import borrow

_CPUINFO = Path("/proc/cpuinfo")
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "CELORA_KERNELS")


@dataclass(frozen=True)
class _Names:
    """One feature's names: Linux's flag, macOS's sysctl, Windows' number and torch's capability."""

    linux: str
    torch: str
    macos: tuple[str, ...] = ()
    windows: int | None = None


X86 = {
    "avx2": _Names("avx2", "avx2", ("hw.optional.avx2_0",), 40),
    "avx512": _Names("avx512f", "avx512_f", ("hw.optional.avx512f",), 41),
    "avx512_bf16": _Names("avx512_bf16", "avx512_bf16"),
    "avx512_fp16": _Names("avx512_fp16", "avx512_fp16"),
    "vnni": _Names("avx512_vnni", "avx512_vnni", ("hw.optional.avx512vnni",)),
    "avx_vnni": _Names("avx_vnni", "avx_vnni"),
    "amx_tile": _Names("amx_tile", "amx_tile"),
}
ARM = {
    "neon": _Names("asimd", "neon", ("hw.optional.AdvSIMD", "hw.optional.neon"), 19),
    "dotprod": _Names("asimddp", "dot", ("hw.optional.arm.FEAT_DotProd",), 43),
    "i8mm": _Names("i8mm", "i8mm", ("hw.optional.arm.FEAT_I8MM",), 66),
    "arm_fp16": _Names("asimdhp", "fp16_arith", ("hw.optional.arm.FEAT_FP16",), 67),
    "arm_bf16": _Names("bf16", "bf16", ("hw.optional.arm.FEAT_BF16",), 68),
    "sve": _Names("sve", "sve", ("hw.optional.arm.FEAT_SVE",), 46),
}


@functools.cache
def features() -> dict[str, bool]:
    """Whether this CPU has each of the features in `X86` and `ARM`, by what the system or torch says."""
    flags, reported, capabilities = set(instruction_set().split()), _sysctl(), _capabilities()
    return {
        name: names.linux in flags
        or any(reported.get(key) == "1" for key in names.macos)
        or _windows_has(names.windows)
        or bool(capabilities.get(names.torch))
        for name, names in (X86 | ARM).items()
    }


def limits() -> dict[str, str]:
    """The variables of the environment that keep torch, its libraries or celora from instructions of this CPU."""
    return {name: value for name in _LIMITS if (value := os.environ.get(name)) is not None}


def cpu_name() -> str:
    """The CPU's own name, or its architecture. Clouds hide the model in the name, so its numbers follow such a name."""
    named = _line("model name") or _sysctl().get("machdep.cpu.brand_string")
    if named and not re.search(r"\d", named.partition("@")[0]) and (family := _line("cpu family")):
        named = f"{named}, family {family}, model {_line('model')}"
    if not named and (part := _line("CPU part")):  # Linux on ARM has numbers instead of a name
        named = f"{platform.machine()} {_line('CPU implementer')} {part}"
    return named or platform.processor() or platform.machine()


def instruction_set() -> str:
    """All that Linux lists as this CPU's flags; elsewhere what the system calls the processor."""
    return _line("flags") or _line("Features") or platform.processor()


def _line(name: str) -> str:
    """What stands behind `name` in Linux's description of the first CPU, or ''."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


@functools.cache
def _sysctl() -> dict[str, str]:
    """What macOS says of the CPU; nothing elsewhere."""
    if platform.system() != "Darwin":
        return {}
    command = ["/usr/sbin/sysctl", "hw.optional", "machdep.cpu.brand_string"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in done.stdout.splitlines())}


def _windows_has(number: int | None) -> bool:
    if platform.system() != "Windows" or number is None:
        return False
    return bool(vars(ctypes)["windll"].kernel32.IsProcessorFeaturePresent(number))


def _capabilities() -> dict[str, Any]:
    """The features that torch's own library finds, in versions of torch that tell."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


@functools.cache  # oneDNN looks once, too
def matrix_instructions() -> bool:
    """Whether oneDNN multiplies with AMX: this CPU has it, and neither Linux nor `ONEDNN_MAX_CPU_ISA` forbids it."""
    return features()["amx_tile"] and _tiles_are_permitted() and _onednn_may("AMX")


def _tiles_are_permitted() -> bool:
    """Whether Linux lets this process use tiles. One before 5.16 does not, whatever the CPU has."""
    ask = borrow("torch.cpu:_init_amx") if platform.system() == "Linux" else None
    return ask is None or bool(ask())


@functools.cache
def wider_than_mkl() -> bool:
    """Whether oneDNN multiplies float32 with AVX-512 that does twice as much in a cycle as the AVX2 that MKL takes.

    MKL takes AVX2 on every CPU of AMD's. Family 26 (Zen 5) is the first one where AVX-512 is faster than that. This is
    a rule and not a timing, so that a run has the same bits each time.
    """
    return torch.backends.mkl.is_available() and _amd_family() == 26 and features()["avx512"] and _onednn_may("512")


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of bfloat16 or float16, and oneDNN may use them.

    Without them torch takes five times as long as in float32 with AVX-512, and up to five hundred times with AVX2.
    """
    has = features()
    if not (_line("flags") or _line("Features") or _sysctl() or _capabilities()):
        return True  # nothing tells, so what torch does stays
    if dtype == torch.bfloat16:
        return has["arm_bf16"] or (
            (has["avx512_bf16"] or has["amx_tile"]) and _onednn_may("BF16", "FP16", "AMX", "AVX10")
        )
    return has["arm_fp16"] or (has["avx512_fp16"] and _onednn_may("FP16", "AMX", "AVX10"))


def _onednn_may(*instructions: str) -> bool:
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return limit in ("", "ALL", "DEFAULT") or any(name in limit for name in instructions)


def _amd_family() -> int | None:
    """The family of a CPU of AMD's; None for others, and where the system does not tell."""
    if vendor := _line("vendor_id"):
        return int(_line("cpu family") or 0) if vendor == "AuthenticAMD" else None
    named = re.search(r"Family (\d+) .*AuthenticAMD", platform.processor())  # as Windows calls it
    return int(named[1]) if named else None
