"""Kernels are compiled for GPUs that this machine does not have. None spills, and none takes much more than before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows
from benchmarks.kernels import offline, roofline
from celora.train.forecast.peaks import Gpu
from triton_here import needs_triton

ROOT = Path(__file__).parents[2]


def check(*more: str) -> None:
    """Run it in a process of its own, because here the kernels may be the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels.offline", "--check", *more]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none spills" in done.stdout


@needs_triton
def test_the_usual_kernels_are_assembled_for_two_generations() -> None:
    check("--quick")


@needs_triton
@pytest.mark.slow
def test_every_kernel_is_assembled_for_every_generation() -> None:
    check()


def test_no_committed_kernel_spills_and_every_generation_has_all() -> None:
    found = rows.read(offline.ROWS)
    assert [text for row in found for text in offline.complaints(row, {})] == []
    assert {row["capability"] for row in found} == set(offline.CAPABILITIES)
    by_capability = {c: {row["kernel"] for row in found if row["capability"] == c} for c in offline.CAPABILITIES}
    assert by_capability[80] == by_capability[86] < by_capability[89] == by_capability[90] == by_capability[100]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"registers": 121}, "takes 121 registers, 100 before"),
        ({"shared_bytes": 120_000}, "of shared memory of 101376"),
        ({"instruction": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"}, "multiplies by mma.sync"),
    ],
)
def test_what_is_complained_of(change: dict[str, object], said: str) -> None:
    row = {
        "kernel": "product, int8, depth first, 128 x 128 x 64", "capability": 86, "registers": 100, "spilled_bytes": 0,
        "triton": "3", "shared_bytes": 99_000,
        "instruction": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    }  # fmt: skip
    known = {("3", row["kernel"], 86): row}
    assert offline.complaints(row, known) == []  # type: ignore[arg-type]
    complained = offline.complaints(row | change, known)  # type: ignore[arg-type]
    assert len(complained) in (1, 2)
    assert said in complained[0]
    assert offline.complaints(row | {"registers": 110}, known) == []  # type: ignore[arg-type]


def test_a_version_without_rows_is_compared_with_the_newest() -> None:
    row: dict[str, Any] = {"kernel": "column_maxima", "capability": 86, "registers": 100, "spilled_bytes": 0}
    row |= {"shared_bytes": 0, "instruction": ""}
    known = {
        (version, "column_maxima", 86): row | {"triton": version, "registers": registers}
        for version, registers in (("3.10.0", 80), ("3.9.0", 100))
    }
    assert offline.complaints(row | {"triton": "3.11.0"}, known) == [
        "column_maxima for 86: takes 100 registers, 80 before"
    ]
    assert offline.complaints(row | {"triton": "3.9.0"}, known) == []
    assert offline.complaints(row | {"triton": "3.11.0"}, {}) == []


def test_the_roofline_is_the_slower_of_memory_and_arithmetic() -> None:
    gpu = Gpu(memory=1, bandwidth=100.0, float32=5.0, bfloat16=10.0, int8=20.0, fp8=None)
    assert roofline.Work(200, 10, "bfloat16").time_us(gpu) == 2e6
    assert roofline.Work(200, 60, "int8").time_us(gpu) == 3e6
    assert roofline.Work(200, 60, "fp8").time_us(gpu) is None


def test_the_roofline_of_a_product_of_known_size() -> None:
    """8B's up_proj for 4,096 tokens in int8 on an H100: 481 GFLOP at 1,979 TOPS are 0.243 ms."""
    work = dict(roofline.kernels(roofline.MODELS["8B"]))["product, int8"]
    assert work.operations == 2 * 4096 * 4096 * 14_336
    found = work.time_us(roofline.GPUS["H100"])
    assert found == pytest.approx(243.1, abs=0.1)
