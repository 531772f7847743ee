"""`celora compare`, `bench`, `demo` and `doctor` as commands."""

from __future__ import annotations

import json

import pytest

from asked import error_line
from celora.cli.main import main
from tiny import save_rows, save_tiny_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return folder, save_tiny_model(folder / "model"), save_rows(folder / "rows.jsonl", 8)


def test_an_arm_may_be_written_in_any_case(inputs, capsys, tmp_path):
    given = ["--model", inputs[1], "--data", inputs[2], "--max_steps", 1, "--seeds", 1, "--quiet", "--json"]
    arms = ["--arm", "lora", "--arm", "EXACT"]
    assert main([str(a) for a in ["compare", *given, "--output", tmp_path / "out", *arms]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["against"], [one["arm"] for one in found["outcomes"]]) == ("LoRA", ["LoRA", "exact"])
    assert "unknown arm 'loar'. Known: LoRA, " in error_line(capsys, "compare", "--arm", "loar", "--quiet")
    assert "unknown arm 'exat'; did you mean 'exact'" in error_line(capsys, "bench", "--quick", "--arm", "exat")


def test_demo(demo, tmp_path, capsys):
    from celora.studies.demo import DemoRow

    demo(lambda output, seeds, quiet: DemoRow("LoRA", seeds, 0.9, 4, 1, 8, 10.0, 1.0, 1.0, 1, "float32", "2"))
    given = ["demo", "--output", str(tmp_path), "--seeds", "2"]
    assert main([*given, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["arm"], row["seed"], row["accuracy"]) == ("LoRA", 2, 0.9)
    assert main(given) == 0
    text, said = capsys.readouterr()
    assert said.startswith("LoRA, CE-LoRA as published and celora's default")
    assert "90.0%" in text
    assert str(tmp_path) in "".join(text.split("\n"))
    assert main([*given, "--quiet"]) == 0
    text, said = capsys.readouterr()
    assert "Report" not in text
    assert said == ""
