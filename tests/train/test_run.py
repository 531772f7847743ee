"""Whole runs of a tiny model: what they leave, how they resume, what they refuse."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from importlib import metadata

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTTrainer

from celora import borrowed
from celora.errors import CELoraError
from celora.machine.device import device_name
from celora.settings.config import CELoraConfig
from celora.settings.presets import resolve
from celora.train import planning, prepare, record
from celora.train import run as run_module
from celora.train import trainer as trainer_module
from celora.train.output.folder import OutputFolder
from celora.train.progress import read_metrics
from celora.train.request.arguments import make_request, parse
from celora.train.run import train
from patching import patch_all
from tiny import TEMPLATE, save_rows, save_tiny_model

# A refresh in the middle, dropout and a last partial batch: everything a resumed run has to continue with.
CELORA = {"estimator": "columns", "keep_ratio": 0.4, "rank": 4, "refresh_every": 2}
SHORT = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "celora": CELORA, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": str(save_tiny_model(folder / "model")), "data": str(save_rows(folder / "rows.jsonl"))}


def go(inputs, output, **more):
    console = Console(file=io.StringIO(), width=200)
    result = train(make_request({**inputs, "output": str(output), **SHORT, **more}), console=console)
    return result, console.file.getvalue()


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def on_build(patch, do):
    """Run `do(trainer)` on the trainer that a run builds."""
    build = trainer_module.build_trainer

    def built(*args, **kw):
        trainer = build(*args, **kw)
        do(trainer)
        return trainer

    patch_all(patch, "celora.train.trainer:build_trainer", built)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "out"
    trainers = []
    with pytest.MonkeyPatch.context() as patch:
        on_build(patch, trainers.append)
        result, text = go(inputs, output, eval_data=inputs["data"])
    return output, result, text, trainers[0].model


def test_output_folder(finished):
    output, result, text, _ = finished
    names = {entry.name for entry in output.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "celora_config.json"} <= names
    assert {"metrics.jsonl", "run.json", "report.html", "checkpoint-3", "checkpoint-6"} <= names
    assert not [name for name in names if name.endswith((".tmp", ".bin"))]
    assert CELoraConfig.load(output).keep_ratio == 0.4
    assert "celora" not in (output / "adapter_config.json").read_text(encoding="utf-8").replace(str(output), "")
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert (record["status"], result.status, result.step) == ("finished", "finished", 6)
    assert record["given"]["max_steps"] == 6
    assert record["versions"]["torch"] == metadata.version("torch")
    assert record["machine"]["device"] == device_name(torch.device("cpu"))
    assert "columns" in text
    assert "step 6/6" in text


def test_metrics_rows(finished, inputs):
    rows = read_metrics(finished[0] / "metrics.jsonl")
    training, evaluation = rows[:-1], rows[-1]
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "learning_rate", "grad_norm", "seconds", "tokens_seen", "tokens_per_second", "step_time_ms"):
        assert all(row[key] is not None for row in training), key
    assert training[-1]["celora/refreshes"] == 3
    assert evaluation["eval_loss"] > 0
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    with open(inputs["data"], encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows]
    # 6 steps of 4 rows are one epoch of 24: every token once, no padding.
    assert training[-1]["tokens_seen"] == sum(len(tokenizer(text).input_ids) for text in texts)


def test_adapter_reloads_in_stock_peft_with_the_same_logits(finished, inputs):
    output, *_, trained = finished
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs["model"]), str(output)).eval()
    ids = torch.arange(6, 26)[None]
    with torch.no_grad():
        tuned = model(ids).logits
        assert torch.equal(tuned, trained.eval()(ids).logits)
        with model.disable_adapter():
            assert not torch.equal(tuned, model(ids).logits)


def test_the_best_of_its_checkpoints_is_what_is_left(inputs, tmp_path):
    """Judged the wrong way round here, so that it is not the last."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    output = tmp_path / "out"
    result, _ = go(
        inputs, output, eval_data=inputs["data"], eval_strategy="steps", eval_steps=2, save_steps=2,
        learning_rate=1e-2, **best,
    )  # fmt: skip
    *rows, last = (row for row in read_metrics(output / "metrics.jsonl") if "eval_loss" in row)
    losses = {row["step"]: row["eval_loss"] for row in rows}
    assert list(losses) == [2, 4, 6]
    step = max(losses, key=losses.get)
    assert last["eval_loss"] == result.summary["eval_loss"] == losses[step]
    assert (result.status, step) == ("finished", 2)
    for name, value in adapter(output / f"checkpoint-{step}").items():
        assert value.equal(adapter(output)[name])


