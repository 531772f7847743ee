"""Checkpointing is off unless memory asks for it, and what was chosen is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from celora import cli
from celora.train import checkpointing
from tiny import save_rows, save_tiny_model


def run(folder: Path, capsys: pytest.CaptureFixture[str], *extra: str) -> str:
    save_tiny_model(folder / "model")
    save_rows(folder / "rows.jsonl")
    given = ["train", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--preset", "exact"]
    assert cli.main([*given, "--output", str(folder / "out"), "--max_steps", "2", *extra]) == 0
    return capsys.readouterr().err


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("free", "extra", "said", "on"),
    [
        (2**30, (), "Gradient checkpointing is off: a step keeps about", False),
        (1000, (), "Gradient checkpointing is turned on: a step keeps about", True),
        (1000, ("--gradient_checkpointing", "false"), "Gradient checkpointing is off: a step keeps about", False),
        (None, (), "Gradient checkpointing is off: a step keeps about", False),
        (2**30, ("--gradient_checkpointing", "true"), "Gradient checkpointing is on: every forward", True),
    ],
)
def test_the_choice(
    free: int | None,
    extra: tuple[str, ...],
    said: str,
    on: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpointing, "available_memory", lambda device: free)
    seen: list[bool] = []
    original = checkpointing.choose_checkpointing

    def spy(trainer: Any, *, asked: bool) -> str:
        line = original(trainer, asked=asked)
        model = trainer.model.get_base_model()
        seen.append(any(getattr(m, "gradient_checkpointing", False) for m in model.modules()))
        return line

    monkeypatch.setattr("celora.train.run.choose_checkpointing", spy)
    assert said in run(tmp_path, capsys, *extra)
    if "true" not in extra:  # which Trainer turns on when it starts
        assert seen == [on]


def test_it_changes_nothing_that_is_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for free in (2**40, 1):
        monkeypatch.setattr(checkpointing, "available_memory", lambda device, free=free: free)
        folder = tmp_path / str(free)
        folder.mkdir()
        run(folder, capsys)
        found.append(losses(folder))
    assert found[0] == found[1]
