"""Reads descriptions of CPUs as real systems give them."""

from __future__ import annotations

import ctypes
import functools
import itertools
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from celora.machine import cpu
from patching import patch_all

ALDER_LAKE = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: 12th Gen Intel(R) Core(TM) i7-1260P
flags\t\t: fpu vme sse4_2 avx f16c avx2 bmi2 avx_vnni
vmx flags\t: vnmi avx512f
processor\t: 1
model name\t: another
"""
SAPPHIRE_RAPIDS = """model name\t: Intel(R) Xeon(R) Platinum 8481C
flags\t\t: avx2 avx512f avx512_vnni avx512_bf16 avx_vnni amx_bf16 amx_tile amx_int8
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm asimdhp asimddp sve svei8mm i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""
HIDDEN = """vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
flags\t\t: avx2 avx_vnni
"""
M2 = """hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_SME: 0
hw.optional.neon: 1
hw.optional.AdvSIMD: 1
machdep.cpu.brand_string: Apple M2
"""


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Neither the system nor torch describes the CPU."""
    patch_all(monkeypatch, "celora.machine.cpu:_CPUINFO", tmp_path / "cpuinfo")
    patch_all(monkeypatch, "celora.machine.cpu:_capabilities", dict)
    monkeypatch.setattr(cpu.platform, "processor", lambda: "")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(cpu.platform, "system", lambda: "Linux")
    for cached in (cpu.features, cpu._sysctl):
        cached.cache_clear()
    yield
    for cached in (cpu.features, cpu._sysctl):
        cached.cache_clear()


def has() -> set[str]:
    return {name for name, there in cpu.features().items() if there}


@pytest.mark.parametrize(
    ("info", "name", "found"),
    [
        (ALDER_LAKE, "12th Gen Intel(R) Core(TM) i7-1260P", {"avx2", "avx_vnni"}),
        (
            SAPPHIRE_RAPIDS,
            "Intel(R) Xeon(R) Platinum 8481C",
            {"avx2", "avx512", "vnni", "avx512_bf16", "avx_vnni", "amx_tile"},
        ),
        (HIDDEN, "AMD EPYC, family 26, model 2", {"avx2", "avx_vnni"}),
        (GRAVITON, "riscv64 0x41 0xd40", {"neon", "dotprod", "sve", "i8mm", "arm_fp16", "arm_bf16"}),
        ("", "riscv64", set()),
    ],
    ids=["x86 without AVX-512", "x86 with AMX", "x86 in a cloud that hides the model", "ARM", "another"],
)
def test_linux(info: str, name: str, found: set[str], tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(info)
    assert has() == found
    assert cpu.cpu_name() == name


def test_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> object:
        assert command[:2] == ["/usr/sbin/sysctl", "hw.optional"]
        return types.SimpleNamespace(stdout=M2)

    monkeypatch.setattr(cpu.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(subprocess, "run", run)
    assert has() == {"neon", "dotprod", "i8mm", "arm_bf16"}
    assert cpu.cpu_name() == "Apple M2"


def test_macos_in_a_sandbox_that_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> object:
        raise PermissionError("denied")

    monkeypatch.setattr(cpu.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(subprocess, "run", run)
    assert has() == set()
    assert cpu.cpu_name() == "riscv64"


@pytest.mark.parametrize(
    ("present", "found"), [({19, 43, 66}, {"neon", "dotprod", "i8mm"}), ({10, 40, 41}, {"avx2", "avx512"})]
)
def test_windows(present: set[int], found: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel32 = types.SimpleNamespace(IsProcessorFeaturePresent=lambda number: int(number in present))
    monkeypatch.setattr(ctypes, "windll", types.SimpleNamespace(kernel32=kernel32), raising=False)
    monkeypatch.setattr(cpu.platform, "system", lambda: "Windows")
    monkeypatch.setattr(cpu.platform, "processor", lambda: "ARMv8 (64-bit) Family 8")
    assert has() == found
    assert cpu.cpu_name() == "ARMv8 (64-bit) Family 8"


def test_what_torch_finds_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, for example, does not report VNNI."""
    patch_all(
        monkeypatch,
        "celora.machine.cpu:_capabilities",
        lambda: {"avx512_vnni": True, "avx2": False, "l1d_cache_size": 32768},
    )
    assert has() == {"vnni"}


