"""Tables of what is learnt in several processes, of the accuracy of `celora estimate`, and of what it says of GPUs."""

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


def fits() -> str:
    """The smallest common GPU that each way to train fits on, by model."""
    found = rows.read(HERE / "gpus.jsonl")
    ways = dict.fromkeys((row["preset"], row["base"], row["checkpointing"]) for row in found)
    models = list(dict.fromkeys(row["model"] for row in found))
    body = []
    for preset, base, checkpointing in sorted(ways):
        own = {row["model"]: row for row in found if (row["preset"], row["base"], row["checkpointing"]) ==
               (preset, base, checkpointing)}  # fmt: skip
        cells = [f"{own[m]['smallest_gpu_gb'] or 'over 80'} GB ({own[m]['peak_bytes'] / 2**30:.1f})" for m in models]
        body.append([f"`{preset}`", base, "yes" if checkpointing else "", *cells])
    one = found[0]
    return (
        rows.markdown(["preset", "base", "checkpointing", *(f"Llama {model}" for model in models)], body)
        + f"\n\nThe peak in GiB in brackets. Computed, not measured: {one['batch']} rows of {one['length']} tokens, "
        f"all labelled, LoRA of rank {one['rank']} on every linear layer, bfloat16."
    )


def memory() -> str:
    """Peak memory of a process that loads a model and trains it, by dtype and way."""
    found = rows.read(HERE / "memory.jsonl")
    body = []
    for row in found:
        (plain,) = (r["peak_mib"] for r in found if (r["arm"], r["dtype"]) == ("PEFT", row["dtype"]))
        cells = [f"{row['base_mib']:,.0f} MiB", f"{row['peak_mib']:,.0f} MiB", f"{row['peak_mib'] / plain:.2f}"]
        body.append([row["dtype"], row["arm"], *cells])
    one = found[0]
    return (
        rows.markdown(["dtype", "", "base", "peak", "over PEFT's"], body)
        + f"\n\nA random Llama of hidden size {one['hidden']:,}, {one['blocks']} blocks, {one['vocabulary']:,} words; "
        f"{one['rows']} rows of {one['length']} tokens, all labelled. {rows.where(one)}."
    )


TABLES: dict[str, Callable[[], str]] = {
    "two_processes": two_processes,
    "estimate": estimate,
    "fits": fits,
    "memory": memory,
}
