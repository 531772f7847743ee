"""What `celora doctor` finds, and what it concludes."""

from __future__ import annotations

import copy
import json
import math
import os
from importlib import metadata
from typing import Any

import pytest
import torch

from celora.cli.main import main
from celora.kernels.backends import TABLE, explain
from celora.kernels.c import library as kernels
from celora.machine import cpu
from celora.studies.doctor import advise, commands, describe, examine
from patching import patch_all
from without import without

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
    patch_all(monkeypatch, "celora.studies.doctor:_SHAPES", {"cpu": (32, 64, 48)})


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
    said = (f"torch {found['versions']['torch']}", found["kernels"]["tier"], found["products"]["int8_path"])
    for line in (*said, *found["advice"]):
        assert line in text
    assert text.splitlines()[-2:] == [f"  {command}" for command in found["commands"]]
    assert found["commands"][0] == "celora demo"


def test_which_backend_computes_each_operation_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = examine()["kernels"]["chosen"]
    assert chosen.keys() == TABLE.keys()
    assert chosen["capped_softmax_rows"] == "torch"
    assert chosen["squared_row_norms"] == ("torch" if kernels.library() is None else "c")
    without(monkeypatch, "c")
    lines = describe(examine()).splitlines()
    (by_torch,) = (line for line in lines if line.startswith("by torch"))
    assert "squared_row_norms" in by_torch
    (lacking,) = (line for line in lines if line.startswith("not available"))
    assert "rms_norm" in lacking


def test_conclusions_follow_the_measurement() -> None:
    usual = conclusions()
    assert usual.splitlines() == [
        "bfloat16 products take 0.50 of float32's time here: celora trains a bfloat16 checkpoint in bfloat16.",
        "int8 products take 0.50 of bfloat16's time, everything included: preset auto can use them.",
    ]
    times = FOUND["products"]["time_ms"]
    slow = conclusions(dtype__bfloat16_over_float32=3.0, dtype__trains_in="float32")
    assert "3.00 of float32's time here: celora trains a bfloat16 checkpoint in float32" in slow
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
    assert command().endswith("--data rows.jsonl --output out")  # 8 bits pay, so the advice is the default preset
    assert command(instructions__amx=True).endswith("--preset exact")
    assert command(products__time_ms=times | {"bfloat16 int8": 6.0}).endswith("--preset exact")
    assert command(products__time_ms={name: 1.0 for name in times if "int8" not in name}).endswith("--preset exact")


def test_what_the_environment_limits_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cpu._LIMITS:
        monkeypatch.delenv(name, raising=False)
    assert examine()["limits"] == {}
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "CELORA_KERNELS": "0"}
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    found = examine()
    assert found["limits"] == limits
    assert "- ONEDNN_MAX_CPU_ISA keeps oneDNN" in describe(found)
    assert "ONEDNN_MAX_CPU_ISA=AVX2, CELORA_KERNELS=0" in describe(found)


@pytest.mark.parametrize(
    ("machine", "path"),
    [
        ({"panels": 16, "tier": "amx", "has_amx": True}, "celora's own kernel, with AMX"),
        ({"panels": 16, "tier": "avx512"}, "celora's own kernel, with AVX-512 VNNI"),
        ({"panels": 16, "tier": "avxvnni"}, "celora's own kernel, with AVX-VNNI"),
        ({"panels": 16, "tier": "avx2"}, "celora's own kernel, with AVX2"),
        ({"onednn": True, "why_not": "no compiler"}, "oneDNN's quantised linear: no compiler"),
        ({"onednn": True, "panels": 16, "has_amx": True}, "oneDNN's quantised linear: celora's kernel has no AMX here"),
        (
            {"slow": True},
            "torch's integer product, number by number: tier baseline of celora's kernels has no 8-bit products",
        ),
        (
            {"why_not": "CELORA_KERNELS=0 turns them off"},
            "torch's integer product, through oneDNN: CELORA_KERNELS=0 turns them off",
        ),
        ({"overflows": True}, "none: oneDNN's 8-bit sums overflow under the limit ONEDNN_MAX_CPU_ISA"),
    ],
)
def test_which_8_bit_path_is_taken_and_why(machine: dict[str, Any], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for target, does in {
        "celora.kernels.onednn:dot_products": lambda: machine.get("onednn", False),
        "celora.kernels.plain:one_by_one": lambda: machine.get("slow", False),
        "celora.kernels.plain:wrong_integers": lambda device: "is wrong" if machine.get("overflows") else "",
        "celora.machine.cpu:matrix_instructions": lambda: machine.get("has_amx", False),
        "celora.kernels.c.tier:why_not": lambda: machine.get("why_not", ""),
        "celora.kernels.c.dot:panel_columns": lambda: machine.get("panels", 0),
        "celora.kernels.c.dot:used_tier": lambda: machine.get("tier", "baseline"),
    }.items():
        patch_all(monkeypatch, target, does)
    assert explain("pack_weight", torch.device("cpu")) == path


def test_accelerators_have_another_path() -> None:
    assert explain("pack_weight", torch.device("mps")) == "none: there are no int8 products on mps"
    assert explain("pack_weight", torch.device("cuda")) == "torch's integer product"


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["products"]["shape"] == [32, 64, 48]
    assert main(["doctor"]) == 0
    assert "What will be fast here:\n- bfloat16 products take" in capsys.readouterr().out
    assert main(["doctor", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("bfloat16 products take")


def test_a_device_that_refuses_bfloat16_is_examined_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.machine.timing:time_over_float32", lambda dtype, device: math.inf)
    found = examine()
    assert all(name.startswith("float32") for name in found["products"]["time_ms"])
    assert (
        "bfloat16 products cannot be computed here: celora trains a bfloat16 checkpoint in float32." in found["advice"]
    )


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to some CPUs")
def test_cpus_that_this_process_may_not_use_are_not_counted() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert examine()["cpu"]["count"] == 1
    finally:
        os.sched_setaffinity(0, allowed)
