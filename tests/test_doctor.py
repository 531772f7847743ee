"""What `celora doctor` finds, and what it concludes."""

from __future__ import annotations

import copy
import json
from importlib import metadata
from typing import Any

import pytest
import torch

from celora import kernels
from celora.cli import main
from celora.train import doctor
from celora.train.doctor import advise, describe, examine

FOUND: dict[str, Any] = {
    "device": {"type": "cpu"},
    "cpu": {"count": 4, "quota": None, "threads": 4, "OMP_NUM_THREADS": None},
    "instructions": {"amx": False},
    "kernels": {"built": True, "why_not": ""},
    "products": {
        "time_ms": {"float32 native": 10.0, "bfloat16 native": 5.0, "float32 int8": 4.0, "bfloat16 int8": 2.5},
        "unavailable": {},
    },
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SHAPES", {"cpu": (32, 64, 48), "cuda": (32, 64, 48)})


def conclusions(**changes: Any) -> str:
    found = copy.deepcopy(FOUND)
    for path, value in changes.items():
        part, _, name = path.partition("__")
        found[part][name] = value
    return "\n".join(advise(found))


def test_findings_are_this_machines() -> None:
    found = examine()
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["kernels"]["built"] == (kernels.library() is not None)
    assert {"float32 native", "bfloat16 native"} <= set(found["products"]["time_ms"])
    assert min(found["products"]["time_ms"].values()) > 0
    assert found["advice"] == advise(found)
    text = describe(found)
    for line in (f"torch {found['versions']['torch']}", *found["advice"]):
        assert line in text


def test_conclusions_follow_the_measurement() -> None:
    usual = conclusions()
    assert usual.splitlines() == [
        "bfloat16 products take 0.50 of float32's time: keep models in bfloat16.",
        "int8 products take 0.50 of bfloat16's time, everything included: preset auto can use them.",
    ]
    times = FOUND["products"]["time_ms"]
    slow = conclusions(products__time_ms=times | {"bfloat16 native": 30.0})
    assert "3.00 of float32's time: train with --dtype float32" in slow
    assert "int8 products take 0.40 of float32's time" in slow
    assert "auto will leave them alone" in conclusions(products__time_ms=times | {"bfloat16 int8": 6.0})
    lacking = {name: time for name, time in times.items() if "int8" not in name}
    assert "No int8 products: why" in conclusions(products__time_ms=lacking, products__unavailable={"int8": "why"})
    assert "preset exact" in conclusions(instructions__amx=True)
    assert "no C compiler" in conclusions(kernels__built=False, kernels__why_not="no C compiler is installed")
    assert "this container may use 2 CPUs: celora's commands lower them" in conclusions(cpu__quota=2)
    assert "OMP_NUM_THREADS=1 keeps torch on 1 of 4 CPUs" in conclusions(cpu__threads=1, cpu__OMP_NUM_THREADS="1")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["products"]["shape"] == [32, 64, 48]
    assert main(["doctor"]) == 0
    assert "What will be fast here:\n- bfloat16 products take" in capsys.readouterr().out
    assert main(["doctor", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("bfloat16 products take")
