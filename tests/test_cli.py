"""The command line: exit status, one line for each mistake, help that teaches."""

from __future__ import annotations

import json
import sys
import types

import pytest

from celora.cli import main
from tiny import save_rows, save_tiny_model


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


def test_train_then_audit_the_adapter(inputs, capsys, tmp_path):
    _, model, rows = inputs
    train = ["train", "--model", model, "--data", rows, "--output", tmp_path / "out", "--max_steps", 2, "--lora-r", 8]
    assert main([str(a) for a in [*train, "--preset", "paper"]]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("finished: step 2  loss ")
    assert "r0 = 7" in captured.err

    audit = ["audit", "--model", model, "--data", rows, "--adapter", tmp_path / "out", "--rows", 4]
    assert main([str(a) for a in [*audit, "--json"]]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0.5 < report["cosine"] <= 1
    assert report["per_layer"]
    assert main([str(a) for a in ["audit", "--model", model, "--data", rows, "--preset", "off"]]) == 0
    assert "cosine 1.0000" in capsys.readouterr().out


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
    assert "memory_limit=-1;" in error_line(capsys, *base, "--preset", "auto", "--memory_limit", -1)
    assert "expected a file in a folder that exists" in error_line(capsys, *plan[:5], "--output", tmp_path)


def test_mistakes_are_one_line_and_status_2(inputs, capsys, tmp_path):
    _, model, rows = inputs
    out = ["--output", tmp_path / "out"]
    base = ["train", "--model", model, "--data", rows, *out]
    assert "'paper'" in error_line(capsys, *base, "--preset", "papr")
    assert "'max_steps'" in error_line(capsys, *base, "--max_stps", 3)
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
    assert "key 'lr'" in error_line(capsys, *base, "--config", bad)

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


def test_demo_is_called_and_ctrl_c_is_130(monkeypatch, tmp_path):
    called = {}
    demo = types.ModuleType("celora.train.demo")
    demo.run_demo = lambda output, *, seeds: called.update(output=output, seeds=seeds)
    monkeypatch.setitem(sys.modules, "celora.train.demo", demo)
    assert main(["demo", "--output", str(tmp_path), "--seeds", "2"]) == 0
    assert called == {"output": tmp_path, "seeds": 2}

    def interrupted(output, *, seeds):
        raise KeyboardInterrupt

    demo.run_demo = interrupted
    assert main(["demo"]) == 130
