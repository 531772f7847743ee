"""Where compiled kernels are stored, who may have written them, and what happens without a compiler."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import forked
from celora.kernels.c import build as build_module
from celora.kernels.c import library as library_module
from patching import patch_all

PYTHON = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}  # a new process finds the tested code here
needs_compiler = pytest.mark.skipif(library_module.library() is None, reason="no C compiler")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with a compiler that does not optimise. It is six times as fast, and these tests compute nothing."""
    works = next(filter(None, map(shutil.which, build_module._COMPILERS)))
    return compilers(tmp_path_factory.mktemp("quick"), cc=f'exec "{works}" "$@" -O0')


@pytest.fixture(scope="module")
def compiled(quick: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the library that a process has compiled into it."""
    cache = tmp_path_factory.mktemp("compiled")
    made, reason = load_in(cache, path=quick)
    assert (made.parent, reason) == (cache / "celora" / "kernels", "")
    return cache


@pytest.fixture
def made(compiled: Path, tmp_path: Path) -> Path:
    """The library in a cache of its own, `tmp_path`, as if another process had compiled it."""
    shutil.copytree(compiled / "celora", tmp_path / "celora")
    return next((tmp_path / "celora" / "kernels").glob("*.so"))


def compilers(folder: Path, **does: str) -> str:
    """A PATH with commands of these names, each of which runs this shell command."""
    for name, command in does.items():
        (folder / name).write_text(f"#!/bin/sh\n{command}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def load_in(cache: Path, *, path: str | None = None, home: Path | None = None) -> tuple[Path, str]:
    """The file that a new process loads, and its reason if it loads none or does not keep what it compiled."""
    code = (
        "from celora.kernels.c import build; loaded, reason = build.build_and_load()\n"
        "print(loaded and loaded._name, reason)"
    )
    own = {"PATH": path or os.environ["PATH"], "HOME": str(home or cache), "XDG_CACHE_HOME": str(cache)}
    done = forked.run(forked.code, code, environment=own | {"TMPDIR": str(cache)})
    assert done.returncode == 0, done.stderr
    name, _, reason = done.stdout.strip().partition(" ")
    return Path(name), reason


@needs_compiler
@pytest.mark.parametrize("how", ["no home", "not writable"])
def test_without_a_cache_they_are_built_for_the_process(how: str, quick: str, tmp_path: Path) -> None:
    code = (
        "import pathlib\n"
        "from celora.kernels.c import build\n"
        "def none(): raise RuntimeError('Could not determine home directory.')\n"
        "def denied(*_, **__): raise PermissionError('denied')\n"
        f"pathlib.Path.home, pathlib.Path.mkdir = (none, pathlib.Path.mkdir) if {how == 'no home'} else "
        "(pathlib.Path.home, denied)\n"
        "print(build.build_and_load()[0]._name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": quick, "HOME": str(tmp_path), "TMPDIR": str(tmp_path), **PYTHON},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built = Path(done.stdout.strip())
    assert built.parent.parent == tmp_path
    assert not built.exists()  # it was removed when the process ended


@needs_compiler
def test_a_newer_compiler_of_the_same_name_builds_anew(made: Path, quick: str, tmp_path: Path) -> None:
    """It may know more instructions."""
    works = next(filter(None, map(shutil.which, build_module._COMPILERS)))
    newer = tmp_path / "newer"
    newer.mkdir()
    path = compilers(newer, cc=f'exec "{works}" "$@" -O0')
    first, _ = load_in(tmp_path, path=path)
    assert load_in(tmp_path, path=path) == (first, "")
    compilers(newer, cc=f'exec "{works}" "$@" -O0 -g0')
    again, reason = load_in(tmp_path, path=path)
    assert (again.parent, reason) == (made.parent, "")
    assert len({again, first, made}) == 3


@needs_compiler
def test_a_damaged_library_is_made_anew(made: Path, quick: str, tmp_path: Path) -> None:
    whole = made.stat().st_size
    made.write_bytes(bytes(1000))
    assert load_in(tmp_path, path=quick) == (made, "")
    assert made.stat().st_size == whole


@needs_compiler
def test_a_library_that_others_could_have_written_is_not_loaded(made: Path, quick: str, tmp_path: Path) -> None:
    before = made.stat()
    made.chmod(0o777)
    assert load_in(tmp_path, path=quick) == (made, "")
    assert made.stat().st_ino != before.st_ino  # compiled again
    assert made.stat().st_mode & 0o022 == 0


@needs_compiler
def test_a_folder_that_others_could_write_to_is_closed(made: Path, quick: str, tmp_path: Path) -> None:
    made.parent.chmod(0o777)
    assert load_in(tmp_path, path=quick) == (made, "")
    assert made.parent.stat().st_mode & 0o022 == 0


@needs_compiler
def test_kernels_that_cannot_be_kept_are_compiled_anyway(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.chmod(0o777)
    loaded = object()
    patch_all(monkeypatch, "celora.kernels.c.build:_built", lambda compiler, folder: loaded)
    patch_all(monkeypatch, "celora.kernels.c.build:_private", lambda: tmp_path)
    found, reason = build_module.build_and_load.__wrapped__()
    assert found is loaded
    assert reason == f"they could not be kept or loaded: {home} could be written to by others"


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_left_alone(made: Path, quick: str, tmp_path: Path) -> None:
    os.chown(made.parent, 12345, -1)
    assert load_in(tmp_path, path=quick)[0].parent != made.parent


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where a wheel's library would lie, on a machine without a compiler."""
    monkeypatch.delenv("CELORA_KERNELS", raising=False)
    patch_all(monkeypatch, "celora.kernels.c.compiling:SOURCES", tmp_path)
    monkeypatch.setattr(build_module.shutil, "which", lambda name: None)
    (tmp_path / "compiled").mkdir()
    return tmp_path / "compiled"


def put(folder: Path, content: bytes) -> Path:
    file = folder / f"kernels-{hashlib.sha256(content).hexdigest()[:16]}.so"
    file.write_bytes(content)
    return file


@needs_compiler
def test_a_wheels_library_needs_no_compiler(compiled: Path, package: Path) -> None:
    (library,) = (compiled / "celora" / "kernels").glob("*.so")
    file = put(package, library.read_bytes())
    loaded, reason = build_module.build_and_load.__wrapped__()
    assert (loaded._name, reason) == (str(file), "")


@needs_compiler
@pytest.mark.parametrize("how", ["cut", "text", "foreign"])
def test_a_wheels_library_that_is_no_such_library(
    how: str, compiled: Path, package: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading half a library would crash the process."""
    (library,) = (compiled / "celora" / "kernels").glob("*.so")
    file = put(package, b"no library" if how == "text" else library.read_bytes())
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-5000])
    elif how == "foreign":
        file.unlink()
        file = put(package, Path(torch._C.__file__).read_bytes())
    with pytest.warns(UserWarning, match="the kernels are compiled here, if possible.$") as said:
        loaded, reason = build_module.build_and_load.__wrapped__()
    assert loaded is None
    assert reason.startswith(f"{file} is damaged: install" if how == "cut" else f"{file} cannot be loaded: ")
    assert reason in str(said[0].message)
    assert "\n" not in str(said[0].message)

    made = object()  # with a compiler, they are compiled, and that is said as well
    patch_all(monkeypatch, "celora.kernels.c.build:_built", lambda compiler, folder: made)
    monkeypatch.setattr(build_module.shutil, "which", lambda name: name)
    with pytest.warns(UserWarning, match=re.escape(reason)):
        assert build_module.build_and_load.__wrapped__() == (made, "")


@needs_compiler
def test_each_compiler_is_tried(tmp_path: Path) -> None:
    works = next(filter(None, map(shutil.which, build_module._COMPILERS)))
    (tmp_path / "bin").mkdir()
    path = compilers(tmp_path / "bin", cc="exit 1", gcc=f'exec "{works}" "$@" -O0')
    assert load_in(tmp_path, path=path)[0].parent == tmp_path / "celora" / "kernels"


@pytest.mark.skipif(sys.platform == "win32", reason="never built there")
def test_why_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = build_module.build_and_load.__wrapped__
    for off in ("0", "plain"):
        monkeypatch.setenv("CELORA_KERNELS", off)
        assert load() == (None, f"CELORA_KERNELS={off} turns them off")
    monkeypatch.delenv("CELORA_KERNELS")
    monkeypatch.setattr(build_module.shutil, "which", lambda name: None)
    assert load() == (None, "no C compiler (cc, gcc, clang) is installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilers(tmp_path, silent="exit 1", talks="echo x.c:1: error: no such thing >&2; echo 1 error. >&2; exit 1")
    for name, why in (("talks", "x.c:1: error: no such thing"), ("silent", "it ended with status 1")):
        compiler = str(tmp_path / name)
        monkeypatch.setattr(build_module.shutil, "which", lambda _, compiler=compiler: compiler)
        assert load() == (None, f"{compiler} could not build them: {why}")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    patch_all(monkeypatch, "celora.kernels.c.build:_built", full)
    assert load() == (None, "they could not be kept or loaded: [Errno 28] No space left on device")


@pytest.mark.parametrize(
    "environment", [{"CELORA_KERNELS": "0"}, {"PATH": ""}, {"PATH": "{folder}"}], ids=["off", "none", "broken"]
)
def test_without_a_working_compiler_everything_works_through_torch(environment: dict[str, str], tmp_path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    environment = {key: value.format(folder=tmp_path) for key, value in environment.items()}
    code = (
        "import torch; from celora.kernels.c import library; from celora.numerics.estimators import Tokens\n"
        "assert library.library() is None\n"
        "G, W = torch.randn(40, 32), torch.randn(32, 48)\n"
        "for selection in ('topk', 'energy'):\n"
        "    e = Tokens(32, 48, keep_ratio=0.9, selection=selection, precision='int8').estimate(G, W)\n"
        "    assert (e - G @ W).norm() < 0.5 * (G @ W).norm()\n"
    )
    own = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path), **PYTHON}
    done = forked.run(forked.code, code, environment=own | environment)
    assert done.returncode == 0, done.stderr
