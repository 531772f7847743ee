"""The wheel: built, installed into an environment of its own, and whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

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


def test_the_wheel_installs_elsewhere_and_contains_everything(tmp_path: Path) -> None:
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ".")
    (wheel,) = (tmp_path / "dist").iterdir()
    _run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python"]
    _run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)

    # The dependencies come from this environment; celora itself must not, or the wheel would not be tested.
    script = """
import importlib, importlib.util, json, pathlib, pkgutil, celora
root = pathlib.Path(celora.__file__).parent
for module in pkgutil.walk_packages([str(root)], "celora."):
    if module.name != "celora.kernels.triton.jitted" or importlib.util.find_spec("triton"):  # which it needs
        importlib.import_module(module.name)
files = [str(p.relative_to(root)) for p in root.rglob("*") if "__pycache__" not in p.parts]
print(json.dumps([str(root), sorted(files)]))
"""
    installed, files = json.loads(
        _run(scripts / "python", "-c", script, PYTHONPATH=sysconfig.get_path("purelib")).splitlines()[-1]
    )
    assert Path(installed).is_relative_to(tmp_path)
    source = ROOT / "src" / "celora"
    assert files == sorted(str(p.relative_to(source)) for p in source.rglob("*") if "__pycache__" not in p.parts)
    version = _run(scripts / "celora", "--version", PYTHONPATH=sysconfig.get_path("purelib"))
    assert version.startswith("celora 0.1")


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
