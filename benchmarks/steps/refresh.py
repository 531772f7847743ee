"""What refreshing costs: the time of every optimizer step of a run, with refreshes spread and all at once.

SmolLM2-135M-Instruct, bf16, LoRA r=16, 4 x 128 tokens. There are three runs: `paper` (all layers refresh at steps 0,
200, ...), `paper` with spread refreshes, and a plan. The interval is shortened to 20 steps, and each run has
two intervals. The share of time at the default interval of 200 follows from the extra time of one. Writes
`refresh.jsonl`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging

import celora
from benchmarks import rows
from benchmarks.learning import training
from celora.machine.allocator import keep_freed_memory
from celora.runtime.attachment import require
from celora.settings.presets import PRESETS

INTERVAL, DEFAULT = 20, 200


def run(arm: str) -> dict[str, object]:
    batches, _ = training.batches_of(0)
    model = training.make_model("exact LoRA", 0)
    if arm == "plan":
        config = celora.make_plan(model, batches).config()
    else:
        config = dataclasses.replace(PRESETS["paper"], spread="spread" in arm)
    # Nothing is refreshed in the first `INTERVAL` steps but what is new; then comes one whole round.
    celora.attach(model, dataclasses.replace(config, refresh_every=INTERVAL))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    times = []
    for step in range(2 * INTERVAL + 1):
        begun = time.perf_counter()
        training._step(model, optimizer, batches[step % len(batches)])
        times.append(time.perf_counter() - begun)
    # What the steps take without a refresh: the same model, told that none is due.
    for graft in require(model).grafts.values():
        graft.mode = celora.modeling.switch.Mode.ESTIMATE
    require(model).clock.stop()
    bare = []
    for step in range(INTERVAL):
        begun = time.perf_counter()
        training._step(model, optimizer, batches[step % len(batches)])
        bare.append(time.perf_counter() - begun)
    median = statistics.median(times[2:])
    usual = statistics.median(bare)
    extra = sum(times[INTERVAL + 1 :]) - INTERVAL * statistics.mean(bare)
    return {
        "arm": arm,
        "median_ms": round(1e3 * median, 1),
        "without_refresh_ms": round(1e3 * usual, 1),
        "first_over_median": round(times[0] / median, 3),
        "slowest_over_median": round(max(times[1:]) / median, 3),
        "slowest_without_refresh": round(max(bare) / usual, 3),
        "share_at_default_interval": round(extra / (DEFAULT * usual), 4),
    } | rows.conditions()


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    logging.disable_progress_bar()
    keep_freed_memory()
    found = [run(arm) for arm in ("paper", "paper, spread", "plan")]
    for row in found:
        Console().print({key: value for key, value in row.items() if key not in rows.conditions()})
    rows.write(Path(__file__).with_name("refresh.jsonl"), found)


if __name__ == "__main__":
    main()
