"""Tables of what is learnt in several processes, and of the accuracy of `celora estimate`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks import rows
from celora.studies.demo import REFRESH_EVERY

HERE = Path(__file__).parent
_MODELS = {"smollm2": "SmolLM2-135M", "h1024-b8": "hidden 1024, 8 blocks", "h2048-b8": "hidden 2048, 8 blocks"}


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


def estimate() -> str:
    """Peak memory and time of an epoch of each way to train, and what `celora estimate` says over that."""
    found = rows.read(HERE / "estimate.jsonl")
    body = [
        [
            _MODELS[row["model"]],
            f"{row['dtype']}, base in int8" if row["base"] == "int8" else row["dtype"],
            "yes" if row["checkpointing"] else "",
            f"{row['peak_mib']:,.0f} MiB",
            f"{row['estimated_mib'] / row['peak_mib']:.2f}",
            f"{row['epoch_s']:.1f} s",
            f"{row['estimated_s'] / row['epoch_s']:.2f}",
        ]
        for row in found
    ]
    header = ["model", "way", "checkpointing", "peak", "estimate over it", "epoch", "estimate over it"]
    one, turns = found[0], [row["turns"] for row in found]
    return (
        rows.markdown(header, body)
        + f"\n\nPreset `{one['preset']}`, {one['rows']} sentences, {one['batch']} in a batch, {rows.where(one)}. "
        f"Means of {min(turns)} to {max(turns)} turns. An epoch is without evaluation and saving."
    )


TABLES: dict[str, Callable[[], str]] = {"two_processes": two_processes, "estimate": estimate}
