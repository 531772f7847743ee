"""Table of what is learnt in several processes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks import rows
from celora.studies.demo import REFRESH_EVERY

HERE = Path(__file__).parent


def two_processes() -> str:
    """Held-out accuracy of the demo in one process and in two."""
    found = rows.read(HERE / "two-processes.jsonl")
    seeds = sorted({row["seed"] for row in found})
    body = []
    for arm, way in dict.fromkeys((row["arm"], row["way"]) for row in found):
        by_seed = {row["seed"]: row["accuracy"] for row in found if (row["arm"], row["way"]) == (arm, way)}
        cells = [f"{by_seed[seed]:.1%}" if seed in by_seed else "" for seed in seeds]
        body.append([arm, way, *cells, f"{statistics.mean(by_seed.values()):.1%}"])
    one = found[0]
    return (
        rows.markdown(["", "", *(f"seed {seed}" for seed in seeds), "mean"], body)
        + f"\n\nSmolLM2-135M-Instruct ({rows.UNPACKED}; {one['dtype']}), {one['steps']} steps of "
        f"{one['batch']} sentences in all, {one['held_out']} held-out sentences, torch {one['torch']}, gloo. CE-LoRA "
        f"is the preset `paper`, refreshed every {REFRESH_EVERY} steps; with FSDP2 also `synchronise`."
    )


TABLES: dict[str, Callable[[], str]] = {"two_processes": two_processes}
