"""What a run leaves in its record."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
from transformers import TrainerCallback

import celora
from celora.train import record
from runs import go, on_build


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


def test_a_copy_that_was_never_installed_has_no_version_there(inputs, tmp_path, monkeypatch):
    version = metadata.version

    def of_others(name):
        if name == "celora":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("celora.machine.packages.metadata.version", of_others)
    go(inputs, tmp_path / "out", max_steps=1)
    document = json.loads((tmp_path / "out" / "run.json").read_text())
    assert document["celora"] == celora.__version__
    assert document["versions"]["celora"] is None
    assert document["versions"]["torch"] == version("torch")


def test_a_loss_of_an_earlier_evaluation_is_not_shown_beside_the_last_one(inputs, tmp_path, monkeypatch):
    class Edit(TrainerCallback):
        def on_train_end(self, args, state, control, **kw):
            both = {"eval_base_loss": 2.25, "eval_base_mean_token_accuracy": 0.5}
            rows = {"step": 1, "eval_loss": 2.5, **both}, {"step": 2, "eval_loss": 2.0}
            with (tmp_path / "out" / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    on_build(monkeypatch, lambda trainer: trainer.add_callback(Edit()))
    result, _ = go(inputs, tmp_path / "out", max_steps=2)
    assert result.summary["eval_loss"] == 2.0
    assert not [name for name in result.summary if "_base_" in name]


def test_a_forward_that_became_exact_is_no_longer_the_worst():
    errors = {"a": 0.01, "b": 0.02, "head": 0.3}
    assert record.of_forwards(errors, {"head"}) == {"worst_forward_error": 0.02, "forwards_made_exact": 1}
    assert record.of_forwards({}, set()) == {}


def test_the_worst_error_is_the_largest_that_was_measured():
    assert record.worst({"a": 0.1, "b": 0.2}) == {"layers_measured": 2, "worst_relative_error": 0.2}
    assert record.worst({}) == {"layers_measured": 0, "worst_relative_error": None}
