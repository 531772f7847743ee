"""The recipes for contributors do what their pages say: the code of each page is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import celora
from celora import CELoraConfig
from celora.cli.main import main
from celora.settings.presets import PRESETS
from machine import refuses
from small import make_base, make_batch
from tiny import save_rows, save_tiny_model

DEVELOP = Path(__file__).parents[2] / "docs" / "develop"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DEVELOP / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch) -> dict[str, CELoraConfig]:
    """Put the table of presets back when the test is over."""
    for name, config in list(PRESETS.items()):
        monkeypatch.setitem(PRESETS, name, config)
    monkeypatch.setitem(PRESETS, "gentle", PRESETS["off"])  # is removed again
    return PRESETS


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")
def test_a_new_preset(presets: dict[str, CELoraConfig], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names: dict[str, Any] = {"model": make_base(), "batch": make_batch(0)}
    for block in blocks("new-preset.md"):
        exec(block, names)
    said = capsys.readouterr().out
    assert "LoRA gradient, estimated against exact" in said
    report = celora.attach(names["peft_model"], "gentle")
    assert {name.rpartition(".")[2] for name in report.estimated} == {"up_proj", "gate_proj", "down_proj"}

    save_tiny_model(tmp_path / "model")
    save_rows(tmp_path / "chats.jsonl")
    given = {"model": tmp_path / "model", "data": tmp_path / "chats.jsonl", "output": tmp_path / "out"}
    flags = [f"--{name}={path}" for name, path in given.items()]
    assert main(["train", *flags, "--preset=gentle", "--max_steps=1", "--quiet"]) == 0
    assert CELoraConfig.load(tmp_path / "out") == presets["gentle"]
