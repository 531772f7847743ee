"""What two processes do in tests/whole/test_deepspeed.py, started by torchrun: `deepspeed_worker.py FOLDER`.

`deepspeed_worker.py train ...` is `celora train ...`, except that a fork must return to the launcher that waits for it.

First DeepSpeed's engine with ZeRO-2 and ZeRO-3 in a plain loop, and DDP, all on the batches of `distributed_worker`.
Then `celora train`, with and without an interruption.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import celora
from celora.cli.main import main as command
from celora.modeling import fused
from celora.runtime.attachment import require
from distributed_worker import COLUMNS, ROWS, SCENARIOS, STEPS, global_batch, optimizer_of
from distributed_worker import run as train_with_ddp
from small import make_model
from train_worker import train

STAGES = (2, 3)
# Else DeepSpeed compiles an all-reduce in shared memory for a minute; gloo adds up alike.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
    }


def run(stage: int, rank: int, world: int) -> dict[str, Any]:
    """The mean loss of every step, and what the clock counted."""
    model = make_model()
    celora.attach(model, celora.CELoraConfig(**COLUMNS))
    model.train()
    optimizer = optimizer_of(model)
    config = {**zero(stage), "train_micro_batch_size_per_gpu": ROWS // world}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    clock, losses = require(model).clock, []
    for step in range(STEPS):
        ids = global_batch(step)[rank::world]
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        clock.advance()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return {"losses": losses, "steps": clock.step}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for stage in STAGES:
        settings = folder / f"zero{stage}.json"
        settings.write_text(json.dumps(zero(stage)), encoding="utf-8")
        own = ["--celora", json.dumps(COLUMNS), "--deepspeed", str(settings), "--lr_scheduler_type", "constant"]
        assert train(folder, f"whole{stage}", *own) == 0
        assert train(folder, f"resumed{stage}", *own, "--max_steps", "3") == 0
        assert train(folder, f"resumed{stage}", *own, "--resume") == 0
    fused._FEWEST_TOKENS = 0
    rank, world = dist.get_rank(), dist.get_world_size()
    done = {"DDP": train_with_ddp(SCENARIOS["apart"], rank, world)}
    done |= {f"ZeRO-{stage}": run(stage, rank, world) for stage in STAGES}
    (folder / f"loops.{rank}.json").write_text(json.dumps(done), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "train":
        assert command(sys.argv[1:]) == 0
    else:
        main()
