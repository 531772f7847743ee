"""The bench: every arm does the same work, and rows add up. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import forked
from celora.cli import main as cli
from celora.errors import CELoraError
from celora.studies import bench
from celora.studies.bench import measure, table
from celora.studies.cells import Cell, parse_cell
from patching import patch_all

SMALL = Cell("h64-v1k", "instruct", "float32", 64)


def test_rows_add_up() -> None:
    rows = measure(SMALL, ("PEFT", "exact", "limit", "Unsloth"), repeats=2, memory=False)
    assert [row["arm"] for row in rows] == ["PEFT", "exact", "limit", "Unsloth"]
    plain, exact, limit, absent = rows
    assert plain["speed_up"] == 1
    assert exact["speed_up"] == pytest.approx(plain["time_ms"] / exact["time_ms"], rel=1e-3)
    assert limit.get("share_of_limit", 1) == 1  # no share, if noise made the limit no faster than PEFT
    assert exact["saved_for_backward"] < plain["saved_for_backward"]
    for row in rows[:3]:
        parts = row["forward_ms"] + row["backward_ms"] + row["optimizer_ms"]
        assert parts == pytest.approx(row["time_ms"], rel=0.5)
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens"] / row["time_ms"], rel=0.05)
    if not torch.cuda.is_available():
        assert absent["not_run"] == "needs a CUDA device"
        assert "not run: needs a CUDA device" in table(rows)
    assert len(table(rows).splitlines()) == 6


def test_an_arm_that_patches_transformers_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def alone(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(json.loads(command[-1]))
        return SimpleNamespace(returncode=0, stdout=json.dumps(bench._run_alone(asked[-1])))

    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=alone))
    monkeypatch.setattr(bench, "PATCHING", ("exact",))
    plain, exact = measure(SMALL, ("PEFT", "exact"), repeats=3, memory=False)
    assert [request["arm"] for request in asked] == ["exact"]
    assert exact["speed_up"] == pytest.approx(plain["time_ms"] / exact["time_ms"], rel=1e-3)
    assert exact["saved_for_backward"] < plain["saved_for_backward"]
    assert exact["peak_memory"] is None


def test_an_arm_that_fails_alone_costs_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(command: list[str], **_: Any) -> SimpleNamespace:
        if json.loads(command[-1])["arm"] == "exact":
            return SimpleNamespace(returncode=1, stderr="Traceback\nOutOfMemoryError: tried to allocate 2 GiB\n")
        return SimpleNamespace(returncode=0, stdout=json.dumps({"peak": 7}))

    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=alone))
    plain, exact = measure(SMALL, ("PEFT", "exact"), repeats=2)
    assert plain["peak_memory"] == 7
    assert exact["not_run"] == "measuring 'exact' alone failed: OutOfMemoryError: tried to allocate 2 GiB"
    assert "time_ms" not in exact


def test_the_share_of_a_limit_that_saves_nothing_is_not_told() -> None:
    rows = [{"arm": arm, "time_ms": time} for arm, time in (("PEFT", 300.0), ("limit", 300.0), ("exact", 290.0))]
    assert all("share_of_limit" not in row for row in bench._relative(rows))
    rows[1]["time_ms"] = 280.0
    assert bench._relative(rows)[2]["share_of_limit"] == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h64", "expected MODEL:DATA"),
        ("llama:full", "model 'llama'; expected smollm2, llama-1b, llama-3b, llama-8b or a shape like h1024-v32k"),
        ("h200-v1k:instruct", "model 'h200-v1k'; expected words, and a hidden size that heads of about 64 can share"),
        ("h0-v1k:full", "model 'h0-v1k'; expected words"),
        ("h64-v0k:full", "model 'h64-v0k'; expected words"),
        ("h64-v1k:half", "unknown data 'half'"),
        ("h64-v1k:demo", "data 'demo' is text; it needs the model smollm2"),
        ("h64-v1k:full:float8", "unknown dtype 'float8'"),
    ],
)
def test_bad_cells_are_one_line(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CELoraError, match=message.split(";")[0].replace("(", r"\(")):
        parse_cell(text)
    assert cli.main(["bench", "--cell", text]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory, which each arm measures in a process of its own."""
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=forked.interpreter))
    output = tmp_path / "rows.jsonl"
    given = ["bench", "--cell", "h64-v1k:instruct", "--arm", "exact", "--repeats", "2", "--output", str(output)]
    assert cli.main([*given, "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    (row,) = [json.loads(line) for line in printed.out.splitlines()]
    assert json.loads(output.read_text()) == row
    assert row["peak_memory"] > 2**26
    assert printed.err == ""
    assert cli.main(given) == 2
    assert "exists; --overwrite replaces it" in capsys.readouterr().err
    assert cli.main(["bench", "--cell", "h64-v1k:full", "--arm", "fats"]) == 2
    assert "unknown arm 'fats'" in capsys.readouterr().err


def test_what_was_measured_before_an_interruption_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([[{"model": "h64-v1k", "arm": "exact"}]])

    def measure(*_: Any, **__: Any) -> list[dict[str, Any]]:
        try:
            return next(measured)
        except StopIteration:
            raise KeyboardInterrupt from None

    patch_all(monkeypatch, "celora.studies.bench:measure", measure)
    cells = ["--cell", "h64-v1k:instruct", "--cell", "h64-v1k:full"]
    assert cli.main(["bench", *cells, "--json", "--output", str(tmp_path / "rows.jsonl")]) == 130
    assert capsys.readouterr().out == (tmp_path / "rows.jsonl").read_text() != ""
