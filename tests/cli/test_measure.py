"""`celora audit`: it measures what training does, and writes nothing."""

from __future__ import annotations

import json

import pytest
from trl import SFTTrainer

from asked import error_line
from celora.cli import measure
from celora.cli.main import main
from tiny import save_rows, save_tiny_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return folder, save_tiny_model(folder / "model"), save_rows(folder / "rows.jsonl", 8)


def test_it_audits_the_batches_of_training(inputs, capsys):
    _, model, rows = inputs
    audit = ["audit", "--model", model, "--data", rows, "--rows", 4, "--preset", "paper", "--json"]
    assert main([str(a) for a in audit]) == 0
    assert 0.2 < json.loads(capsys.readouterr().out)["cosine"] < 1


def test_it_has_the_threads_that_training_has(inputs, capsys, tmp_path, monkeypatch):
    settled = []
    monkeypatch.setattr(measure, "settle_in", lambda: settled.append(1))
    monkeypatch.chdir(tmp_path)
    assert main(["audit", "--model", str(inputs[1]), "--data", str(tmp_path)]) == 2
    assert settled == [1]


def test_audit_and_estimate_take_a_file_of_a_training_and_send_nothing(inputs, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(SFTTrainer, "init_hf_repo", lambda *_: pytest.fail("a repository was made on the hub"))
    _, model, rows = inputs
    (tmp_path / "run.yaml").write_text(
        f"model: {model}\ndata: {rows}\neval_data: {rows}\neval_strategy: steps\nsave_strategy: best\n"
        "load_best_model_at_end: true\neval_on_start: true\npush_to_hub: true\nreport_to: trackio\n"
    )
    audit = ["audit", "--preset", "paper", "--config", tmp_path / "run.yaml", "--quiet"]
    assert main([str(a) for a in audit]) == 0
    estimate = ["estimate", "--config", tmp_path / "run.yaml", "--preset", "exact", "--dtype", "float32"]
    assert main([str(a) for a in estimate]) == 0


def test_flags_that_would_change_nothing_are_refused(inputs, capsys, tmp_path):
    given = ["--model", inputs[1], "--data", inputs[2]]
    audit = ["audit", *given]
    assert "--eval_data is not for celora audit" in error_line(capsys, *audit, "--eval_data", "rows.jsonl")
    assert "--memory is not for celora audit" in error_line(capsys, *audit, "--memory", "8GiB")
    assert "--overwrite is not for celora audit" in error_line(capsys, *audit, "--overwrite")
    line = error_line(capsys, *audit, "--adapter", tmp_path, "--lora-r", 4)
    assert line == "error: --lora_r is not for an existing adapter, which has its own; leave it out."
