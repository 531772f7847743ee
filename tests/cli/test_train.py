"""`celora train` as a command: what it prints, what it reads, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from transformers import TrainerCallback
from trl import TrlParser

from celora.cli.main import main
from celora.train import trainer as run
from celora.train import wall_clock
from celora.train.progress import read_metrics
from celora.train.request.arguments import parse
from patching import patch_all
from tiny import WORDS, save_rows, save_tiny_model
from trl_fields import TRL_SFT


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return folder, save_tiny_model(folder / "model"), save_rows(folder / "rows.jsonl", 8)


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


def test_the_next_command_has_the_same_base_and_reads_the_same(inputs, capsys, tmp_path):
    _, model, rows = inputs
    own = ["--model", str(model), "--data", str(rows), "--output", str(tmp_path / "out"), "--max_steps", "1"]
    reading = ["--assistant_only_loss", "False", "--max_length", "40"]
    assert main(["train", *own, "--base", "int8", "--preset", "exact", *reading]) == 0
    command = f"Next:    celora compare --model {model} --data {rows} --base int8 {' '.join(reading)} --output "
    assert command in capsys.readouterr().out
    assert parse([*reading, "--output", "out"], {"model": str(model), "data": str(rows)}).train["max_length"] == 40


def test_the_last_lines_have_the_evaluation_and_quiet_is_for_one_command(inputs, capsys, tmp_path):
    _, model, rows = inputs
    own = ["--output", str(tmp_path / "out"), "--preset", "exact", "--base", "int8", "--eval-data", str(rows)]
    assert main(["train", "--model", str(model), "--data", str(rows), *own, "--max_steps", "1", "-q"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["train", "--output", str(tmp_path / "out"), "--resume", "--max_steps", "2"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    summary = json.loads((tmp_path / "out" / "run.json").read_text())["summary"]
    evaluated = f"evaluation loss {summary['eval_loss']:.4f} (on the original base {summary['eval_base_loss']:.4f})"
    assert first.startswith(f"finished: step 2  loss {summary['loss']:.4f}  {evaluated}  ")


def test_train_then_audit_the_adapter(inputs, capsys, tmp_path, monkeypatch):
    _, model, rows = inputs
    spent = wall_clock.spent  # on a fast CPU no part is long enough to be shown
    monkeypatch.setattr(wall_clock, "spent", lambda summary: {part: s + 0.05 for part, s in spent(summary).items()})
    train = ["train", "--model", model, "--data", rows, "--output", tmp_path / "out", "--max_steps", 2, "--lora-r", 8]
    assert main([str(a) for a in [*train, "--preset", "paper"]]) == 0
    captured = capsys.readouterr()
    first, spent, where, report, then = captured.out.splitlines()
    out = tmp_path / "out"
    assert first.startswith("finished: step 2  loss ")
    assert re.fullmatch(r"Wall-clock: (start|load|tokenise|choose|train|save) \d+\.\d s(, \w+ \d+\.\d s)*", spent)
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
    """Installed libraries, for example DeepSpeed, may log when they are imported. Nothing of that is printed."""
    _, model, rows = inputs
    given = ["--model", str(model), "--data", str(rows), "--preset", "exact", "--json", "--quiet"]
    command = [sys.executable, "-m", "celora", "audit", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["cosine"] == pytest.approx(1)
    assert done.stderr == ""


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
