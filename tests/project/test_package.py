"""The wheel: built, installed into an environment of its own, and whole."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import check_wheels
from forked import code, run

ROOT = Path(__file__).parents[2]


def _run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _wheel(folder: Path, **environment: str) -> Path:
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", ".", **environment)
    (wheel,) = (folder / "dist").iterdir()
    return wheel


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    """A compiler that does not optimise. It is six times as fast, and these tests compute nothing."""
    works = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if works is None:
        pytest.skip("no C compiler")
    (tmp_path / "cc").write_text(f'#!/bin/sh\nexec "{works}" "$@" -O0\n')
    (tmp_path / "cc").chmod(0o755)
    return str(tmp_path / "cc")


def test_the_source_distribution_is_the_repository(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("this is no repository")
    _run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ".")
    (file,) = tmp_path.iterdir()
    with tarfile.open(file) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert set(tracked) - names == set()
    assert {name.partition("/")[0] for name in names - {"", "PKG-INFO"}} <= {name.partition("/")[0] for name in tracked}


def test_the_wheel_installs_elsewhere_and_contains_everything(compiler: str, tmp_path: Path) -> None:
    wheel = _wheel(tmp_path, CELORA_CC=compiler)
    assert wheel.stat().st_size < 2 * 2**20
    assert re.fullmatch(r"celora-[\w.]+-py3-none-(manylinux_2_\d\d|linux|macosx_11_0|win)_\w+\.whl", wheel.name)
    if "-manylinux_" in wheel.name and shutil.which("readelf"):
        assert check_wheels.faults(wheel) == []
    _run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python"]
    _run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)

    # The dependencies come from this environment; celora itself must not, or the wheel would not be tested.
    script = """
import importlib, importlib.util, json, pathlib, pkgutil, celora
root = pathlib.Path(celora.__file__).parent
needs = {"celora.kernels.triton.jitted": "triton", "celora.integrations.axolotl": "axolotl"}
for module in pkgutil.walk_packages([str(root)], "celora."):
    if importlib.util.find_spec(needs.get(module.name, "celora")):
        importlib.import_module(module.name)
files = [str(p.relative_to(root)) for p in root.rglob("*") if "__pycache__" not in p.parts]
print(json.dumps([str(root), sorted(files)]))
"""
    installed, files = json.loads(
        _run(scripts / "python", "-c", script, PYTHONPATH=sysconfig.get_path("purelib")).splitlines()[-1]
    )
    assert Path(installed).is_relative_to(tmp_path)
    source = ROOT / "src" / "celora"
    (library,) = (file for file in files if Path(file).name.startswith("kernels-"))
    files = [file for file in files if file not in (library, str(Path(library).parent))]
    assert files == sorted(str(p.relative_to(source)) for p in source.rglob("*") if "__pycache__" not in p.parts)
    loads = "from celora.kernels.c.build import build_and_load; print(build_and_load()[0]._name)"
    installed_in = {"PYTHONPATH": sysconfig.get_path("purelib"), "PATH": str(scripts), "HOME": str(tmp_path / "home")}
    assert _run(scripts / "python", "-c", loads, CELORA_KERNELS="", **installed_in).strip().endswith(library)
    assert not (tmp_path / "home").exists()  # no compiler has run
    version = _run(scripts / "celora", "--version", PYTHONPATH=sysconfig.get_path("purelib"))
    assert version.startswith("celora 0.1")


def test_a_wheel_without_kernels_is_for_every_platform(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path, CELORA_WHEEL_PLATFORM="any")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "kernels-" in name]


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], dict[str, Any]]:
    """Calls the hook of the build for a platform, with a compiler of this text. Returns what it gives the wheel."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)

    def initialize(platform: str, compiler: str) -> dict[str, Any]:
        (tmp_path / "cc").write_text(f"#!/bin/sh\n{compiler}\n")
        (tmp_path / "cc").chmod(0o755)
        monkeypatch.setenv("CELORA_WHEEL_PLATFORM", platform)
        monkeypatch.setenv("CELORA_CC", str(tmp_path / "cc"))
        monkeypatch.setenv("MACOSX_DEPLOYMENT_TARGET", "")  # the hook sets it
        data: dict[str, Any] = {"force_include": {}}
        made = build.KernelsHook(str(ROOT), {}, None, None, str(tmp_path), "wheel")
        try:
            made.initialize("standard", data)
            data["library"] = [Path(path).read_text(encoding="utf-8") for path in data["force_include"]]
        finally:
            made.finalize("standard", data, "")
        return data

    return initialize


_WRITES = 'while [ "$1" != -o ]; do shift; done; echo "$*" > "$2"'  # what it is told to write
_RELEASED = re.findall(
    r"((?:manylinux|macosx|win)_\w+) \w+-(?:linux|macos|windows)",
    (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"),
)


@pytest.mark.skipif(os.name == "nt", reason="the compiler here is a shell script")
@pytest.mark.parametrize("platform", _RELEASED)
def test_the_wheel_of_each_platform_of_a_release_has_its_library(
    platform: str, hook: Callable[[str, str], dict[str, Any]]
) -> None:
    data = hook(platform, _WRITES)
    assert (data["tag"], data["pure_python"]) == (f"py3-none-{platform}", False)
    (inside,) = data["force_include"].values()
    ending = "dll" if platform.startswith("win") else "dylib" if platform.startswith("macosx") else "so"
    assert re.fullmatch(rf"celora/kernels/c/compiled/kernels-[0-9a-f]{{16}}\.{ending}", inside)
    assert data["library"][0].count(".o") > 1


def test_a_release_is_for_five_platforms_and_this_one() -> None:
    assert len(set(_RELEASED)) == 5


@pytest.mark.skipif(os.name == "nt", reason="the compiler here is a shell script")
@pytest.mark.parametrize(
    ("asked", "said"),
    [("amiga_68k", "CELORA_WHEEL_PLATFORM=amiga_68k is no platform"), ("win_amd64", "set CELORA_CC to one that can")],
)
def test_a_wheel_that_cannot_be_made_is_none(asked: str, said: str, hook: Callable[[str, str], dict[str, Any]]) -> None:
    with pytest.raises(RuntimeError, match=said):
        hook(asked, "exit 1")


def test_compilers_that_pages_name_are_found_in_an_isolated_build() -> None:
    """`python -m build` puts a python of its own first on PATH, which has none of what is installed here."""
    pages = [ROOT / "docs" / "use" / "install.md", *(ROOT / ".github" / "workflows").iterdir()]
    named = [name for page in pages for name in re.findall(r'CELORA_CC="?([\w./-]+)', page.read_text(encoding="utf-8"))]
    assert len(named) > 2
    assert not [name for name in named if name.startswith("python") and name != "python-zig"]


def test_public_names_come_when_asked_for() -> None:
    first = """
import sys
import celora
assert set(celora.__all__) <= set(dir(celora))
assert celora.CELoraError("said").args == ("said",)
assert "torch" not in sys.modules
"""
    _run(sys.executable, "-c", first)
    script = """
import celora
from celora import *
for name in celora.__all__:
    value = getattr(celora, name)
    assert value is globals()[name] and callable(value), name
    assert value.__module__.startswith("celora.") and value.__name__ == name
assert not hasattr(celora, "nothing")
print(*celora.__all__)
"""
    done = run(code, script)
    assert done.stdout.split()[:3] == ["AttachReport", "AuditReport", "CELoraConfig"], done.stderr
