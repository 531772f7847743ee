"""The command line: exit status, one line for each mistake, help that teaches, JSON for programs."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import TrainerCallback
from trl import TrlParser

from celora.cli import app as app_module
from celora.cli import options as options_module
from celora.cli.main import main
from celora.settings.presets import PRESETS
from celora.studies.compare import ARMS
from celora.train import trainer as run
from celora.train.progress import read_metrics
from patching import patch_all
from tiny import WORDS, save_rows, save_tiny_model
from trl_fields import TRL_SFT


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return folder, save_tiny_model(folder / "model"), save_rows(folder / "rows.jsonl", 8)


def error_line(capsys, *arguments) -> str:
    """Run a command that must fail, and give its one line."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in captured.err + captured.out
    return lines[0]


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


COMMANDS = ("train", "audit", "plan", "compare", "bench", "demo", "doctor")


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
    assert len(COMMANDS) == len(app_module.app.registered_commands)


def test_help_version_completion_and_misspelt_flags_import_neither_torch_nor_transformers():
    script = """
import contextlib, io, os, sys
from celora.cli.main import main
wrong = [[command, "--modle", "m", "--lr", "3"] for command in ("train", "audit", "plan", "compare")]
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


def test_a_4_bit_base_is_estimated_and_trained(inputs, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    rows = inputs[2]
    # A CPU with bfloat16 packs weights for evaluation, in blocks of 64.
    model = save_tiny_model(tmp_path / "model", hidden=64)
    own = ["--model", str(model), "--data", str(rows), "--output", str(tmp_path / "out"), "--preset", "paper"]
    short = ["--max_steps", "4", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant", "--quiet"]
    assert main(["train", *own, *short, "--load_in_4bit", "--bnb_4bit_quant_type", "nf4", "--dtype", "bfloat16"]) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["estimated_layers"] == 8
    losses = [row["loss"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]


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
    assert set(options_module.PRESETS) == set(PRESETS)
    assert set(options_module.COMPARED) == set(ARMS)


def test_train_then_audit_the_adapter(inputs, capsys, tmp_path):
    _, model, rows = inputs
    train = ["train", "--model", model, "--data", rows, "--output", tmp_path / "out", "--max_steps", 2, "--lora-r", 8]
    assert main([str(a) for a in [*train, "--preset", "paper"]]) == 0
    captured = capsys.readouterr()
    first, where, report, then = captured.out.splitlines()
    out = tmp_path / "out"
    assert first.startswith("finished: step 2  loss ")
    assert where == f"Adapter: {out}, loaded by PeftModel.from_pretrained(model, {str(out)!r})"
    assert report == f"Report:  {out / 'report.html'}"
    command, _, _ = then.partition("   #")
    assert command == f"Next:    celora audit --model {model} --data {rows} --adapter {out}"
    assert "r0 = 7" in captured.err
    assert main([*command.split()[2:], "--rows", "4"]) == 0
    capsys.readouterr()

    audit = ["audit", "--model", model, "--data", rows, "--adapter", tmp_path / "out", "--rows", 4]
    assert main([str(a) for a in [*audit, "--reference", "float32", "--json"]]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0.5 < report["cosine"] <= 1
    assert report["per_layer"]
    assert report["float32"]["attached"]["cosine"] <= report["float32"]["plain"]["cosine"] <= 1
    assert main([str(a) for a in ["audit", "--model", model, "--data", rows, "--preset", "off", "-q"]]) == 0
    captured = capsys.readouterr()
    assert "cosine 1.0000" in captured.out
    assert captured.err == ""

    assert main([str(a) for a in [*train, "--preset", "off", "--overwrite", "--quiet", "--json"]]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["status"], result["step"], result["output"]) == ("finished", 2, str(tmp_path / "out"))
    assert result["loss"] > 0
    assert captured.err == ""


TRL_FILE = """
# Model
model_name_or_path: {model}
dtype: float32
# Data
dataset_name: {folder}
dataset_text_field: content
dataset_test_split: validation
dataset_streaming: false
# LoRA
use_peft: true
lora_r: 4
lora_alpha: 8
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
# Training
output_dir: {output}
learning_rate: 2.0e-4
max_steps: 2
per_device_train_batch_size: 4
gradient_checkpointing: false
packing: true
max_length: 32
eval_strategy: steps
eval_steps: 1
logging_steps: 1
lr_scheduler_type: cosine
report_to: none
use_cpu: true
bf16: false
env: {{WANDB_PROJECT: set}}
"""


def test_json_is_all_that_a_new_process_prints(inputs):
    """Whatever the libraries that are installed, DeepSpeed among them, log when they are imported."""
    _, model, rows = inputs
    given = ["--model", str(model), "--data", str(rows), "--preset", "exact", "--json", "--quiet"]
    command = [sys.executable, "-m", "celora", "audit", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["cosine"] == pytest.approx(1)
    assert "accelerator" not in done.stderr


# TRL turns checkpointing on under the name that transformers 5.24 has just deprecated.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_a_file_of_trl_sft_works_unchanged(inputs, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "")
    folder = tmp_path / "rows"
    folder.mkdir()
    for split, first in (("train", 0), ("validation", 30)):
        rows = [{"content": " ".join(WORDS[first : first + 9]), "id": i} for i in range(12)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    file = tmp_path / "sft.yaml"
    file.write_text(TRL_FILE.format(model=inputs[1], folder=folder, output=output))
    _, args, lora, _ = TrlParser(TRL_SFT).parse_args_and_config(["--config", str(file)])  # as `trl sft` reads it
    monkeypatch.setenv("WANDB_PROJECT", "")

    assert main(["train", "--config", str(file), "--preset", "off", "--json", "-q"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert os.environ["WANDB_PROJECT"] == "set"
    assert result["step"] == 2
    assert result["eval_loss"] > 0
    run = json.loads((output / "run.json").read_text())
    for name in ("learning_rate", "max_steps", "max_length", "packing", "per_device_train_batch_size", "eval_steps"):
        assert run["train"][name] == getattr(args, name)
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (4, 8, 0.05)
    assert set(adapter["target_modules"]) == set(lora.lora_target_modules)
    evaluated = [row for row in read_metrics(output / "metrics.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [1, 2]


def test_ctrl_c_saves_and_says_how_to_go_on(inputs, capsys, tmp_path, monkeypatch):
    _, model, rows = inputs
    build = run.build_trainer

    def pressing(*arguments, **more):
        trainer = build(*arguments, **more)
        trainer.add_callback(PressCtrlC())
        return trainer

    class PressCtrlC(TrainerCallback):
        def on_step_begin(self, *_, **__):
            signal.raise_signal(signal.SIGINT)

    train = ["train", "--model", str(model), "--data", str(rows), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch_all(patch, "celora.train.trainer:build_trainer", pressing)
        assert main([*train, "--preset", "off", "--max_steps", "3", "--quiet", "--json"]) == 130
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["status"], result["step"]) == ("interrupted", 1)
    again = f"celora train --output {tmp_path / 'out'} --resume"
    assert again in " ".join(captured.err.split())
    assert main([*again.split()[1:], "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["step"]) == ("finished", 3)


def test_plan_then_audit_and_train_with_it(inputs, capsys, tmp_path):
    _, model, rows = inputs
    out = tmp_path / "plan.json"
    plan = ["plan", "--model", model, "--data", rows, "--output", out, "--rows", 4, "--fidelity", 0.9]
    assert main([str(a) for a in plan]) == 0
    captured = capsys.readouterr()
    assert "0.9 asked for" in captured.out
    assert f"Saved as {out}" in captured.out
    assert "planning: timing candidates" in captured.err
    document = json.loads(out.read_text())
    assert document["fidelity"] == 0.9
    assert "--overwrite replaces it" in error_line(capsys, *plan)
    assert main([str(a) for a in [*plan, "--overwrite", "--quiet"]]) == 0
    assert capsys.readouterr().out == ""
    assert main([str(a) for a in [*plan, "--overwrite", "--quiet", "--json"]]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(out.read_text())
    assert captured.err == ""

    audit = ["audit", "--model", model, "--data", rows, "--rows", 4, "--plan", out, "--json"]
    assert main([str(a) for a in audit]) == 0
    assert json.loads(capsys.readouterr().out)["cosine"] > 0.8

    train = ["train", "--model", model, "--data", rows, "--output", tmp_path / "out", "--preset", "auto", "--plan", out]
    assert main([str(a) for a in [*train, "--max_steps", 2]]) == 0
    assert json.loads((tmp_path / "out" / "celora_plan.json").read_text()) == json.loads(out.read_text())

    capsys.readouterr()

    out.write_text("{}")
    assert "plan of version None" in error_line(capsys, *audit)
    base = ["train", "--model", model, "--data", rows, "--output", tmp_path / "none"]
    assert "fidelity belongs to a plan" in error_line(capsys, *base, "--preset", "paper", "--fidelity", 0.9)
    assert "fidelity=1.5; expected a cosine" in error_line(capsys, *base, "--preset", "auto", "--fidelity", 1.5)
    assert "fidelity=0.0; expected a cosine" in error_line(capsys, *plan, "--overwrite", "--fidelity", 0)
    assert "memory_limit=-1;" in error_line(capsys, *base, "--preset", "auto", "--memory_limit", -1)
    assert "expected a file in a folder that exists" in error_line(capsys, *plan[:5], "--output", tmp_path)


def test_plan_and_audit_have_batches_as_training_has(inputs, capsys, tmp_path):
    _, model, rows = inputs
    out = tmp_path / "plan.json"
    (tmp_path / "run.yaml").write_text(f"model: {model}\ndata: {rows}\nper_device_train_batch_size: 1\nlora_r: 4\n")
    tokens = []
    for flags in ([], ["--rows", "1"], ["--per_device_train_batch_size", "2"], ["--rows", "2"]):
        plan = ["plan", "--config", tmp_path / "run.yaml", "--output", out, "--overwrite", "--quiet", *flags]
        assert main([str(a) for a in plan]) == 0
        tokens.append(json.loads(out.read_text())["tokens"])
    assert tokens[0] == tokens[1] < tokens[2] == tokens[3]


def test_plan_and_audit_take_a_file_of_a_training_that_evaluates(inputs, capsys, tmp_path):
    _, model, rows = inputs
    (tmp_path / "run.yaml").write_text(
        f"model: {model}\ndata: {rows}\neval_data: {rows}\neval_strategy: steps\nsave_strategy: best\n"
        "load_best_model_at_end: true\neval_on_start: true\n"
    )
    for command in (["plan", "--output", tmp_path / "plan.json"], ["audit", "--preset", "paper"]):
        assert main([str(a) for a in (*command, "--config", tmp_path / "run.yaml", "--quiet")]) == 0


def test_flags_that_would_change_nothing_are_refused(inputs, capsys, tmp_path):
    given = ["--model", inputs[1], "--data", inputs[2]]
    plan, audit = ["plan", *given, "--output", tmp_path / "plan.json"], ["audit", *given]
    assert "--preset is not for celora plan" in error_line(capsys, *plan, "--preset", "paper")
    assert "--plan is not for celora plan" in error_line(capsys, *plan, "--plan", "plan.json")
    assert "--output is not for celora plan by another name" in error_line(capsys, *plan, "--output_dir", tmp_path)
    assert "--eval_data is not for celora audit" in error_line(capsys, *audit, "--eval_data", "rows.jsonl")
    assert "--overwrite is not for celora audit" in error_line(capsys, *audit, "--overwrite")
    for command in (plan, audit):
        line = error_line(capsys, *command, "--adapter", tmp_path, "--lora-r", 4)
        assert line == "error: --lora_r is not for an adapter that is there, which has its own; leave it out."


def test_hints_name_what_the_command_takes(capsys, tmp_path):
    resume = error_line(capsys, "train", "--resume")
    assert resume == "error: --resume continues the run in --output; give --output DIR"
    for command in ("plan", "audit"):
        line = error_line(capsys, command)
        assert line == "error: --model and --data are missing; give --model MODEL --data DATA"
    assert error_line(capsys, "train", "--model", "m") == (
        "error: --data and --output are missing; give --data DATA --output DIR"
    )
    nothing = error_line(capsys, "train", "--resume", "--output", tmp_path / "none")
    assert nothing.endswith(
        "no run of celora is there; give --model and --data, too, to start one, or another --output"
    )


def test_an_arm_may_be_written_in_any_case(inputs, capsys, tmp_path):
    given = ["--model", inputs[1], "--data", inputs[2], "--max_steps", 1, "--seeds", 1, "--quiet", "--json"]
    arms = ["--arm", "lora", "--arm", "EXACT"]
    assert main([str(a) for a in ["compare", *given, "--output", tmp_path / "out", *arms]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["against"], [one["arm"] for one in found["outcomes"]]) == ("LoRA", ["LoRA", "exact"])
    assert "unknown arm 'loar'. Known: LoRA, " in error_line(capsys, "compare", "--arm", "loar", "--quiet")
    assert "unknown arm 'exat'; did you mean 'exact'" in error_line(capsys, "bench", "--quick", "--arm", "exat")


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
    "given", [("plan", "--output"), ("bench", "--output"), ("demo", "--output"), ("audit", "--adapter"),
              ("plan", "--adapter"), ("train", "--output"), ("compare", "--output")]
)  # fmt: skip
def test_a_name_that_nothing_can_have_is_one_line(given, capsys):
    more = {"bench": ["--cell", "none"], "demo": []}.get(given[0], ["--model", "m", "--data", "d"])
    line = error_line(capsys, *given, "x" * 300, *more)
    assert line == f"error: {given[1]} '{'x' * 57}...' cannot be a path: File name too long"


@pytest.fixture
def demo(monkeypatch):
    """A demo to be replaced: what the command does with what becomes of it."""

    def become(result):
        def run_demo(output, *, seeds, console, quiet):
            if isinstance(result, BaseException):
                raise result
            return [result(output, seeds, quiet)]

        patch_all(monkeypatch, "celora.studies.demo:run_demo", run_demo)

    return become


def test_demo(demo, tmp_path, capsys):
    from celora.studies.demo import DemoRow

    demo(lambda output, seeds, quiet: DemoRow("LoRA", seeds, 0.9, 4, 1, 8, 10.0, 1.0, 1.0, 1, "float32", "2"))
    given = ["demo", "--output", str(tmp_path), "--seeds", "2"]
    assert main([*given, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["arm"], row["seed"], row["accuracy"]) == ("LoRA", 2, 0.9)
    assert main(given) == 0
    text = capsys.readouterr().out
    assert "90.0%" in text
    assert str(tmp_path) in "".join(text.split("\n"))
    assert main([*given, "--quiet"]) == 0
    assert "Report" not in capsys.readouterr().out


def test_exit_status(demo, capsys):
    demo(KeyboardInterrupt())
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    for error, said in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "lower --per_device_train_batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."), "out of memory"),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
    ):
        demo(error)
        assert main(["demo"]) == 1
        captured = capsys.readouterr()
        assert said in captured.err
        assert captured.err.count("\n") == 1
    demo(ZeroDivisionError("a bug"))
    assert main(["demo"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "ZeroDivisionError: a bug" in error
    assert "celora doctor" in error.splitlines()[-1]
