"""The benchmarks' scripts can be started, and their rows say where they were measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import rows
from benchmarks.scale.estimate import run_alone

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*/*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_can_be_imported(script: Path) -> None:
    if script.stem == "quantised":
        pytest.importorskip("bitsandbytes")
    importlib.import_module(f"benchmarks.{script.parent.name}.{script.stem}")


def test_rows_carry_their_machine() -> None:
    files = sorted(BENCHMARKS.glob("*/*.jsonl"))
    assert len(files) > 10
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            assert {"threads", "torch", "cpu", "commit"} <= json.loads(line).keys(), file.name


def test_rows_of_presets_were_measured_with_today_s_defaults() -> None:
    """Whoever changes a preset measures it again, or removes its rows: no page shows a row of other defaults."""
    found = 0
    for file in sorted(BENCHMARKS.glob("*/*.jsonl")):
        for row in rows.read(file):
            arm = str(row.get("arm") or row.get("preset") or "")
            if asked := rows.defaults(arm):
                found += 1
                assert row.get("defaults") == asked, f"{file.name}, {arm}, commit {row['commit']}"
    assert found > 300
    assert rows.defaults("exact, upper half") == rows.defaults("auto 0.99") == rows.defaults("LoRA") == {}
    assert rows.defaults("fast, Adam") == rows.defaults("fast") == rows.conditions("fast")["defaults"]


def test_rows_of_another_device_are_another_machine_s() -> None:
    row = rows.conditions()
    assert rows.machine(row | {"device": "NVIDIA A100"}) != rows.machine(row | {"device": "NVIDIA H100"})
    assert rows.machine(row) == rows.machine({name: value for name, value in row.items() if name != "device"})


def test_a_command_s_peak_is_its_own() -> None:
    """Linux would count what the process that starts it has: here at least 600 MB."""
    large = b"1" * 600_000_000
    printed, peak = run_alone(["--version"])
    assert printed.startswith("celora ")
    assert 0 < peak < len(large)
    with pytest.raises(SystemExit, match=r"celora --versino failed with 2"):
        run_alone(["--versino"])
