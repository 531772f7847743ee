"""Which wheels for Linux may be published."""

from __future__ import annotations

import platform
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

import check_wheels
from celora.kernels.c.build import _COMPILERS

COMPILER = next(filter(None, map(shutil.which, _COMPILERS)), None)
FUNCTIONS = ("tier", "kernel", "use_runtime", "run_part", "run")
pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or COMPILER is None or shutil.which("readelf") is None,
    reason="needs a compiler for Linux, and readelf",
)


def wheel(folder: Path, source: str, *more: str, promises: int = 28) -> Path:
    """A wheel whose library of kernels is compiled from this."""
    library, file = folder / "kernels-0.so", folder / f"celora-1-py3-none-manylinux_2_{promises}_x86_64.whl"
    assert COMPILER is not None
    command = [COMPILER, "-x", "c", "-", "-x", "none", "-shared", "-fPIC", "-o", str(library), *more]
    subprocess.run(command, input=source, text=True, check=True)
    with zipfile.ZipFile(file, "w") as content:
        content.write(library, f"celora/kernels/c/compiled/{library.name}")
    return file


def functions(*names: str) -> str:
    return "".join(f"int celora_{name}(void) {{ return 1; }}\n" for name in names)


def test_a_wheel_that_keeps_its_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = wheel(tmp_path, functions(*FUNCTIONS))
    assert check_wheels.main([str(good)]) == 0
    assert capsys.readouterr().out == f"{good}: as promised\n"
    assert check_wheels.main([]) == 1


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uses_glibc = "#include <stdlib.h>\nvoid *celora_run(void) { return malloc(1); }\n" + functions(*FUNCTIONS[:4])
    old = wheel(tmp_path, uses_glibc, promises=1)
    assert check_wheels.main([str(old)]) == 1
    assert "it needs glibc 2." in capsys.readouterr().out
    assert check_wheels.faults(wheel(tmp_path, functions(*FUNCTIONS, "more"))) == [
        "it shows celora_kernel, celora_more, celora_run, celora_run_part, celora_tier, celora_use_runtime"
    ]
    assert check_wheels.faults(wheel(tmp_path, "static int none;")) == ["it shows nothing"]
    shutil.copy(tmp_path / "kernels-0.so", tmp_path / "libmine.so")
    needs = wheel(tmp_path, functions(*FUNCTIONS), "-Wl,--no-as-needed", f"-L{tmp_path}", "-lmine")
    assert check_wheels.faults(needs) == ["it needs libmine.so"]


def test_what_is_no_such_wheel(tmp_path: Path) -> None:
    file = tmp_path / "celora-1-py3-none-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(file, "w"):
        pass
    assert check_wheels.faults(file) == ["it has 0 libraries of kernels"]
    assert check_wheels.faults(tmp_path / "celora-1-py3-none-linux_x86_64.whl") == [
        "its name promises no version of glibc"
    ]
