"""What a run says that PEFT alone would have taken: the same batches in turns, and nothing left behind."""

from __future__ import annotations

import json

import pytest
import torch

from celora.cli.main import main
from celora.errors import CELoraError
from celora.modeling.switch import Mode
from celora.runtime.attachment import require
from celora.train.without import seconds_of_peft
from patching import patch_all
from runs import go, on_build

STEPS = 80  # the fewest that are told


@pytest.fixture
def trained(inputs, tmp_path, monkeypatch):
    """A trainer after a short run, and the calls that were timed from then on: whether celora was on, and gradients."""
    trainers, calls = [], []
    on_build(monkeypatch, trainers.append)
    go(inputs, tmp_path / "out", max_steps=2, eval_data=inputs["data"])  # step 2 refreshes, and an evaluation ends it
    (trainer,) = trainers
    assert not trainer.model.training
    attachment = require(trainer.model)

    def timed(call, device):
        call()
        assert trainer.model.training
        assert all(graft.mode is not Mode.OBSERVE for graft in attachment.grafts.values() if graft.estimator.ready)
        calls.append((attachment.switch.on, [p.grad for p in trainer.model.parameters() if p.requires_grad]))
        return 100.0 if len(calls) <= 2 else 3.0 if attachment.switch.on else 7.5  # the first pair warms up

    patch_all(monkeypatch, "celora.train.without:timed", timed)
    return trainer, calls


def test_both_take_turns_at_the_same_batches(trained):
    trainer, calls = trained
    trainer.phases.seconds |= {"forward": 20.0, "backward": 40.0}
    assert seconds_of_peft(trainer, 70.0, 2 * STEPS, lambda: None) == pytest.approx(70.0 + (7.5 / 3 - 1) * 60)
    assert [on for on, _ in calls] == [True, False] * 4
    assert all(grad is not None and grad.isfinite().all() for _, grads in calls for grad in grads)


def test_nothing_is_left_behind(trained):
    trainer, _ = trained
    state = torch.get_rng_state()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    assert seconds_of_peft(trainer, 70.0, STEPS, lambda: None) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(map(torch.equal, before, trainer.model.parameters()))
    assert require(trainer.model).switch.on
    assert not trainer.model.training
    assert all(graft.mode is Mode.OBSERVE for graft in require(trainer.model).grafts.values())


def test_short_runs_and_large_logits_are_not_measured(trained, monkeypatch):
    trainer, calls = trained
    said = []
    assert seconds_of_peft(trainer, 70.0, STEPS - 1, lambda: said.append(1)) is None
    assert not said
    patch_all(monkeypatch, "celora.train.without:available_memory", lambda device: 1000)
    assert seconds_of_peft(trainer, 70.0, STEPS, lambda: None) is None
    assert not calls


def test_memory_that_runs_out_costs_the_answer_only(trained, monkeypatch):
    trainer, _ = trained

    def full(call, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    patch_all(monkeypatch, "celora.train.without:timed", full)
    assert seconds_of_peft(trainer, 70.0, STEPS, lambda: None) is None
    assert require(trainer.model).switch.on


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the measurement, which says 12.34 seconds."""
    seen = []

    def measured(trainer, seconds, steps, begin):
        seen.append((seconds, steps))
        begin()
        return 12.34

    patch_all(monkeypatch, "celora.train.without:seconds_of_peft", measured)
    return seen


def test_the_command_says_it_and_so_do_record_and_report(inputs, tmp_path, asked, capsys):
    out = tmp_path / "out"
    command = ["train", "--model", inputs["model"], "--data", inputs["data"], "--max_steps", "2", "--output"]
    assert main([*command, str(out), "--preset", "exact"]) == 0
    printed = capsys.readouterr()
    assert "With PEFT alone, train would have taken about 12.3 s (measured on batches of this run)." in printed.out
    assert "Measuring what PEFT would have taken" in printed.err
    summary = json.loads((out / "run.json").read_text())["summary"]
    assert summary["train_seconds_of_peft"] == 12.34
    assert asked == [(pytest.approx(summary["train_seconds"], abs=0.01), 2)]
    page = (out / "report.html").read_text()
    assert "train with PEFT alone, about" in page
    assert "12.3" in page
    assert main([*command, str(tmp_path / "off"), "--preset", "off"]) == 0
    assert main([*command, str(tmp_path / "budget"), "--preset", "exact", "--memory", "64GiB"]) == 0
    go(inputs, tmp_path / "studies do not ask")
    assert len(asked) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no kernel"), CELoraError("no state")])
def test_a_finished_run_stays_finished(error, inputs, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise error

    patch_all(monkeypatch, "celora.train.without:seconds_of_peft", fails)
    command = ["train", "--model", inputs["model"], "--data", inputs["data"], "--max_steps", "2", "--preset", "exact"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert f"Not measured: {str(error) or 'interrupted'}." in capsys.readouterr().err


def test_a_finished_run_stays_finished_where_nothing_more_can_be_written(inputs, tmp_path, monkeypatch, capsys):
    def fills_the_disk(*_):
        patch_all(monkeypatch, "celora.files:write_json", full)
        return 12.34

    def full(path, _):
        raise CELoraError(f"cannot write '{path.name}': No space left on device; what was there is unchanged")

    patch_all(monkeypatch, "celora.train.without:seconds_of_peft", fills_the_disk)
    command = ["train", "--model", inputs["model"], "--data", inputs["data"], "--max_steps", "2", "--preset", "exact"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert "Not recorded: cannot write 'run.json': No space left on device" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "finished"
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "finished"
    assert "train_seconds_of_peft" not in record["summary"]
