"""The bench measures what it says: the same work in every arm, rows that add up. Its times are whatever they are."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from celora.cli import main as cli
from celora.errors import CELoraError
from celora.runtime.attachment import find, require
from celora.studies import bench
from celora.studies.bench import Cell, Step, make_batches, measure, parse_cell, table
from patching import patch_all

SMALL = Cell("h64-v1k", "instruct", "float32", 64)


def test_rows_add_up() -> None:
    rows = measure(SMALL, ("PEFT", "exact", "limit", "Unsloth"), repeats=2, memory=False)
    assert [row["arm"] for row in rows] == ["PEFT", "exact", "limit", "Unsloth"]
    plain, exact, limit, absent = rows
    assert plain["speed_up"] == 1
    assert exact["speed_up"] == pytest.approx(plain["time_ms"] / exact["time_ms"], rel=1e-3)
    assert limit.get("share_of_limit", 1) == 1  # none where noise made it no faster than PEFT
    assert exact["saved_for_backward"] < plain["saved_for_backward"]
    for row in rows[:3]:
        parts = row["forward_ms"] + row["backward_ms"] + row["optimizer_ms"]
        assert parts == pytest.approx(row["time_ms"], rel=0.5)
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens"] / row["time_ms"], rel=0.05)
    if not torch.cuda.is_available():
        assert absent["not_run"] == "needs a CUDA device"
        assert "not run: needs a CUDA device" in table(rows)
    assert len(table(rows).splitlines()) == 6


def test_what_the_models_are_is_told() -> None:
    told = bench.told(["smollm2", "h1024-v32k", "h2048-v128k", "h1024-v32k"])
    assert told.split(". ") == [
        "smollm2: SmolLM2-135M-Instruct, its weights unpacked from 4 bits (Q4_1)",
        "h1024-v32k: a Llama of random weights, hidden size 1,024, 8 blocks, 32,000 words",
        "h2048-v128k: a Llama of random weights, hidden size 2,048, 4 blocks, 128,000 words.",
    ]


def test_the_share_of_a_limit_that_saves_nothing_is_not_told() -> None:
    rows = [{"arm": arm, "time_ms": time} for arm, time in (("PEFT", 300.0), ("limit", 300.0), ("exact", 290.0))]
    assert all("share_of_limit" not in row for row in bench._relative(rows))
    rows[1]["time_ms"] = 280.0
    assert bench._relative(rows)[2]["share_of_limit"] == 0.5


def test_every_arm_takes_the_same_steps(tmp_path: Path) -> None:
    """Exact arms train the same parameters; the limit does not."""
    batches = make_batches(SMALL)
    found = {}
    for arm in ("PEFT", "exact", "limit"):
        step = Step(SMALL, arm, batches, tmp_path / "plan.json", {})
        for batch in batches:
            step(batch)
        found[arm] = torch.cat([p.detach().flatten() for p in step.model.parameters() if p.requires_grad])
    torch.testing.assert_close(found["exact"], found["PEFT"], rtol=0, atol=1e-6)
    assert not torch.allclose(found["limit"], found["PEFT"], atol=1e-6)


def test_arms_share_frozen_weights_and_no_others(tmp_path: Path) -> None:
    frozen: dict[str, torch.Tensor] = {}
    steps = [Step(SMALL, arm, [], tmp_path / "plan.json", frozen) for arm in ("PEFT", "PEFT upper half", "exact")]
    kept, trained = (
        [{p.data_ptr() for p in step.model.parameters() if p.requires_grad is trains} for step in steps]
        for trains in (False, True)
    )
    assert kept[0] == kept[1] == kept[2] == {weight.data_ptr() for weight in frozen.values()}
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(trained, 2))


def test_auto_is_planned_once_and_the_plan_is_shared(tmp_path: Path) -> None:
    batches, plan = make_batches(SMALL), tmp_path / "plan.json"
    first = Step(SMALL, "auto", batches, plan, {})
    written = plan.read_bytes()
    again = Step(SMALL, "auto", batches, plan, {})
    assert plan.read_bytes() == written
    assert require(first.model).report == require(again.model).report
    assert find(Step(SMALL, "PEFT", batches, plan, {}).model) is None


def test_the_upper_half_has_half_of_the_adapters(tmp_path: Path) -> None:
    counts = [
        sum(p.numel() for p in bench.make_model(SMALL, upper=upper).parameters() if p.requires_grad)
        for upper in (False, True)
    ]
    assert counts[0] == 2 * counts[1]


def test_data() -> None:
    full, instruct = make_batches(Cell("h64-v1k", "full", tokens=1024)), make_batches(Cell("h64-v1k", "instruct"))
    assert all((batch["labels"] == batch["input_ids"]).all() for batch in full)
    assert full[0]["input_ids"].shape == (4, 256)
    for batch in instruct:
        lengths = batch["attention_mask"].sum(1)
        assert lengths.max() == batch["input_ids"].shape[1]
        labelled = (batch["labels"] != -100).sum(1) / lengths
        assert ((labelled > 0.29) & (labelled < 0.33)).all()
    assert len({batch["input_ids"].shape for batch in instruct}) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h64", "expected MODEL:DATA"),
        ("llama:full", "model 'llama'; expected smollm2 or a shape like h1024-v32k"),
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


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory too, which each arm measures in a process of its own."""
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
    assert cli.main(["bench", "--cell", "h64-v1k:full", "--arm", "fast"]) == 2
    assert "unknown arm 'fast'" in capsys.readouterr().err


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
