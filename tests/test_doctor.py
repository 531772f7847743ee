"""What `celora doctor` finds, and what it concludes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest
import torch

from celora import kernels
from celora.cli import main
from celora.train import doctor
from celora.train.doctor import advise, commands, describe, examine

FOUND: dict[str, Any] = {
    "device": {"type": "cpu"},
    "system": {"name": "Linux", "release": "6.1", "architecture": "x86_64"},
    "limits": {},
    "dtype": {"bfloat16_over_float32": 0.5, "trains_in": "bfloat16"},
    "cpu": {"count": 4, "quota": None, "threads": 4, "OMP_NUM_THREADS": None},
    "instructions": {"amx": False},
    "kernels": {"built": True, "why_not": "", "why_not_kept": ""},
    "products": {
        "time_ms": {"float32 native": 10.0, "bfloat16 native": 5.0, "float32 int8": 4.0, "bfloat16 int8": 2.5},
        "unavailable": {},
    },
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SHAPES", {"cpu": (32, 64, 48)})


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
    for line in (f"torch {found['versions']['torch']}", *found["advice"], found["products"]["int8_path"]):
        assert line in text
    assert text.splitlines()[-2:] == [f"  {command}" for command in found["commands"]]
    assert found["commands"][0] == "celora demo"


def test_conclusions_follow_the_measurement() -> None:
    usual = conclusions()
    assert usual.splitlines() == [
        "bfloat16 products take 0.50 of float32's time here: celora trains in bfloat16.",
        "int8 products take 0.50 of bfloat16's time, everything included: preset auto can use them.",
    ]
    times = FOUND["products"]["time_ms"]
    slow = conclusions(dtype__bfloat16_over_float32=3.0, dtype__trains_in="float32")
    assert "3.00 of float32's time here: celora trains in float32" in slow
    assert "bfloat16, which takes half the memory" in conclusions(dtype__bfloat16_over_float32=1.2)
    assert "cannot be computed" in conclusions(dtype__bfloat16_over_float32=None, dtype__trains_in="float32")
    assert "int8 products take 0.40 of float32's time" in slow
    assert "auto will leave them alone" in conclusions(products__time_ms=times | {"bfloat16 int8": 6.0})
    lacking = {name: time for name, time in times.items() if "int8" not in name}
    assert "No int8 products: why" in conclusions(products__time_ms=lacking, products__unavailable={"int8": "why"})
    assert "preset exact" in conclusions(instructions__amx=True)
    assert "no C compiler" in conclusions(kernels__built=False, kernels__why_not="no C compiler is installed")
    kept = conclusions(kernels__why_not_kept="/tmp/x could be written to by others")
    assert "Each process compiles the C kernels anew: /tmp/x could be written to by others." in kept
    assert "ONEDNN_MAX_CPU_ISA keeps oneDNN" in conclusions(limits__ONEDNN_MAX_CPU_ISA="AVX2")
    assert "ATEN_CPU_CAPABILITY keeps torch's own" in conclusions(limits__ATEN_CPU_CAPABILITY="avx2")
    assert "this container may use 2 CPUs: celora's commands lower them" in conclusions(cpu__quota=2)
    assert "OMP_NUM_THREADS=1 keeps torch on 1 of 4 CPUs" in conclusions(cpu__threads=1, cpu__OMP_NUM_THREADS="1")


def command(**changes: Any) -> str:
    found = copy.deepcopy(FOUND)
    for path, value in changes.items():
        part, _, name = path.partition("__")
        found[part][name] = value
    return commands(found)[-1]


def test_the_command_to_copy_suits_the_machine() -> None:
    times = FOUND["products"]["time_ms"]
    assert command().endswith("--data rows.jsonl --output out")  # 8 bits pay: the default preset
    assert command(instructions__amx=True).endswith("--preset exact")
    assert command(products__time_ms=times | {"bfloat16 int8": 6.0}).endswith("--preset exact")
    assert command(products__time_ms={name: 1.0 for name in times if "int8" not in name}).endswith("--preset exact")


@pytest.mark.parametrize(
    "limits", [{"CELORA_KERNELS": "0"}, {"ONEDNN_MAX_CPU_ISA": "AVX2", "CELORA_KERNELS": "0"}], ids=["kernels", "both"]
)
def test_what_the_environment_limits_is_said(limits: dict[str, str]) -> None:
    code = (
        "from celora.train import doctor; doctor._SHAPES, doctor._REPEATS = {'cpu': (32, 64, 48)}, 2\n"
        "doctor.time_over_float32, doctor.slower_than_float32 = lambda *_: 0.5, lambda *_: False\n"
        "found = doctor.examine(); print(found['products']['int8_path']); print(doctor.describe(found))\n"
        f"assert found['limits'] == {limits | {'OMP_NUM_THREADS': '1'}}\n"
    )
    free = {name: value for name, value in os.environ.items() if name not in doctor._LIMITS}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=free | limits | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    path = done.stdout.splitlines()[0]
    if limits.get("ONEDNN_MAX_CPU_ISA"):
        # Where oneDNN then sums pairs in 16 bits there is none; elsewhere it is torch's, or another library's.
        assert path.startswith(("none: oneDNN's 8-bit sums overflow", "oneDNN's", "torch's"))
        assert "- ONEDNN_MAX_CPU_ISA keeps oneDNN" in done.stdout
    else:
        assert "CELORA_KERNELS=0 turns them off" in path or path.startswith("none: ")
    assert all(f"{name}={value}" in done.stdout for name, value in limits.items())


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["products"]["shape"] == [32, 64, 48]
    assert main(["doctor"]) == 0
    assert "What will be fast here:\n- bfloat16 products take" in capsys.readouterr().out
    assert main(["doctor", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("bfloat16 products take")
