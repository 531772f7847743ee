"""The kernels of other CPUs. A C program compares them with formulas, in an emulator if there is one."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from celora.kernels.c import compiling
from celora.kernels.c.build import _COMPILERS
from tiers import LIBRARY, TIERS

SOURCE = Path(__file__).with_name("other_cpu.c")
FLAGS = ("-std=gnu11", "-O1", "-ffp-contract=off")  # each operation is rounded on its own
HERE = next(filter(None, map(shutil.which, _COMPILERS)), None)
ARM, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")


def compiled(compiler: str, folder: Path) -> Path:
    program = folder / "other_cpu"
    subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(program), "-lm", "-ldl"], check=True)
    return program


def tried(*command: object) -> list[str]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.partition(":")[0].partition(",")[0] for line in done.stdout.splitlines()]


@pytest.mark.skipif(not TIERS or platform.system() != "Linux" or HERE is None, reason="no compiled kernels")
def test_the_program_agrees_with_this_cpu(tmp_path: Path) -> None:
    """This CPU's kernels, which other tests check, pass what the program asks of another CPU's kernels."""
    assert HERE is not None
    assert LIBRARY is not None
    program, library = compiled(HERE, tmp_path), LIBRARY._name
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
    return compiled(ARM, folder), folder / "kernels.so"


@pytest.mark.skipif(ARM is None or EMULATOR is None, reason="no compiler for ARM, or no emulator")
@pytest.mark.parametrize(
    ("cpu", "tiers"),
    [("cortex-a72", ["neon"]), ("neoverse-n1", ["neon", "dotprod"]), ("max", ["neon", "dotprod", "i8mm"])],
)
def test_arm(cpu: str, tiers: list[str], on_arm: tuple[Path, Path]) -> None:
    assert tried(EMULATOR, "-cpu", cpu, "-L", "/usr/aarch64-linux-gnu", *on_arm, *tiers) == tiers
