"""`python -m celora.run`: scripts that know nothing of celora, seen from inside and by what they train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from celora.integrations.script import main
from forked import run, script, torchrun

HELPERS = Path(__file__).parents[1] / "helpers"
RUN = Path(__file__).parents[2] / "src" / "celora" / "run.py"
TRAINS = HELPERS / "trainer_script.py"

LOOKS = """
import json, sys
import __main__

def shown(value):
    return value if isinstance(value, str | list | None) else type(value).__name__

class Pickled: ...

if __name__ == "__main__":
    facts = {name: shown(getattr(__main__, name)) for name in ("__file__", "__name__", "__package__", "__doc__")}
    facts |= {"argv": sys.argv, "path": sys.path, "spec": __spec__ and __spec__.name, "class": Pickled.__module__}
    facts |= {"here": __main__.__dict__ is globals(), "large": [m for m in ("torch", "numpy") if m in sys.modules]}
    print(json.dumps(facts))
    sys.exit(5)
"""


def python(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = f"{RUN.parents[1]}{os.pathsep}{cwd}"
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    "started",
    [("inner/looks.py", "--preset", "x", "-m"), ("-m", "inner.looks", "1"), ("-m", "inner")],
    ids=["script", "module", "package"],
)
def test_a_script_sees_what_it_would_see_without_celora(started: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("looks", "__main__"):
        (tmp_path / "inner" / f"{name}.py").write_text(LOOKS)
    alone = python(*started, cwd=tmp_path)
    under = python("-m", "celora.run", "--preset", "fast", *started, cwd=tmp_path)
    assert (alone.returncode, under.returncode) == (5, 5), alone.stderr + under.stderr
    assert json.loads(under.stdout) == json.loads(alone.stdout)
    assert json.loads(alone.stdout)["large"] == []  # it may set environment variables before it imports torch


def test_the_callback_joins_when_the_script_imports_the_trainer(tmp_path: Path) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("")
    (tmp_path / "transformers" / "trainer.py").write_text("DEFAULT_CALLBACKS = []\n")
    (tmp_path / "x.py").write_text(
        "import transformers\nfrom transformers.trainer import DEFAULT_CALLBACKS as ours\n"
        "print([callback.__name__ for callback in ours])\n"
    )
    done = python("-m", "celora.run", "x.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "['Attach']\n"), done.stderr
    assert done.stderr == "celora: no Trainer of Transformers or TRL was made, so celora did nothing.\n"
    (tmp_path / "transformers" / "trainer.py").write_text("")
    done = python("-m", "celora.run", "-m", "transformers.trainer", cwd=tmp_path)
    assert done.returncode == 0  # as `__main__`, which is no trainer's module
    (tmp_path / "x.py").write_text("import transformers.trainer\n")
    done = python("-m", "celora.run", "x.py", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: this version of transformers gives its trainers no list")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--preset", "xact", "x.py"], "unknown preset 'xact'; did you mean 'exact'?"),
        (["--preset=xact", "x.py"], "unknown preset 'xact'"),
        (["--preset"], "--preset without a value; give one"),
        (["--preset", "exact"], "no script to run"),
        ([], "no script to run"),
        (["nowhere.py"], "no script 'nowhere.py'; give a file, or -m"),
        (["-m", "nowhere.inner"], "no module 'nowhere.inner'"),
    ],
)
def test_wrong_options_are_one_line(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run"])
    monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [])
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


def test_the_variable_names_a_preset(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CELORA_PRESET", "fats")
    assert main(["x.py"]) == 2
    assert "unknown preset 'fats'; did you mean 'fast'?" in capsys.readouterr().err


def test_a_wrong_setting_is_one_line_once_a_trainer_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.py"
    path.write_text("from transformers.trainer import DEFAULT_CALLBACKS\nDEFAULT_CALLBACKS[-1]()\n")
    for name, value in (("argv", ["run"]), ("path", sys.path[:]), ("modules", sys.modules)):
        monkeypatch.setattr(sys, name, value)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [])
    assert main(["--labeled_head", "false", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown setting 'labeled_head'; did you mean 'labelled_head'?")
    assert error.count("\n") == 1
    assert main(["--labelled_head", "false", str(path)]) == 0


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m celora.run [--preset PRESET]")


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def check_equal(found: Path, expected: Path) -> None:
    """The same losses and adapter, and no hook of celora when the script saves."""
    assert result(found)["losses"] == pytest.approx(result(expected)["losses"], abs=1e-5)
    assert result(found)["hooks left"] == result(expected)["hooks left"] == 0
    weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (found, expected))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert weight.sub(others[name]).abs().max() <= 1e-5, name
    configs = [(folder / "adapter_config.json").read_text() for folder in (found, expected)]
    assert configs[0] == configs[1]


def test_an_unchanged_script_trains_the_same_and_saves_plain_peft(tmp_path: Path) -> None:
    alone, exact = tmp_path / "alone", tmp_path / "exact"
    assert run(script, TRAINS, alone).returncode == 0
    done = run(script, RUN, TRAINS, exact)
    assert done.returncode == 0, done.stderr
    said = "celora: preset exact attached to LlamaForCausalLM: none of 14 frozen layers estimated, the gradient is"
    assert [line for line in done.stderr.splitlines() if line.startswith("celora")] == [f"{said} LoRA's own."]
    check_equal(exact, alone)


def test_several_processes_train_as_without_celora(tmp_path: Path) -> None:
    alone, exact = tmp_path / "alone", tmp_path / "exact"
    for path, arguments in ((TRAINS, [alone]), (RUN, [TRAINS, exact])):
        done = torchrun(path, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("celora: preset exact attached") == 1
    check_equal(exact, alone)
