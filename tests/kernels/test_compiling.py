"""Each tier's instructions are in its own unit, and nowhere else."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from celora.kernels.c import compiling
from celora.kernels.c.build import _COMPILERS

COMPILER = next(filter(None, map(shutil.which, _COMPILERS)), None)
SYSTEM, ARCHITECTURE = platform.system(), platform.machine()
ELSEWHERE = {("x86_64", "Linux"): "amx", ("AMD64", "Windows"): "avx512", ("arm64", "Darwin"): "i8mm"}


def test_tiers_of_other_machines() -> None:
    for (architecture, system), newest in ELSEWHERE.items():
        assert list(compiling.tiers(architecture, system))[-1] == newest
    assert compiling.tiers("riscv64", "Linux") == {"baseline": ()}
    assert set(compiling.NAMES) >= {"baseline", "avx2", "avxvnni", "avx512", "amx", "neon", "dotprod", "i8mm"}


@pytest.mark.skipif(COMPILER is None or shutil.which("objdump") is None, reason="no C compiler, or no objdump")
@pytest.mark.skipif(ARCHITECTURE != "x86_64", reason="looks for instructions of x86")
def test_the_lowest_and_the_shared_unit_have_no_newer_instructions(tmp_path: Path) -> None:
    units = {"rows.c": ("-DTIER=baseline", *compiling.tiers(ARCHITECTURE, SYSTEM)["baseline"])}
    units["tiers.c"] = ("-DTIERS=TIER(baseline)",)
    newer = re.compile(r"\t(v(?!err|erw|m)\w+|t(?:ile|dp)\w+)\s|%[yz]mm|%k[0-7]|%tmm")
    for source, own in units.items():
        unit = tmp_path / f"{source}.o"
        command = [COMPILER, *compiling.FLAGS, "-fPIC", *own, "-c", str(compiling.SOURCES / source), "-o", str(unit)]
        subprocess.run(command, check=True)
        shown = subprocess.run(["objdump", "-d", unit], capture_output=True, text=True, check=True).stdout
        assert shown.count("\n") > 100
        assert [line for line in shown.splitlines() if newer.search(line)] == []
    assert newer.search("\tvpaddd %ymm0,%ymm1,%ymm2")


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_a_tier_that_the_compiler_does_not_know_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = list(compiling.tiers(ARCHITECTURE, SYSTEM))[-1]
    lowest = next(iter(compiling.tiers(ARCHITECTURE, SYSTEM)))
    known = {lowest: ("-O0",), newest: ("-mno-such-instruction",)}
    monkeypatch.setattr(compiling, "tiers", lambda architecture, system: known)
    made, machine = tmp_path / "kernels.so", {"architecture": ARCHITECTURE, "system": SYSTEM}
    assert compiling.compile_library([COMPILER], made, **machine) == [lowest]
    assert made.stat().st_size > 1000
    known[lowest] = known[newest]
    with pytest.raises(subprocess.CalledProcessError) as failed:
        compiling.compile_library([COMPILER], made, **machine)
    assert "-mno-such-instruction" in compiling.reason(failed.value)
    assert "\n" not in compiling.reason(failed.value)
    monkeypatch.setattr(compiling, "_SECONDS", 0)
    with pytest.raises(subprocess.TimeoutExpired) as late:
        compiling.compile_library([sys.executable, "-c", "import time; time.sleep(600)"], made, **machine)
    assert compiling.reason(late.value) == "it took longer than 0 s"
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.so"]
