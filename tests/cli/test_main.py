"""The command line: exit status, one line for each mistake, help that teaches, JSON for programs."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import types

import pytest
import torch

from asked import error_line
from celora import __main__ as entry
from celora.cli import app as app_module
from celora.cli import options as options_module
from celora.cli.main import main
from celora.settings.names import PRESET_NAMES
from celora.settings.presets import PRESETS
from celora.studies.compare import ARMS
from tiny import save_rows, save_tiny_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return folder, save_tiny_model(folder / "model"), save_rows(folder / "rows.jsonl", 8)


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("celora 0.")
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("Usage: celora")
    assert main(["--help"]) == 0
    assert "audit" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "celora train --model" in text
    assert "--help-all" in text
    assert main(["train", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert "--per_device_train_batch_size" in text
    assert "differs from TRL's" in text


COMMANDS = (
    "estimate", "train", "watch", "chat", "generate", "export", "audit", "compare", "bench", "demo", "doctor",
)  # fmt: skip


def test_ctrl_c_while_the_command_line_is_imported_is_one_line(monkeypatch, capsys):
    """It is imported for half a second, before anything is there that would catch it."""

    class Importing(types.ModuleType):
        def __getattr__(self, name: str):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "celora.cli.main", Importing("celora.cli.main"))
    with pytest.raises(SystemExit) as left:
        entry.run()
    assert left.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_what_is_piped_is_utf_8(monkeypatch):
    """Windows reads and writes pipes in the system's code page."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é“\n".encode()), encoding="cp1252"))
    monkeypatch.setattr(sys, "stdout", written := io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert main(["--version"]) == 0
    assert input() == "é“"
    print("你")
    written.flush()
    assert written.buffer.getvalue().endswith("你\n".encode())


def test_every_help_teaches_by_example(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert "Exit status: 0 done, 1 failed, 2 bad input" in overview
    for name in COMMANDS:
        assert f"\n  {name} " in overview
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"Examples:\n    celora {name}" in text
        assert "--json" in text
        assert "-q, --quiet" in text
    assert "\n  sft " in overview  # its options are TRL's
    assert len(COMMANDS) + 1 == len(app_module.app.registered_commands)


def test_help_version_completion_and_misspelt_flags_import_neither_torch_nor_transformers():
    script = """
import contextlib, io, os, sys
from celora.cli.main import main
wrong = [[command, "--modle", "m", "--lr", "3"] for command in ("train", "audit", "compare")]
for given in (["--help"], ["--version"], ["train", "--help"], ["doctor", "--help"], ["--show-completion"], ["trayn"],
              *wrong):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as said:
        main(given)
    assert given not in wrong or "unknown option --modle; did you mean --model?" in said.getvalue()
os.environ.update(_CELORA_COMPLETE="complete_bash", COMP_WORDS="celora train --preset p", COMP_CWORD="3")
with contextlib.suppress(SystemExit):
    main([])
print(sorted({"torch", "transformers", "peft", "trl", "datasets"} & set(sys.modules)))
"""
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["paper", "[]"]


def test_garbage_is_not_looked_for_in_what_a_command_imports():
    script = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count()))  # after all that is registered later
from celora.cli.options import importing
with importing():
    looks, made = gc.isenabled(), [[] for _ in range(100_000)]