class PressCtrlC(TrainerCallback):
    def __init__(self, after=2):
        self.after = after

    def on_step_begin(self, args, state, control, **kw):
        if state.global_step == self.after:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.fault(
    "crash",
    "Ctrl-C",
    sees="`Stopping after this step`, then the command that goes on; exit status 130",
    kept="everything: a checkpoint is saved, and resuming ends with bit-identical parameters",
)
def test_ctrl_c_then_resume_equals_uninterrupted(finished, inputs, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        on_build(patch, lambda trainer: trainer.add_callback(PressCtrlC()))
        result, text = go(inputs, output)
    assert (result.status, result.step) == ("interrupted", 3)
    assert f"celora train --output {output} --resume" in text
    assert not (output / "adapter_model.safetensors").exists()
    with (output / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "seconds": 9, "loss": 0}\n{"ste')  # as left by a process killed later

    console = Console(file=io.StringIO(), width=200)
    resumed = train(parse([], {"output": str(output), "resume": True}), console=console)
    assert (resumed.status, resumed.step) == ("finished", 6)
    assert "Resuming from checkpoint-3" in console.file.getvalue()
    whole, parts = adapter(finished[0]), adapter(output)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    rows, expected = (read_metrics(folder / "metrics.jsonl") for folder in (output, finished[0]))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "tokens_seen"):
        assert [row[key] for row in rows] == [row[key] for row in expected[:6]]
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_rows_grouped_by_length_are_resumed_in_a_later_epoch(inputs, tmp_path, monkeypatch):
    grouped = {"train_sampling_strategy": "group_by_length", "max_steps": 14, "quiet": True}
    go(inputs, tmp_path / "whole", **grouped)
    with monkeypatch.context() as patch:
        on_build(patch, lambda trainer: trainer.add_callback(PressCtrlC(after=11)))
        go(inputs, tmp_path / "parts", **grouped)
    train(parse([], {"output": str(tmp_path / "parts"), "resume": True, "quiet": True}))
    rows, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("parts", "whole"))
    assert 1 < expected[11]["epoch"] < expected[13]["epoch"]
    for key in ("loss", "tokens_seen"):
        assert [row[key] for row in rows[:14]] == [row[key] for row in expected[:14]]
    whole, parts = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.fault(
    "crash",
    "killed while a checkpoint is being written",
    sees="`checkpoint-5 was not saved to its end.`, then `Resuming from checkpoint-3.`",
    kept="the checkpoint before it; the unfinished one is passed over",
)
def test_an_incomplete_checkpoint_is_passed_over(finished, inputs, tmp_path):
    output = tmp_path / "out"
    go(inputs, output, max_steps=3)
    (output / "checkpoint-5").mkdir()
    said = []
    checkpoint, marker = OutputFolder(output).last_checkpoint(said.append)
    assert said == ["checkpoint-5 was not saved to its end."]
    assert (checkpoint.name, marker["step"]) == ("checkpoint-3", 3)


def test_resume_of_a_finished_run_says_so(finished):
    console = Console(file=io.StringIO(), width=300)
    result = train(parse([], {"output": str(finished[0]), "resume": True}), console=console)
    assert result.status == "already finished"
    assert "is finished, at step 6" in console.file.getvalue()


@pytest.mark.fault(
    "crash",
    "a queue or a supervisor starts the same command with `--resume` every time, also when no run is there yet",
    sees="`No run in out to resume: starting a new one.`; later `Resuming from checkpoint-3.`",
    kept="everything: the first start trains, the next one goes on, and the last one says that the run is finished",
)
def test_a_job_that_always_says_resume(inputs, finished, tmp_path, monkeypatch):
    output = tmp_path / "not yet" / "out"
    flags = ["--celora", json.dumps(CELORA), "--max_steps", "6", "--save_steps", "3", "--lora_dropout", "0.1"]
    flags += ["--per_device_train_batch_size", "4"]
    own = {**inputs, "output": str(output), "resume": True}

    def start():
        console = Console(file=io.StringIO(), width=300)
        return train(parse(flags, own), console=console).status, console.file.getvalue()

    with monkeypatch.context() as patch:
        on_build(patch, lambda trainer: trainer.add_callback(PressCtrlC()))
        status, text = start()
    assert status == "interrupted"
    assert next(line for line in text.splitlines() if "resum" in line.lower()) == (
        f"No run in {output} to resume: starting a new one."
    )
    status, text = start()
    assert (status, "Resuming from checkpoint-3" in text) == ("finished", True)
    assert start()[0] == "already finished"
    assert all(torch.equal(value, adapter(output)[name]) for name, value in adapter(finished[0]).items())

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(CELoraError, match=r"not from a run of celora \(thesis.tex\)"):
        train(parse(flags, own | {"output": str(tmp_path / "mine")}))


