"""What a run says that PEFT alone would have taken: the same batches in turns, and nothing left behind."""

from __future__ import annotations

import json

import pytest
import torch

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
    go(inputs, tmp_path / "out", max_steps=2)
    (trainer,) = trainers
    attachment = require(trainer.model)

    def timed(call, device):
        call()
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


def test_a_run_says_it(inputs, tmp_path, monkeypatch):
    asked = []

    def measured(trainer, seconds, steps, begin):
        asked.append((seconds, steps))
        begin()
        return 12.34

    patch_all(monkeypatch, "celora.train.without:seconds_of_peft", measured)
    result, text = go(inputs, tmp_path / "out")
    assert "Measuring what PEFT would have taken ..." in text
    ((seconds, steps),) = asked
    assert steps == 6
    assert seconds == pytest.approx(result.summary["train_seconds"], abs=0.01)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["summary"]["train_seconds_of_peft"] == 12.34
    page = (tmp_path / "out" / "report.html").read_text()
    assert "training with PEFT alone would have taken about, s" in page
    go(inputs, tmp_path / "off", preset="off", celora=None)
    assert len(asked) == 1