print(looks, gc.isenabled(), gc.get_freeze_count() > 100_000)
import sys
sys.modules["torch"] = sys  # as in a program that has imported it
with importing():
    print(gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # What is still frozen at the end, nanobind's modules (such as Triton's) list as leaked, in sixty lines.
    assert done.stdout.split() == ["False", "True", "True", "True", "0"]


def test_completion_installs_into_the_shell_and_completes(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "celora", "--install-completion", "bash"]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    there = tmp_path / "celora"
    there.write_text(f'#!/bin/sh\nexec {sys.executable} -m celora "$@"\n')
    there.chmod(0o755)
    for typed, expected in (("celora do", ["doctor"]), ("celora train --preset p", ["paper"])):
        words = typed.split()
        script = f"""
. {tmp_path}/.bashrc
COMP_WORDS=({typed}) COMP_CWORD={len(words) - 1}
_celora_completion celora
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        path = f"{tmp_path}:{environment['PATH']}"
        done = subprocess.run(["bash", "-c", script], env={**environment, "PATH": path}, capture_output=True, text=True)
        assert done.stdout.split() == expected, done.stderr


def test_what_completion_offers_is_what_there_is():
    assert set(PRESET_NAMES) == set(PRESETS)
    assert set(options_module.COMPARED) == set(ARMS)


def test_hints_name_what_the_command_takes(capsys, tmp_path):
    resume = error_line(capsys, "train", "--resume")
    assert resume == "error: --resume continues the run in --output; give --output DIR"
    line = error_line(capsys, "audit")
    assert line == "error: --model and --data are missing; give --model MODEL --data DATA"
    assert error_line(capsys, "train", "--model", "m") == (
        "error: --data and --output are missing; give --data DATA --output DIR"
    )
    nothing = error_line(capsys, "train", "--resume", "--output", tmp_path / "none")
    assert nothing.endswith(
        "no run of celora is there; give --model and --data, too, to start one, or another --output"
    )


def test_mistakes_are_one_line_and_status_2(inputs, capsys, tmp_path):
    _, model, rows = inputs
    out = ["--output", tmp_path / "out"]
    base = ["train", "--model", model, "--data", rows, *out]
    assert "'paper'" in error_line(capsys, *base, "--preset", "papr")
    assert "did you mean --max_steps?" in error_line(capsys, *base, "--max_stps", 3)
    assert "did you mean --learning_rate?" in error_line(capsys, *base, "--lr", 3)
    assert "whole number" in error_line(capsys, *base, "--max_steps", "abc")
    assert "lora_r=-1" in error_line(capsys, *base, "--lora_r", "-1")
    assert "--output is missing" in error_line(capsys, *base[:-2])
    assert "trayn" in error_line(capsys, "trayn")
    assert "--rows" in error_line(capsys, "audit", "--rows", "x")
    assert "--data is given 2 times; give it once" in error_line(capsys, *base, f"--data={rows}")
    line = error_line(capsys, *base, "--dataset_name", rows)
    assert "--data (also as --dataset_name) is given 2 times; give it once" in line
    assert "--output (also as --output_dir) is given 2 times" in error_line(capsys, *base, "--output_dir=b")
    assert "--eval-data is given 2 times" in error_line(capsys, *base, "--eval_data", rows, "--eval-data", rows)

    bad = tmp_path / "bad.yaml"
    bad.write_text("celora: {keep_ratio: 1.4}")
    assert "keep_ratio=1.4" in error_line(capsys, *base, "--config", bad)
    bad.write_text("celora: {rank: -3}")
    assert "rank=-3" in error_line(capsys, *base, "--config", bad)
    bad.write_text("lr: 3")
    assert "key 'lr' in " in error_line(capsys, *base, "--config", bad)

    data = ["train", "--model", model, *out, "--data"]
    assert "nowhere.jsonl" in error_line(capsys, *data, tmp_path / "nowhere.jsonl")
    (tmp_path / "torn.jsonl").write_text('{"text": "w1"}\n{"text": \n')
    assert "torn.jsonl:2" in error_line(capsys, *data, tmp_path / "torn.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    error_line(capsys, *data, tmp_path / "empty.jsonl")

    hollow = tmp_path / "hollow"
    hollow.mkdir()
    (hollow / "config.json").write_text((model / "config.json").read_text())
    assert "no weights" in error_line(capsys, "train", "--model", hollow, "--data", rows, *out)
    assert "holds no adapter" in error_line(capsys, "audit", "--model", model, "--data", rows, "--adapter", hollow)
    assert not (tmp_path / "out").exists()

    assert main([str(a) for a in [*base, "--max_steps", 1, "--quiet"]]) == 0
    assert capsys.readouterr().out == ""
    assert "already holds a run" in error_line(capsys, *base, "--max_steps", 1)


@pytest.mark.parametrize(
    "given", [("bench", "--output"), ("demo", "--output"), ("audit", "--adapter"),
              ("train", "--output"), ("compare", "--output")]
)  # fmt: skip
def test_a_name_that_nothing_can_have_is_one_line(given, capsys):
    more = {"bench": ["--cell", "none"], "demo": []}.get(given[0], ["--model", "m", "--data", "d"])
    line = error_line(capsys, *given, "x" * 300, *more)
    assert line == f"error: {given[1]} '{'x' * 57}...' cannot be a path: File name too long"


def test_what_is_gone_says_what_is_there_instead(capsys, tmp_path):
    instead = "preset auto decides by a rule, by timing, and while it trains"
    assert error_line(capsys, "plan", "--model", "m") == f"error: celora plan is gone: {instead}"
    for name in ("plan", "fidelity", "memory-limit"):
        line = error_line(capsys, "train", "--model", "m", f"--{name}", 1)
        assert line == f"error: option --{name} is gone: {instead}"
    (tmp_path / "run.yaml").write_text("fidelity: 0.998")
    assert "is gone: preset auto" in error_line(capsys, "audit", "--config", tmp_path / "run.yaml")


def test_exit_status(demo, capsys):
    demo(KeyboardInterrupt())
    assert main(["demo", "--quiet"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    for error, said in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "lower --per_device_train_batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."), "out of memory"),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
    ):
        demo(error)
        assert main(["demo", "--quiet"]) == 1
        captured = capsys.readouterr()
        assert said in captured.err
        assert captured.err.count("\n") == 1
    demo(ZeroDivisionError("a bug"))
    assert main(["demo", "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "ZeroDivisionError: a bug" in error
    assert "celora doctor" in error.splitlines()[-1]
