"""DeepSpeed's ZeRO-2 and ZeRO-3 in two processes. All tests here share one run of torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from test_distributed import TOLERANCE

from celora.cli.main import main
from celora.train.progress import read_metrics
from forked import accelerate_launch, torchrun
from tiny import save_rows, save_tiny_model
from train_worker import USUAL

pytest.importorskip("deepspeed", reason="needs deepspeed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed's CPU side is for Linux")

WORKER = Path(__file__).parents[1] / "helpers" / "deepspeed_worker.py"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    save_tiny_model(folder / "model")
    save_rows(folder / "rows.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        done = torchrun(WORKER, folder, ahead="deepspeed_worker")
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


def test_accelerate_launch_with_a_configuration_trains_as_one_process(ran, tmp_path, monkeypatch):
    """ZeRO-3 with preset exact, so nothing depends on which part of the batch a process sees."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PET_RUN_PATH", "1")  # options of torchrun, which forks its processes
    monkeypatch.setenv("PET_START_METHOD", "fork")
    deepspeed = {"deepspeed_config_file": str(ran / "zero3.json"), "zero3_init_flag": True}
    config = {"distributed_type": "DEEPSPEED", "num_machines": 1, "num_processes": 2, "deepspeed_config": deepspeed}
    (tmp_path / "zero.yaml").write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", **config}))
    own = ["--model", f"{ran}/model", "--data", f"{ran}/rows.jsonl", "--preset", "exact", *USUAL]
    own += ["--lr_scheduler_type", "constant", "--quiet"]
    launch = ["--config_file", f"{tmp_path}/zero.yaml", "--main_process_port", "0"]
    done = accelerate_launch(*launch, WORKER, "train", *own, "--output", f"{tmp_path}/zero")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "zero" / "checkpoint-6" / "global_step6").is_dir()  # DeepSpeed's own folder
    assert main(["train", *own, "--output", f"{tmp_path}/one", "--per_device_train_batch_size", "4"]) == 0
    assert len(losses(tmp_path / "one")) == 6
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)  # as in test_processes