@pytest.mark.parametrize(
    ("limit", "used"), [(None, True), ("ALL", True), ("avx512_core_amx_fp16", True), ("AVX512_CORE_BF16", False)]
)
def test_matrix_instructions(limit: str | None, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN may be limited to fewer instructions than the CPU has. It never uses more than that."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    for there, permitted in itertools.product((True, False), repeat=2):
        patch_all(monkeypatch, "celora.machine.cpu:features", functools.cache(lambda there=there: {"amx_tile": there}))
        patch_all(monkeypatch, "celora.machine.cpu:_tiles_are_permitted", lambda permitted=permitted: permitted)
        assert cpu.matrix_instructions.__wrapped__() is (there and permitted and used)


@pytest.mark.parametrize("answer", [True, False])
def test_an_old_linux_forbids_tiles(answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU lists them all the same. Only Linux has to be asked."""
    monkeypatch.setattr(cpu, "borrow", lambda name: lambda: answer)
    for system in ("Linux", "Windows"):
        monkeypatch.setattr(cpu.platform, "system", lambda system=system: system)
        assert cpu._tiles_are_permitted() is (answer or system == "Windows")


@pytest.mark.parametrize(
    ("flags", "limit", "bfloat16", "float16"),
    [
        ("avx2 avx_vnni", "", False, False),
        ("avx512f avx512_vnni", "", False, False),
        ("avx512f avx512_bf16", "", True, False),
        ("avx512f avx512_bf16 avx512_fp16 amx_tile", "", True, True),
        ("avx512f avx512_bf16 avx512_fp16 amx_tile", "DEFAULT", True, True),
        ("avx512f avx512_bf16 avx512_fp16 amx_tile", "avx512_core_amx", True, True),
        ("avx512f avx512_bf16 avx512_fp16 amx_tile", "AVX512_CORE_FP16", True, True),
        ("avx512f avx512_bf16 avx512_fp16 amx_tile", "AVX512_CORE_BF16", True, False),
        ("avx512f avx512_bf16 avx512_fp16 amx_tile", "AVX512_CORE_VNNI", False, False),
        ("avx512f avx512_bf16 avx512_fp16 amx_tile", "AVX2", False, False),
        ("avx512f avx512_bf16 avx512_fp16 amx_tile", "AVX10_1_512", True, True),
        ("", "", True, True),
        ("asimd asimddp", "", False, False),
        ("asimd asimddp fphp asimdhp", "", False, True),
        ("asimd asimddp fphp asimdhp i8mm bf16", "", True, True),
    ],
)
def test_which_dtypes_a_cpu_multiplies(
    flags: str, limit: str, bfloat16: bool, float16: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    assert cpu.multiplies.__wrapped__(torch.bfloat16) is bfloat16
    assert cpu.multiplies.__wrapped__(torch.float16) is float16


@pytest.mark.parametrize(
    ("family", "flags", "limit", "mkl", "wider"),
    [
        (26, "avx2 avx512f", "", True, True),
        (26, "avx2 avx512f", "AVX512_CORE", True, True),
        (26, "avx2 avx512f", "AVX2", True, False),
        (26, "avx2 avx512f", "", False, False),
        (26, "avx2", "", True, False),
        (25, "avx2 avx512f", "", True, False),
    ],
    ids=["Zen 5", "AVX-512 allowed", "kept to AVX2", "torch without MKL", "no AVX-512", "Zen 4"],
)
def test_where_onednn_is_wider_than_mkl(
    family: int, flags: str, limit: str, mkl: bool, wider: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    described = f"vendor_id\t: AuthenticAMD\ncpu family\t: {family}\nflags\t\t: {flags}\n"
    (tmp_path / "cpuinfo").write_text(described)
    assert cpu.wider_than_mkl.__wrapped__() is wider
    (tmp_path / "cpuinfo").write_text(described.replace("AuthenticAMD", "GenuineIntel"))
    assert cpu.wider_than_mkl.__wrapped__() is False


def test_the_family_that_windows_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, family in (
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", 26),
        ("Intel64 Family 6 Model 183 Stepping 1, GenuineIntel", None),
        ("", None),
    ):
        monkeypatch.setattr(cpu.platform, "processor", lambda said=said: said)
        assert cpu._amd_family() == family
