"""The demo's own logic, on the tiny model; the real one is `make demo`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from celora.errors import CELoraError
from celora.settings.config import CELoraConfig
from celora.settings.presets import RULE
from celora.studies import demo
from celora.studies.assets import Review
from celora.studies.demo import DemoRow, result_table, run_demo, summary
from celora.studies.sentiment import Splits
from patching import patch_all
from tiny import save_tiny_model
from unprivileged import as_nobody, public_folder


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model and a few sentences in place of the real ones; its labels are words of its vocabulary."""
    model = save_tiny_model(tmp_path / "model")
    reviews = [Review(f"w{i} w{i + 1}", 2.0 if i % 2 else -2.0) for i in range(30)]
    rows = [
        {
            "prompt": [{"role": "user", "content": review.text}],
            "completion": [{"role": "assistant", "content": "w1" if review.score > 0 else "w2"}],
        }
        for review in reviews
    ]
    patch_all(monkeypatch, "celora.studies.assets:demo_model", lambda say: model)
    patch_all(
        monkeypatch,
        "celora.studies.sentiment:splits",
        lambda *_, train=8, **__: Splits(reviews[:train], [], reviews[-4:]),
    )
    patch_all(
        monkeypatch, "celora.studies.sentiment:to_rows", lambda some: [rows[reviews.index(review)] for review in some]
    )
    patch_all(
        monkeypatch,
        "celora.studies.demo:stock_accuracies",
        lambda *_, adapters, untouched: [0.5] * (len(adapters) + untouched),
    )
    patch_all(monkeypatch, "celora.studies.demo:_in_memory_accuracy", lambda *_: 0.5)
    return tmp_path / "demo"


def test_three_contenders_train_on_the_same_rows_and_leave_a_report(small: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    rows = run_demo(small, seeds=2, steps=4, batch_size=2, held_out=4, console=console)
    trained = [(arm, seed) for seed in (0, 1) for arm in ("LoRA", "CE-LoRA", "auto")]
    assert [(row.arm, row.seed) for row in rows] == [("untouched", 0), *trained]
    assert [json.loads(line) for line in (small / "demo.jsonl").read_text().splitlines()] == [
        {**row.__dict__} for row in rows
    ]
    assert {row.arm: row.rank for row in rows[1:]} == {"LoRA": 16, "CE-LoRA": 14, "auto": 16}
    assert all(row.step_time_ms is not None and row.step_time_ms > 0 for row in rows[1:])
    assert (small / "report.html").stat().st_size > 1e6
    assert not list(small.rglob("*.tmp"))
    for name in ("lora-seed0", "ce-lora-seed1", "auto-seed0"):
        assert (small / name / "adapter_model.safetensors").is_file()
    text = console.file.getvalue()
    assert text.index("Training CE-LoRA as published (paper), seed 0") < text.index("Training celora's default (auto)")
    # arms take turns
    assert text.index("Training celora's default (auto), seed 1") < text.index("Training LoRA, seed 1")
    assert CELoraConfig.load(small / "auto-seed0").most_error == RULE["most_error"]  # the default preset's rule
    console = Console(file=io.StringIO(), width=120)
    # runs that exist are taken over
    run_demo(small, seeds=1, steps=2, batch_size=2, held_out=4, console=console, quiet=True)
    assert console.file.getvalue() == ""


def test_an_adapter_that_scores_differently_under_stock_peft_fails(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_all(monkeypatch, "celora.studies.demo:_in_memory_accuracy", lambda *_: 0.75)
    with pytest.raises(CELoraError, match=r"scores 0.5000 under stock PEFT but 0.7500 in memory"):
        run_demo(small, steps=2, batch_size=2, held_out=4, console=Console(file=io.StringIO()))


@pytest.mark.parametrize("foreign", ["thesis.tex", "data"])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, foreign: str) -> None:
    (tmp_path / foreign).mkdir()
    with pytest.raises(CELoraError, match="holds no demo"):
        run_demo(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [foreign]


def test_a_place_that_cannot_be_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CELoraError, match=r"cannot write to --output .*file' is a file, not a folder"):
        run_demo(tmp_path / "file")
    with public_folder() as folder:
        error = as_nobody(lambda: run_demo(folder / "demo"))
    assert isinstance(error, CELoraError)
    assert "is read-only for you" in str(error)


def test_a_failed_scoring_process_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CELoraError, match=r"scoring .* with stock PEFT failed") as error:
        demo.stock_accuracies(tmp_path / "none", tmp_path / "none.jsonl", "float32")
    assert "\n" not in str(error.value)


def _row(arm: str, seed: int, accuracy: float, ms: float | None) -> DemoRow:
    values: dict[str, Any] = {"held_out": 100, "steps": 10, "rank": 16, "train_seconds": 1.0, "cost": 0.8}
    return DemoRow(arm, seed, accuracy, step_time_ms=ms, threads=2, dtype="bfloat16", torch="2", **values)


def test_the_table_gives_mean_and_range_over_seeds() -> None:
    rows = [_row("untouched", 0, 0.7, None)]
    rows += [_row(arm, seed, 0.9 - seed / 100, 100.0 + seed) for arm in demo.ARMS for seed in range(3)]
    assert summary(rows) == [
        ("untouched", "70.0%", "", ""),
        ("LoRA", "89.0% (88.0% to 90.0%)", "101 ms", "0.80"),
        ("CE-LoRA as published (paper)", "89.0% (88.0% to 90.0%)", "101 ms", "0.80"),
        ("celora's default (auto)", "89.0% (88.0% to 90.0%)", "101 ms", "0.80"),
    ]
    assert result_table(rows).row_count == 4
