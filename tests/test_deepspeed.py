"""DeepSpeed's ZeRO-2 and ZeRO-3 in two processes, in one run of torchrun that all tests here share."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from celora.train.progress import read_metrics
from test_distributed import TOLERANCE, torchrun
from tiny import save_rows, save_tiny_model

pytest.importorskip("deepspeed", reason="needs deepspeed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed's CPU side is for Linux")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    save_tiny_model(folder / "model")
    save_rows(folder / "rows.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        done = torchrun(Path(__file__).with_name("deepspeed_worker.py"), folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("stage", ["ZeRO-2", "ZeRO-3"])
def test_an_engine_in_a_loop_of_ones_own_trains_as_ddp(ran, stage):
    for rank in range(2):
        done = json.loads((ran / f"loops.{rank}.json").read_text(encoding="utf-8"))
        assert done[stage]["losses"] == pytest.approx(done["DDP"]["losses"], abs=TOLERANCE)
        assert done[stage]["steps"] == len(done["DDP"]["losses"])


@pytest.mark.parametrize("stage", [2, 3])
def test_celora_train_resumes_to_the_same_losses(ran, stage):
    whole = losses(ran / f"whole{stage}")
    assert len(whole) == 6
    assert losses(ran / f"resumed{stage}") == pytest.approx(whole, abs=TOLERANCE)
    assert losses(ran / "whole2") == pytest.approx(whole, abs=TOLERANCE)
