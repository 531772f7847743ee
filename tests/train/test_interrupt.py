"""Ctrl-C ends a run after a whole step. The resumed run ends like one that was never interrupted."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

from celora.train.interrupt import StopAtStepEnd
from celora.train.progress import read_metrics
from celora.train.request.arguments import parse
from celora.train.run import train
from runs import PressCtrlC, adapter, go, on_build


def test_ctrl_c_then_resume_equals_uninterrupted(finished, inputs, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        on_build(patch, lambda trainer: trainer.add_callback(PressCtrlC()))
        result, text = go(inputs, output)
    assert (result.status, result.step) == ("interrupted", 3)
    assert f"celora train --output {output} --resume" in text
    assert not (output / "adapter_model.safetensors").exists()
    with (output / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "seconds": 9, "loss": 0}\n{"ste')  # a process that is killed later leaves such lines

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


ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture(autouse=True)
def _with_a_terminal() -> Iterator[None]:
    """Whatever started these tests may ignore SIGHUP."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDS)
def test_what_ends_a_run_from_outside_leaves_its_checkpoint(number, inputs, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        on_build(patch, lambda trainer: trainer.add_callback(PressCtrlC(sends=number)))
        result, _ = go(inputs, tmp_path / "out")
    assert (result.status, result.step) == ("interrupted", 3)
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_stop_saves_the_step_that_is_evaluated_though_it_is_not_the_best(inputs, tmp_path, monkeypatch):
    best = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "greater_is_better": True}
    on_build(monkeypatch, lambda trainer: trainer.add_callback(PressCtrlC(after=3)))
    result, text = go(
        inputs, tmp_path, **best, eval_strategy="steps", eval_steps=1, eval_data=inputs["data"], learning_rate=1e-2
    )
    assert (result.status, result.step) == ("interrupted", 4)
    assert "Saved checkpoint-4; continue" in text
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system closes terminals otherwise")
def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopAtStepEnd(Console(quiet=True)).listening():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert callable(signal.getsignal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


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


def test_an_adapter_alone_is_no_checkpoint_to_go_on_from(inputs, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        on_build(patch, lambda trainer: trainer.add_callback(PressCtrlC()))
        _, text = go(inputs, tmp_path / "out", save_only_model=True, save_steps=1)
    assert "No checkpoint to go on from is saved; start again with: celora train" in text
    _, text = go(inputs, tmp_path / "out", save_only_model=True, save_steps=1, resume=True)
    assert "checkpoint-3 holds the adapter alone (save_only_model)." in text
    assert "from the beginning: there is no checkpoint to go on from" in text
