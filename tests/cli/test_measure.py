"""`celora plan` and `celora audit`: they measure what training does, and write nothing else."""

from __future__ import annotations

import json

import pytest
from trl import SFTTrainer

from asked import error_line
from celora.cli import measure
from celora.cli.main import main
from patching import patch_all
from tiny import save_rows, save_tiny_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return folder, save_tiny_model(folder / "model"), save_rows(folder / "rows.jsonl", 8)


def test_plan_then_audit_and_train_with_it(inputs, capsys, tmp_path, monkeypatch):
    _, model, rows = inputs
    probed = []
    patch_all(monkeypatch, "celora.planning.forward_evidence:forward_evidence", lambda bench, layers: probed.append(1))
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
    assert not probed
    assert main([str(a) for a in [*plan, "--overwrite", "--quiet", "--json", "--forward"]]) == 0
    assert probed
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
    assert "fidelity is for preset auto, not for paper" in error_line(
        capsys, *base, "--preset", "paper", "--fidelity", 0.9
    )
    assert "fidelity=1.5; expected a cosine" in error_line(capsys, *base, "--preset", "auto", "--fidelity", 1.5)
    assert "fidelity=0.0; expected a cosine" in error_line(capsys, *plan, "--overwrite", "--fidelity", 0)
    assert "memory_limit=-1;" in error_line(capsys, *base, "--preset", "auto", "--memory_limit", -1)
    assert "expected a file in a folder that exists" in error_line(capsys, *plan[:5], "--output", tmp_path)


@pytest.mark.parametrize("command", ["plan", "audit"])
def test_it_has_the_threads_that_training_has(command, inputs, capsys, tmp_path, monkeypatch):
    """A plan is for a number of threads, and `audit --plan` would refuse one of other threads."""
    settled = []
    monkeypatch.setattr(measure, "settle_in", lambda: settled.append(command))
    monkeypatch.chdir(tmp_path)
    assert main([command, "--model", str(inputs[1]), "--data", str(tmp_path)]) == 2
    assert settled == [command]


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


def test_plan_audit_and_estimate_take_a_file_of_a_training_and_send_nothing(inputs, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(SFTTrainer, "init_hf_repo", lambda *_: pytest.fail("a repository was made on the hub"))
    _, model, rows = inputs
    (tmp_path / "run.yaml").write_text(
        f"model: {model}\ndata: {rows}\neval_data: {rows}\neval_strategy: steps\nsave_strategy: best\n"
        "load_best_model_at_end: true\neval_on_start: true\npush_to_hub: true\nreport_to: trackio\n"
    )
    for command in (["plan", "--output", tmp_path / "plan.json"], ["audit", "--preset", "paper"]):
        assert main([str(a) for a in (*command, "--config", tmp_path / "run.yaml", "--quiet")]) == 0
    estimate = ["estimate", "--config", tmp_path / "run.yaml", "--preset", "exact", "--dtype", "float32"]
    assert main([str(a) for a in estimate]) == 0


def test_plan_takes_a_file_of_a_training_with_a_plan(inputs, capsys, tmp_path):
    _, model, rows = inputs
    (tmp_path / "run.yaml").write_text(f"model: {model}\ndata: {rows}\nplan: {tmp_path / 'gone.json'}\n")
    command = ["plan", "--config", tmp_path / "run.yaml", "--output", tmp_path / "plan.json", "--fidelity", 0.99]
    assert main([str(a) for a in (*command, "--quiet")]) == 0


def test_flags_that_would_change_nothing_are_refused(inputs, capsys, tmp_path):
    given = ["--model", inputs[1], "--data", inputs[2]]
    plan, audit = ["plan", *given, "--output", tmp_path / "plan.json"], ["audit", *given]
    assert "--preset is not for celora plan" in error_line(capsys, *plan, "--preset", "paper")
    assert "--plan is not for celora plan" in error_line(capsys, *plan, "--plan", "plan.json")
    assert "--output is not for celora plan by another name" in error_line(capsys, *plan, "--output_dir", tmp_path)
    assert "--eval_data is not for celora audit" in error_line(capsys, *audit, "--eval_data", "rows.jsonl")
    assert "--memory is not for celora audit" in error_line(capsys, *audit, "--memory", "8GiB")
    assert "--memory is not for celora plan" in error_line(capsys, *plan, "--memory", "8GiB")
    assert "--overwrite is not for celora audit" in error_line(capsys, *audit, "--overwrite")
    for command in (plan, audit):
        line = error_line(capsys, *command, "--adapter", tmp_path, "--lora-r", 4)
        assert line == "error: --lora_r is not for an existing adapter, which has its own; leave it out."