@pytest.mark.fault(
    "crash",
    "killed after the last step, before the report is written, or a file of the finished run is lost",
    sees="`out is finished, at step 6`, and which file is written again",
    kept="everything: `--resume` writes the report, and the adapter's files from the last checkpoint",
)
def test_resume_of_a_finished_run_writes_what_is_missing(finished, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "out")
    record = json.loads((output / "run.json").read_text())
    record["given"]["output"] = str(output)
    (output / "run.json").write_text(json.dumps(record))
    before = adapter(output)

    def again():
        console = Console(file=io.StringIO(), width=300)
        result = train(parse([], {"output": str(output), "resume": True}), console=console)
        return result.status, console.file.getvalue()

    (output / "report.html").write_text("of a run that was interrupted at step 3, and went on")
    os.utime(output / "report.html", (1, 1))
    status, text = again()
    assert (status, "report.html was not written to its end; it is now" in text) == ("already finished", True)
    assert "plotly" in (output / "report.html").read_text()
    (output / "report.html").unlink()
    assert again()[0] == "already finished"
    assert (output / "report.html").is_file()
    assert "report.html" not in again()[1]

    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        (output / name).unlink()
        status, text = again()
        assert (status, f"is finished, and {name} is written again" in text) == ("finished", True)
        assert (output / name).is_file()
        assert all(torch.equal(before[key], value) for key, value in adapter(output).items())
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (output / "README.md").unlink()
    with pytest.raises(CELoraError, match=r"is finished, without README.md, and no checkpoint to go on from is left"):
        again()


def test_a_finished_run_without_checkpoints_is_not_trained_again(inputs, tmp_path):
    output = tmp_path / "out"
    go(inputs, output, max_steps=-1, num_train_epochs=0.5, save_strategy="no")
    before = {entry.name: entry.stat().st_mtime_ns for entry in output.iterdir()}
    again = {"output": str(output), "resume": True, "quiet": True}
    assert train(parse(["--max_steps", "2"], again)).status == "already finished"  # at step 3
    for flags in (["--max_steps", "4"], ["--num_train_epochs", "1"]):
        with pytest.raises(CELoraError, match="no checkpoint to go on from is left; --overwrite trains anew"):
            train(parse(flags, again))
    assert {entry.name: entry.stat().st_mtime_ns for entry in output.iterdir()} == before


def test_resume_never_goes_back(inputs, tmp_path):
    output = tmp_path / "out"
    go(inputs, output, max_steps=3)
    before = adapter(output)
    shorter = {"output": str(output), "resume": True, "max_steps": 2}
    again = train(parse([], shorter), console=Console(file=io.StringIO()))
    assert (again.status, again.step) == ("already finished", 3)
    record = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    with pytest.raises(CELoraError, match="max_steps=2, but the run is saved at step 3; give more"):
        train(parse([], shorter), console=Console(file=io.StringIO()))
    assert all(torch.equal(before[name], value) for name, value in adapter(output).items())


@pytest.mark.fault(
    "crash",
    "a run with --overwrite fails before its first step",
    sees="the error that made it fail",
    kept="the earlier run, whole",
)
def test_an_overwrite_that_fails_before_its_first_step_brings_the_run_back(inputs, tmp_path, monkeypatch):
    output = tmp_path / "out"
    go(inputs, output, max_steps=3)
    before = {entry.name: entry.stat().st_size for entry in output.iterdir()}

    def fail(trainer):
        trainer.create_optimizer = lambda *_: 1 / 0

    with monkeypatch.context() as patch:
        on_build(patch, fail)
        with pytest.raises(CELoraError, match="division by zero"):
            go(inputs, output, max_steps=3, overwrite=True)
    assert {entry.name: entry.stat().st_size for entry in output.iterdir()} == before
    assert json.loads((output / "run.json").read_text())["status"] == "finished"


@pytest.mark.fault(
    "crash",
    "Ctrl-C twice before the first step of an `--overwrite` is done",
    sees="the shell again",
    kept="the earlier run, whole",
)
def test_an_overwrite_that_is_interrupted_before_its_first_step_brings_the_run_back(inputs, tmp_path, monkeypatch):
    output = tmp_path / "out"
    go(inputs, output, max_steps=1)
    files = {entry.name: entry.stat().st_size for entry in output.iterdir() if entry.is_file()}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            go(inputs, output, overwrite=True, max_steps=2)
    assert {entry.name: entry.stat().st_size for entry in output.iterdir() if entry.is_file()} == files
    assert (output / "checkpoint-1").is_dir()
    assert OutputFolder(output).run()["status"] == "finished"


def test_a_run_that_steps_ended_goes_on_for_more_epochs(inputs, tmp_path):
    output = tmp_path / "out"
    go(inputs, output, max_steps=2, save_steps=2)  # of 6 in an epoch
    result, _ = go(inputs, output, max_steps=-1, num_train_epochs=1, resume=True, save_steps=2)
    assert (result.status, result.step) == ("finished", 6)
    assert go(inputs, output, max_steps=-1, num_train_epochs=1, resume=True, save_steps=2)[0].status == (
        "already finished"
    )


