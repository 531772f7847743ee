"""--resume continues a stopped run, and --overwrite replaces a run. Neither ever loses a run."""

from __future__ import annotations

import io
import json
import os
import shutil

import pytest
import torch
from rich.console import Console

from celora.errors import CELoraError
from celora.train import trainer as trainer_module
from celora.train.output.folder import OutputFolder
from celora.train.progress import read_metrics
from celora.train.request.arguments import make_request, parse
from celora.train.run import train
from runs import CELORA, SHORT, PressCtrlC, adapter, go, on_build


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
    found = adapter(output)
    assert all(torch.equal(value, found[name]) for name, value in adapter(finished[0]).items())

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(CELoraError, match=r"not from a run of celora \(thesis.tex\)"):
        train(parse(flags, own | {"output": str(tmp_path / "mine")}))


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
    errors = json.loads((output / "run.json").read_text())["errors"]
    assert errors == record["errors"] != {}  # what refreshes measured is in the checkpoint, too
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


def test_a_new_run_that_fails_before_its_first_step_leaves_none(inputs, tmp_path, monkeypatch):
    """Also with --resume, so that the command can be given again with another setting."""
    own = {**inputs, "output": str(tmp_path / "out"), "resume": True, "quiet": True}

    def fail(trainer):
        trainer.create_optimizer = lambda *_: 1 / 0

    with monkeypatch.context() as patch:
        on_build(patch, fail)
        with pytest.raises(CELoraError, match="division by zero"):
            train(parse(["--max_steps", "1"], own))
    assert OutputFolder(tmp_path / "out").run() is None
    assert train(parse(["--max_steps", "1", "--per_device_train_batch_size", "2"], own)).status == "finished"


def test_a_run_from_before_a_field_goes_on(inputs, tmp_path):
    own = {**inputs, "output": str(tmp_path / "out"), "resume": True, "quiet": True}
    train(parse(["--max_steps", "1", "--preset", "exact"], own))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    del record["config"]["saved_input"]
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    assert train(parse(["--max_steps", "2"], own)).step == 2


def test_a_resumed_run_saves_logs_and_evaluates_when_it_is_told_to_now(inputs, tmp_path, capfd):
    go(inputs, tmp_path, max_steps=2, save_steps=2)
    often = {"save_steps": 1, "save_total_limit": 0, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    go(inputs, tmp_path, **often, max_steps=6, eval_data=inputs["data"], resume=True)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in range(2, 7)]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 6]
    assert "do not match" not in capfd.readouterr().err


def test_a_run_that_steps_ended_goes_on_for_more_epochs(inputs, tmp_path):
    output = tmp_path / "out"
    go(inputs, output, max_steps=2, save_steps=2)  # an epoch has 6 steps
    result, _ = go(inputs, output, max_steps=-1, num_train_epochs=1, resume=True, save_steps=2)
    assert (result.status, result.step) == ("finished", 6)
    assert go(inputs, output, max_steps=-1, num_train_epochs=1, resume=True, save_steps=2)[0].status == (
        "already finished"
    )


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"given": None}, "'given' is missing or no dict"),
        ({"train": [1]}, "'train' is missing or no dict"),
        ({"asked": 3}, "'asked' is missing or no dict"),
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
