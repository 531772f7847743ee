"""The kernels of other CPUs. A C program compares them with formulas, in an emulator if there is one."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from celora.kernels.c import compiling
from celora.kernels.c.build import _COMPILERS
from tiers import LIBRARY, TIERS

SOURCE = Path(__file__).with_name("other_cpu.c")
FLAGS = ("-std=gnu11", "-O1", "-ffp-contract=off")  # each operation is rounded on its own
HERE = next(filter(None, map(shutil.which, _COMPILERS)), None)
ARM, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
WINE = shutil.which("wine")
DISASSEMBLER = shutil.which("aarch64-linux-gnu-objdump")
ZIG = [sys.executable, "-m", "ziglang", "cc"]


def compiled(compiler: list[str], program: Path, *libraries: str) -> Path:
    subprocess.run([*compiler, *FLAGS, str(SOURCE), "-o", str(program), *libraries], check=True)
    return program


def tried(*command: object, **environment: str) -> list[str]:
    done = subprocess.run(
        [str(part) for part in command], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.partition(":")[0].partition(",")[0] for line in done.stdout.splitlines()]


@pytest.mark.skipif(not TIERS or platform.system() != "Linux" or HERE is None, reason="no compiled kernels")
def test_the_program_agrees_with_this_cpu(tmp_path: Path) -> None:
    """This CPU's kernels, which other tests check, pass what the program asks of another CPU's kernels."""
    assert HERE is not None
    assert LIBRARY is not None
    program, library = compiled([HERE], tmp_path / "other_cpu", "-lm", "-ldl"), LIBRARY._name
    found = tried(program, library, *TIERS)
    assert found[: len(TIERS)] == TIERS
    assert found[len(TIERS) :] in ([], ["amx"])  # celora leaves it out where oneDNN is kept from matrix instructions
    lacking = subprocess.run([program, library, "sse9"], capture_output=True, text=True, check=False)
    assert (lacking.returncode, lacking.stdout.splitlines()[-1]) == (1, "tier sse9 is not offered")


@pytest.fixture(scope="module")
def on_arm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    assert ARM is not None
    folder = tmp_path_factory.mktemp("arm")
    compiling.compile_library([ARM], folder / "kernels.so", architecture="aarch64", system="Linux")
    return compiled([ARM], folder / "other_cpu", "-lm", "-ldl"), folder / "kernels.so"


@pytest.mark.skipif(ARM is None or EMULATOR is None, reason="no compiler for ARM, or no emulator")
@pytest.mark.parametrize(
    ("cpu", "tiers"),
    [("cortex-a72", ["neon"]), ("neoverse-n1", ["neon", "dotprod"]), ("max", ["neon", "dotprod", "i8mm"])],
)
def test_arm(cpu: str, tiers: list[str], on_arm: tuple[Path, Path]) -> None:
    assert tried(EMULATOR, "-cpu", cpu, "-L", "/usr/aarch64-linux-gnu", *on_arm, *tiers) == tiers


def inner_loops(library: Path) -> list[list[str]]:
    """The instructions of each loop that has none in it. A loop ends with a branch to where it begins."""
    said = subprocess.run(
        [str(DISASSEMBLER), "-d", "--no-show-raw-insn", library], capture_output=True, check=True
    ).stdout
    lines = re.findall(r"^ *([0-9a-f]+):\s+(\S+)(.*)", said.decode(), re.MULTILINE)
    numbers = {int(place, 16): number for number, (place, _, _) in enumerate(lines)}
    found: list[list[str]] = []
    last = -1  # where the last loop began
    for end, (_, instruction, arguments) in enumerate(lines):
        target = re.search(r"(?:^\s*|, )(?:0x)?([0-9a-f]+)(?: <|$)", arguments)
        if target is None or not instruction.startswith(("b.", "cb", "tb")):
            continue
        begin = numbers.get(int(target[1], 16), end + 1)
        if begin <= end and begin > last:
            found.append([instruction for _, instruction, _ in lines[begin : end + 1]])
            last = begin
    return found


def check_loops(library: Path) -> None:
    """1,024 products of 8 rows and 8 columns: within 1.3 of the products and the loads of 16 bytes that they need."""
    loops = inner_loops(library)
    for product, count in (("sdot", 64), ("smmla", 32)):
        found = [len(loop) for loop in loops if loop.count(product) == count]
        assert found
        assert max(found) <= 1.3 * (count + 16)


@pytest.mark.skipif(ARM is None or DISASSEMBLER is None, reason="no compiler or tools for ARM")
def test_inner_loops_of_arm_have_few_instructions(on_arm: tuple[Path, Path]) -> None:
    check_loops(on_arm[1])


@pytest.mark.slow
@pytest.mark.skipif(
    DISASSEMBLER is None or importlib.util.find_spec("ziglang") is None, reason="no ziglang, or no tools"
)
def test_inner_loops_of_arms_wheel_have_few_instructions(tmp_path: Path) -> None:
    library, compiler = tmp_path / "kernels.so", [*ZIG, "-target", "aarch64-linux-gnu.2.28"]
    compiling.compile_library(compiler, library, architecture="aarch64", system="Linux")
    check_loops(library)


@pytest.mark.slow
@pytest.mark.skipif(WINE is None or importlib.util.find_spec("ziglang") is None, reason="no Wine, or no ziglang")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="Wine runs programs for this CPU")
def test_windows(tmp_path: Path) -> None:
    """The library of the wheel for Windows, under Wine."""
    library, compiler = tmp_path / "kernels.dll", [*ZIG, "-target", "x86_64-windows-gnu"]
    tiers = compiling.compile_library(compiler, library, architecture="x86_64", system="Windows")
    program = compiled(compiler, tmp_path / "other_cpu.exe")
    found = tried(WINE, program, library, "baseline", WINEPREFIX=str(tmp_path / "wine"), WINEDEBUG="-all")
    assert found == [tier for tier in tiers if tier in (*TIERS, "baseline")]