def test_a_template_from_elsewhere_is_a_template(inputs, tmp_path):
    """Rows of instructions are conversations where there is one, wherever it comes from."""
    bare = tmp_path / "bare"
    shutil.copytree(inputs["model"], bare)
    template = (bare / "chat_template.jinja").rename(tmp_path / "chat_template.jinja")
    row = {"instruction": "w1 w2", "output": "w3"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    of = {"data": str(tmp_path / "rows.jsonl"), "max_steps": 1, "per_device_train_batch_size": 1}
    seen = {
        name: go(inputs, tmp_path / name, model=model, **of, **more)[0].summary["tokens_seen"]
        for name, model, more in (
            ("own", inputs["model"], {}), ("given", str(bare), {"chat_template_path": str(template)}),
        )
    }  # fmt: skip
    assert seen["given"] == seen["own"]


def test_a_loss_that_is_no_number_is_shown(inputs, tmp_path):
    with pytest.raises(CELoraError, match="holds NaN or infinity"):
        go(inputs, tmp_path / "out", learning_rate=1e30, max_grad_norm=0.0, preset="off", celora=None, max_steps=3)
    losses = [row["loss"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert losses[0] > 0
    assert losses[-1] is None


def test_an_adapter_alone_is_no_checkpoint_to_go_on_from(inputs, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        on_build(patch, lambda trainer: trainer.add_callback(PressCtrlC()))
        _, text = go(inputs, tmp_path / "out", save_only_model=True, save_steps=1)
    assert "No checkpoint to go on from is saved; start again with: celora train" in text
    _, text = go(inputs, tmp_path / "out", save_only_model=True, save_steps=1, resume=True)
    assert "checkpoint-3 holds the adapter alone (save_only_model)." in text
    assert "from the beginning: there is no checkpoint to go on from" in text


def test_audit_judges_an_adapter_with_the_configuration_it_was_trained_with(finished, inputs, tmp_path):
    request = {**inputs, "output": str(tmp_path / "none")}
    as_trained = prepare.audit_model(make_request(request), rows=4, adapter=finished[0])
    as_paper = prepare.audit_model(make_request({**request, "preset": "paper"}), rows=4, adapter=finished[0])
    assert as_trained.probed > as_paper.probed > 0


def test_a_folder_with_a_run_needs_overwrite_which_removes_only_that_run(inputs, tmp_path):
    output = tmp_path / "out"
    go(inputs, output, max_steps=3)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(CELoraError, match="already holds a run; --resume continues it, --overwrite replaces it"):
        go(inputs, output)
    go(inputs, output, max_steps=1, save_strategy="no", overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    assert not list(output.glob("checkpoint-*"))
    assert [row["step"] for row in read_metrics(output / "metrics.jsonl")] == [1]


@pytest.mark.fault(
    "crash",
    "the output folder holds files that are not celora's",
    sees="an error that names some of them",
    kept="all of them, with --overwrite, too",
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_left_alone(inputs, tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(CELoraError, match=r"not from a run of celora \(thesis.tex\)"):
        go(inputs, tmp_path, overwrite=overwrite)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_input_leaves_the_earlier_run_alone(inputs, tmp_path):
    output = tmp_path / "out"
    go(inputs, output, max_steps=1)
    before = sorted(entry.name for entry in output.iterdir())
    with pytest.raises(CELoraError, match="nowhere"):
        go({**inputs, "data": str(tmp_path / "nowhere.jsonl")}, output, overwrite=True)
    assert sorted(entry.name for entry in output.iterdir()) == before


def test_paper_preset_trains_the_balanced_rank(inputs, tmp_path):
    request = {**inputs, "output": str(tmp_path / "out"), "max_steps": 1, "lora_r": 8, "save_strategy": "no"}
    request["preset"] = "paper"
    console = Console(file=io.StringIO(), width=200)
    train(make_request(request), console=console)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 7
    assert CELoraConfig.load(tmp_path / "out").rank == "adapter"
    assert "r0 = 7: floor(7/8 of lora_r=8)" in console.file.getvalue()


def test_off_is_plain_lora_and_quiet_prints_nothing(inputs, tmp_path):
    _, text = go(inputs, tmp_path / "out", preset="off", celora=None, max_steps=2, quiet=True)
    assert text == ""
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["step"] == 2


def test_biases_train_and_are_saved_with_checkpointing(inputs, tmp_path):
    go(inputs, tmp_path / "a", bias="lora_only", lora_bias=True, gradient_checkpointing=True, max_steps=2)
    saved = adapter(tmp_path / "a")
    assert any(name.endswith("lora_B.bias") for name in saved)
    assert any(name.endswith(("q_proj.base_layer.bias", "q_proj.bias")) for name in saved)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_bias"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_target_modules": ["nothing"]}, "Target modules"),
        ({"eval_strategy": "steps"}, "--eval-data"),
        ({"eval_on_start": True}, "eval_on_start=True needs rows .* --eval-data"),
        ({"activation_offloading": True, "use_cpu": True}, "activation_offloading=True needs an accelerator"),
        ({"model": "./nowhere"}, "no such folder"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0; expected a number >= 0"),
        ({"lora_target_modules": ["["]}, "unterminated character set"),
        ({"chat_template_path": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_runs_are_one_line(inputs, tmp_path, change, message):
    with pytest.raises(CELoraError, match=message) as caught:
        go({**inputs, **change}, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr_scheduler_kwargs": {"bogus": 1}}, "no training with these settings: .*bogus"),
        ({"optim_args": "bogus"}, "no training with these settings"),
        ({"dataloader_persistent_workers": True}, "no training with these settings: .*num_workers"),
    ],
)
def test_what_a_library_refuses_late_is_one_line_and_brings_the_earlier_run_back(inputs, tmp_path, change, message):
    output = tmp_path / "out"
    go(inputs, output, max_steps=1)
    before = adapter(output)
    with pytest.raises(CELoraError, match=message) as caught:
        train(make_request({**inputs, **SHORT, **change, "output": str(output), "overwrite": True, "quiet": True}))
    assert "\n" not in str(caught.value)
    assert all(before[name].equal(value) for name, value in adapter(output).items())


def test_a_metric_that_no_evaluation_has_is_one_line(inputs, tmp_path):
    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "nope"}
    with pytest.raises(CELoraError, match=r"'eval_nope', which is not found .*eval_loss") as caught:
        go(inputs, tmp_path / "out", eval_data=inputs["data"], **best)
    assert "\n" not in str(caught.value)


def test_data_without_a_whole_batch_is_one_line(inputs, tmp_path):
    whole = {"dataloader_drop_last": True}
    with pytest.raises(CELoraError, match="no batch: 24 rows for batches of 25"):
        go(inputs, tmp_path / "out", per_device_train_batch_size=25, **whole)
    with pytest.raises(CELoraError, match="no batch: 24 rows for batches of 25"):
        prepare.audit_model(make_request({**inputs, "output": str(tmp_path), "preset": "exact", **whole}), rows=25)


def test_a_bug_and_a_lack_of_memory_are_not_refusals():
    with pytest.raises(CELoraError, match=r"no step .*: JSONDecodeError: Expecting"), trainer_module.refused("step"):
        json.loads("")
    with pytest.raises(MemoryError), trainer_module.refused("step"):
        raise MemoryError
    with pytest.raises(AttributeError, match="'r'"), trainer_module.refused("step"):
        run_module.rank_line(None)


@pytest.mark.fault(
    "numbers",
    "training diverges until the adapter holds NaN or infinity",
    sees="`the run stopped: at step 6 ... holds NaN or infinity, so nothing is saved`, and which checkpoint is whole",
    kept="the checkpoints from before; no adapter of NaN is ever saved",
)
@pytest.mark.filterwarnings("ignore:celora. a gradient of .* is not finite")
def test_an_adapter_that_is_not_finite_is_not_saved(inputs, tmp_path, monkeypatch):
    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kw):
            if state.global_step == 5:
                next(p for p in model.parameters() if p.requires_grad).data[0] = float("nan")

    with monkeypatch.context() as patch:
        on_build(patch, lambda trainer: trainer.add_callback(Diverge()))
        with pytest.raises(CELoraError, match=r"step 6 .* holds NaN or infinity.* Checkpoint-3 is whole") as caught:
            go(inputs, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "checkpoint-6").exists()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.fault(
    "crash",
    "--resume after data, model, tokenizer, chat template or evaluation rows were changed under the same name",
    sees="`the data in ... is not what the run was started with; put it back or start a new run`",
    kept="the run; put back, or copied with other dates, they are resumed from",
)
def test_nothing_that_was_changed_under_the_same_name_is_resumed_with(inputs, tmp_path):
    model, data, rows = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "held-out.jsonl"
    template = tmp_path / "own.jinja"
    own = {"model": str(shutil.copytree(inputs["model"], model)), "data": str(shutil.copy(inputs["data"], data))}
    own |= {"eval_data": str(save_rows(rows, 4)), "chat_template_path": str(template)}
    template.write_text(TEMPLATE)
    go(own, tmp_path / "out", max_steps=3)
    again = ["--max_steps", "4"], {"output": str(tmp_path / "out"), "resume": True, "quiet": True}
    for file, what in (
        (data, "data"),
        (model / "model.safetensors", "model"),
        (model / "config.json", "tokenizer or configuration"),
        (model / "tokenizer.json", "tokenizer or configuration"),
        (model / "chat_template.jinja", "tokenizer or configuration"),
        (template, "chat template"),
        (rows, "evaluation data"),
    ):
        before = file.read_bytes()
        if file == model / "model.safetensors":
            tensors = load_file(file)
            save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, file, metadata={"format": "pt"})
        else:
            file.write_bytes(before.replace(b"w7", b"w8") if file in (data, rows) else before + b"\n")
        with pytest.raises(CELoraError, match=rf"^the {what} in .* is not what the run was started with"):
            train(parse(*again))
        file.unlink()
        file.write_bytes(before)  # with other dates
    (model / "README.md").write_text("of no account")
    assert train(parse(*again)).step == 4
    other = {**again[1], "eval_data": str(save_rows(tmp_path / "other.jsonl", 5))}
    assert train(parse(["--max_steps", "5"], other)).step == 5  # which may be chosen anew


@pytest.mark.filterwarnings("ignore:`(pad|eos)_token` is deprecated:FutureWarning")
def test_special_tokens_are_resumed_with_and_secrets_are_not_written_down(inputs, tmp_path):
    output = tmp_path / "out"
    go(inputs, output, max_steps=1, pad_token="<unk>", hub_token="hf_secret")
    assert "hf_secret" not in "".join(file.read_text() for file in output.glob("*.json*"))
    own = {"output": str(output), "resume": True, "quiet": True}
    train(parse(["--max_steps", "2", "--pad_token", "<unk>", "--hub_token", "another"], own))
    train(parse(["--max_steps", "3"], own))
    assert json.loads((output / "tokenizer_config.json").read_text())["pad_token"] == "<unk>"
    with pytest.raises(CELoraError, match=r"cannot change pad_token \('<unk>' -> '<pad>'\)"):
        parse(["--pad_token", "<pad>"], own)
    with pytest.raises(CELoraError, match=r"cannot change eos_token \(None -> '<unk>'\)"):
        parse(["--eos_token", "<unk>"], own)


@pytest.mark.fault(
    "crash",
    "run.json edited by hand",
    sees="`run.json is not what a run wrote`, and what is wrong in it",
    kept="the whole folder, untouched",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"given": None}, "'given' is missing or no dict"),
        ({"train": [1]}, "'train' is missing or no dict"),
        ({"given": {"bogus": 1}}, "unknown name 'bogus'"),
        ({"given": {"max_steps": "x"}}, "max_steps='x'"),
        ({"summary": {"step": 6}}, "'summary' is missing or holds no numbers"),
        ({"summary": {"step": 6, "seconds": 1.0, "loss": "low"}}, "'summary' is missing or holds no numbers"),
    ],
)
def test_a_record_edited_by_hand_is_one_line(finished, inputs, tmp_path, change, message):
    record = json.loads((finished[0] / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | change))
    again = {**inputs, **SHORT, "output": str(tmp_path), "resume": True}
    for attempt in (lambda: parse(["--max_steps", "9"], again), lambda: train(make_request(again))):
        with pytest.raises(CELoraError, match=message) as caught:
            attempt()
        assert "run.json is not what a run wrote" in str(caught.value)


def test_metrics_edited_by_hand_do_not_spoil_the_end(inputs, tmp_path, monkeypatch):
    class Edit(TrainerCallback):
        def on_train_end(self, args, state, control, **kw):
            with (tmp_path / "out" / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(
                    '{"step": 2, "step_time_ms": "x"}\n{"step": 2, "loss": []}\n{"step": 2, "eval_loss": null}\n'
                )

    on_build(monkeypatch, lambda trainer: trainer.add_callback(Edit()))
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:[34]: not a metrics row"):
        result, _ = go(inputs, tmp_path / "out", max_steps=2)
    assert result.summary["median_step_time_ms"] > 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "finished"


def test_rows_without_a_token_to_learn(inputs, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2 w3", "completion": " w4"}\n')
    with pytest.raises(CELoraError, match="has a token to learn within max_length=2"):
        go({**inputs, "data": str(tmp_path / "rows.jsonl")}, tmp_path / "out", max_length=2)
    for packing in (False, True):
        with pytest.raises(CELoraError, match="has a token to learn within max_length=1 "):
            go(inputs, tmp_path / "out", max_length=1, packing=packing)


def test_model_folders_that_are_none(inputs, finished, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.json").write_text("{}")
    for model, message in (
        (tmp_path / "empty", "no config.json"),
        (tmp_path, "has no weights"),
        (inputs["data"], "is a file"),
        (finished[0], "is an adapter, not a model"),
    ):
        with pytest.raises(CELoraError, match=message):
            go({**inputs, "model": str(model)}, tmp_path / "out")


def test_auto_plans_at_the_start_keeps_the_plan_and_resumes_with_it(inputs, tmp_path, monkeypatch):

    without = {key: value for key, value in SHORT.items() if key != "celora"}
    whole, _ = train_auto(inputs, tmp_path / "whole", **without)
    plan = json.loads((tmp_path / "whole" / "celora_plan.json").read_text())
    assert plan["fidelity"] == 0.95
    assert whole.status == "finished"

    train_auto(inputs, tmp_path / "parts", **{**without, "max_steps": 3, "plan": str(tmp_path / "whole")})
    patch_all(monkeypatch, "celora.planning.planner:_make_plans", None)  # a resumed run must not plan again
    request = parse(["--max_steps", "6"], {"output": str(tmp_path / "parts"), "resume": True})
    assert train(request, console=Console(file=io.StringIO())).status == "finished"
    assert json.loads((tmp_path / "parts" / "celora_plan.json").read_text()) == plan


def test_a_run_that_was_given_a_plan_resumes_with_its_own_copy(inputs, tmp_path, monkeypatch):
    short, given = {key: value for key, value in SHORT.items() if key != "celora"}, tmp_path / "given.json"
    train_auto(inputs, tmp_path / "planned", **short | {"max_steps": 1})
    plan = json.loads((tmp_path / "planned" / "celora_plan.json").read_text())
    given.write_text(json.dumps(plan))
    train_auto(inputs, tmp_path / "out", **short | {"max_steps": 1, "plan": str(given)})
    other = plan | {"layers": plan["layers"][:1], "threads": 77}
    for step, change in enumerate((lambda: given.write_text(json.dumps(other)), given.unlink), 2):
        change()
        request = parse(["--max_steps", str(step)], {"output": str(tmp_path / "out"), "resume": True})
        assert train(request, console=Console(file=io.StringIO())).step == step
        assert json.loads((tmp_path / "out" / "celora_plan.json").read_text()) == plan
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    train(parse(["--max_steps", "4"], {"output": str(tmp_path / "out"), "resume": True}), console=console)
    assert "threads and torch has 77 here. The run goes on with it" in console.file.getvalue()


def train_auto(inputs, output, **more):
    console = Console(file=io.StringIO(), width=200)
    fidelity = {} if "plan" in more else {"fidelity": 0.95}
    request = make_request({**inputs, "output": str(output), "preset": "auto", **fidelity, **more})
    return train(request, console=console), console.file.getvalue()


def test_a_run_too_short_for_a_plan_to_pay_is_exact(inputs, tmp_path, monkeypatch):
    """And stays it when it is resumed for more steps; a word about a plan, or a longer run, makes one."""
    auto = {"celora": None, "save_steps": 1, "max_steps": 2}
    output, plans = tmp_path / "out", []
    patch_all(monkeypatch, "celora.train.planning:make_plan", lambda *_: plans.append(1) or 1 / 0)
    _, text = go(inputs, output, **auto)
    (line,) = (line for line in text.splitlines() if "too short" in line)
    assert line.startswith("Preset exact: too short for a plan to pay, 2 forward and backward passes")
    assert not (output / "celora_plan.json").exists()
    assert CELoraConfig.load(output) == resolve("exact")
    patch_all(monkeypatch, "celora.train.planning:FEWEST_PASSES", 1)
    request = parse(["--max_steps", "3"], {"output": str(output), "resume": True, "quiet": True})
    assert train(request).step == 3
    assert CELoraConfig.load(output) == resolve("exact")
    assert plans == []

    for more in ({}, {"fidelity": 0.9}, {"memory_limit": 1.0}):
        patch_all(monkeypatch, "celora.train.planning:FEWEST_PASSES", 400 if more else 1)
        with pytest.raises(CELoraError, match="division by zero"):
            go(inputs, tmp_path / "long", **auto | more)
    assert len(plans) == 3


def test_the_passes_of_a_run_are_counted_before_it(inputs, tmp_path, monkeypatch):
    """24 rows: against what the Trainer comes to."""
    for given, expected in (
        ({"max_steps": 5, "gradient_accumulation_steps": 3}, 15),
        ({"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 5}, 10),
        ({"max_steps": -1, "num_train_epochs": 0.5, "per_device_train_batch_size": 4}, 3),
    ):
        request = make_request({**inputs, "output": str(tmp_path), "preset": "exact", **given})
        with prepare.prepared(request, None, None) as (trainer, _):
            assert planning.passes(trainer) == expected


def test_one_table_of_layers_and_errors_by_the_plan_until_they_are_measured(inputs, tmp_path):
    """Within the first refresh nothing is measured; what the plan has measured then is told as such."""
    output, auto = tmp_path / "out", {"preset": "auto", "celora": None, "max_steps": 3}
    go(inputs, tmp_path / "planned", fidelity=0.9, **auto | {"max_steps": 1})
    plan = json.loads((tmp_path / "planned" / "celora_plan.json").read_text())
    plan["settings"] = [{"estimator": "dense"}, {"estimator": "columns", "keep_ratio": 0.5, "rank": 4}]
    plan["head"] = None
    for i, layer in enumerate(plan["layers"]):  # so small a model is left exact otherwise
        layer |= {"candidates": [[0, 1.0, 0.0, 0], [1, 0.5, 0.3 + i / 100, 0]], "chosen": 1}
    (tmp_path / "plan.json").write_text(json.dumps(plan))

    _, text = go(inputs, output, plan=str(tmp_path / "plan.json"), **auto)
    record = json.loads((output / "run.json").read_text())
    summary, planned = record["summary"], record["planned_errors"]
    assert len([line for line in text.splitlines() if line.startswith("layers ")]) == 1
    names = [layer["name"] for layer in plan["layers"]]
    assert f"{len(names)} of 14 frozen layers estimated, refreshed every 200 optimizer steps." in text
    assert planned == {name: 0.3 + i / 100 for i, name in enumerate(names)}
    assert (summary["layers_measured"], summary["layers_not_measured"]) == (0, len(names))
    assert (summary["worst_relative_error"], summary["worst_planned_error"]) == (None, max(planned.values()))


def test_errors_that_were_measured_are_not_told_by_the_plan():
    measured, planned = {"a": 0.1, "b": 0.2}, {"b": 0.7, "c": 0.8, "d": 0.5}
    assert record.worst(measured, planned) == {
        "layers_measured": 2,
        "worst_relative_error": 0.2,
        "layers_not_measured": 2,
        "worst_planned_error": 0.8,
    }


def test_every_private_method_that_the_trainer_overrides_is_listed():
    """`test_borrowed` sees to it that the installed libraries have them: ours would never be called otherwise."""
    ours = [cls for cls in trainer_module.Trainer.__mro__ if cls.__module__.startswith("celora.")]
    private = {name for cls in ours for name in vars(cls) if name.startswith("_") and not name.startswith("__")}
    assert private & set(dir(SFTTrainer)) <= {name.rpartition(".")[2] for name in trainer_module.OVERRIDDEN}


def test_a_method_that_the_libraries_no_longer_have_is_said_at_the_start(inputs, tmp_path, monkeypatch):
    found = borrowed._look_up
    gone = {"trl:SFTTrainer._prepare_dataset", "transformers:Trainer._load_from_checkpoint"}
    go(inputs, tmp_path / "out", max_steps=3)
    for name in ("adapter_model.safetensors", "report.html"):
        (tmp_path / "out" / name).unlink()
    patch_all(monkeypatch, "celora.borrowed:_look_up", lambda name: None if name in gone else found(name))
    borrowed._say_missing.cache_clear()
    with (
        pytest.warns(UserWarning, match="no trl.SFTTrainer._prepare_dataset, so neither a row that the chat template"),
        pytest.warns(UserWarning, match="no transformers.Trainer._load_from_checkpoint, so a run that was stopped"),
        pytest.raises(CELoraError, match=r"checkpoint-3 is the run's last step, .* give a larger --max_steps"),
    ):
        go(inputs, tmp_path / "out", max_steps=3, resume=True)


def test_planning_does_not_change_the_order_of_the_data(inputs, tmp_path):
    seen = {}
    for preset in ("off", "auto"):
        losses = []
        request = make_request(
            {
                **inputs,
                "output": str(tmp_path / preset),
                "preset": preset,
                "max_steps": 3,
                "per_device_train_batch_size": 4,
            }
            | ({"fidelity": 1.0} if preset == "auto" else {})
        )
        train(request, console=Console(file=io.StringIO()))
        losses = [row["loss"] for row in read_metrics(tmp_path / preset / "metrics.jsonl")]
        seen[preset] = losses
    assert seen["auto"] == pytest.approx(seen["off"], rel=1e-3)


def test_metrics_say_where_the_time_goes(inputs, tmp_path):
    go(inputs, tmp_path / "a", max_steps=3, preset="paper", celora=None, gradient_accumulation_steps=2)
    rows = [row for row in read_metrics(tmp_path / "a" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        parts = [row[f"{phase}_ms"] for phase in ("forward", "backward", "optimizer")]
        assert min(parts) > 0
        assert sum(parts) <= row["step_time_ms"]
        assert row["peak_memory_mib"] > 50
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert {layer["name"].rpartition(".")[2] for layer in record["layers"]} >= {"q_proj", "up_proj"}


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("preset", ["off", "exact"])
def test_label_smoothing_is_the_same_in_the_head(preset, inputs, tmp_path):
    """Transformers' LabelSmoother over all logits, and the head that smooths as it goes."""
    go(inputs, tmp_path / preset, max_steps=3, preset=preset, celora=None, lora_dropout=0.0, label_smoothing_factor=0.1)
    losses = [row["loss"] for row in read_metrics(tmp_path / preset / "metrics.jsonl") if "loss" in row]
    assert losses == pytest.approx(_SMOOTHED.setdefault("losses", losses), rel=1e-5)


_SMOOTHED: dict[str, list[float]] = {}
