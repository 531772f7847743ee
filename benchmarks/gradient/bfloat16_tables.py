"""The tables of `bfloat16.py`, from its committed rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import rows

RESULTS = Path(__file__).with_name("bfloat16.jsonl")
Row = dict[str, Any]


def gradient() -> str:
    """How far from float32 the gradient is with PEFT, with `exact` and with its parts, batch by batch."""
    found = [row for row in _of("gradient") if row["neighbour"] == 0]
    body = []
    for model, arm in dict.fromkeys((row["model"], row["arm"]) for row in found if "cosine" in row):
        matching = [row for row in found if (row["model"], row["arm"]) == (model, arm)]
        cosines = [row["cosine"] for row in matching]
        body.append(
            [
                model,
                arm,
                f"{statistics.median(cosines):.4f} ({min(cosines):.4f} to {max(cosines):.4f})",
                f"{statistics.median(row['relative_error'] for row in matching):.4f}",
                "" if arm == "PEFT" else _nearer(found, model, arm),
            ]
        )
    table = rows.markdown(
        ["model", "arm", "cosine, median (range)", "relative error, median", "nearer to float32 than PEFT"], body
    )
    return f"{table}\n\n{_conditions(found)}"


def chance() -> str:
    """Whether `exact` is nearer than PEFT beyond chance: the same batches on neighbouring models."""
    found = _of("gradient")
    body = []
    for model in dict.fromkeys(row["model"] for row in found):
        errors_of = {arm: _errors(found, model, arm) for arm in ("PEFT", "exact")}
        ratios = [math.log(errors_of["exact"][key] / errors_of["PEFT"][key]) for key in errors_of["PEFT"]]
        batches = {key[:2] for key in errors_of["PEFT"]}
        by_batch = [
            statistics.fmean(r for key, r in zip(errors_of["PEFT"], ratios, strict=True) if key[:2] == b)
            for b in batches
        ]
        middle, several = statistics.fmean(by_batch), len(by_batch) > 1
        error = statistics.stdev(by_batch) / math.sqrt(len(by_batch)) if several else math.inf
        spread = [
            max(errors) / min(errors)
            for batch in batches
            if len(errors := [e for key, e in errors_of["PEFT"].items() if key[:2] == batch]) > 1
        ]
        body.append(
            [
                model,
                str(len(ratios)),
                f"{sum(r < 0 for r in ratios)} of {len(ratios)}",
                f"{math.exp(middle):.3f}"
                + (f" ({math.exp(middle - 2 * error):.3f} to {math.exp(middle + 2 * error):.3f})" if several else ""),
                f"{statistics.median(spread):.2f} ({max(spread):.2f})",
            ]
        )
    return rows.markdown(
        [
            "model",
            "pairs of batch and neighbour",
            "`exact` nearer",
            "relative error, `exact` over PEFT (± 2 standard errors over batches)",
            "PEFT's largest error over its smallest, same batch on neighbours: median (most)",
        ],
        body,
    )


def rounding() -> str:
    """What rounding one kind of operation costs, everything else in float32."""
    found = _of("rounding")
    models = list(dict.fromkeys(row["model"] for row in found))
    body = []
    for arm in dict.fromkeys(row["arm"] for row in found):
        cells = [arm]
        for model in models:
            for direction in ("both",) if arm == "PEFT" else ("forward", "backward"):
                errors = [
                    r["relative_error"]
                    for r in found
                    if (r["model"], r["arm"], r["direction"]) == (model, arm, direction)
                ]
                cells.append(f"{statistics.median(errors):.4f}" if errors else "")
            if arm == "PEFT":
                cells.append("")
        body.append(cells)
    body[0][0] = "PEFT in bfloat16 (both)"
    header = ["rounded", *(f"{model}, {direction}" for model in models for direction in ("forward", "backward"))]
    return f"{rows.markdown(header, body)}\n\n{_conditions(found)}"


def training() -> str:
    """Held-out loss after training in three ways, and how near the way is to float32's."""
    found = _of("training")
    if not found:
        return "Not measured yet."
    seeds = sorted({row["seed"] for row in found})
    body = []
    for arm in dict.fromkeys(row["arm"] for row in found):
        by_seed = {row["seed"]: row for row in found if row["arm"] == arm}
        base = {row["seed"]: row["after"] for row in found if row["arm"] == "float32"}
        body.append(
            [
                arm,
                " ".join(f"{by_seed[seed]['after']:.4f}" for seed in seeds),
                "" if arm == "float32" else f"{statistics.fmean(by_seed[s]['after'] - base[s] for s in seeds):+.4f}",
                "" if arm == "float32" else " ".join(f"{by_seed[seed]['cosine']:.3f}" for seed in seeds),
            ]
        )
    before = statistics.fmean(row["before"] for row in found)
    table = rows.markdown(
        [
            "arm",
            "held-out loss, by seed",
            "above float32's, mean",
            "cosine of the whole update with float32's, by seed",
        ],
        body,
    )
    return (
        f"{table}\n\nBefore: {before:.4f}. SmolLM2-135M, {found[0]['steps']} steps of 128 tokens, "
        f"{_counted(len(seeds), 'seed')}. {_machines(found)}"
    )


def _of(study: str) -> list[Row]:
    return [row for row in rows.found(RESULTS) if row["study"] == study]


def _errors(found: Iterable[Row], model: str, arm: str) -> dict[tuple[int, int, int], float]:
    """(seed, batch, neighbour) -> relative error."""
    matching = [row for row in found if (row["model"], row["arm"]) == (model, arm)]
    return {(row["seed"], row["batch"], row.get("neighbour", 0)): row["relative_error"] for row in matching}


def _nearer(found: list[Row], model: str, arm: str) -> str:
    theirs, ours = _errors(found, model, "PEFT"), _errors(found, model, arm)
    return f"{sum(ours[key] < theirs[key] for key in theirs)} of {len(theirs)} batches"


def _conditions(found: list[Row]) -> str:
    """Seeds, batches and machines of these rows."""
    counted = {
        model: {(r["seed"], r["batch"]) for r in found if r["model"] == model} for model in {r["model"] for r in found}
    }
    said = "; ".join(
        f"{model} {_counted(len(keys), 'batch')}, {_counted(len({seed for seed, _ in keys}), 'seed')}"
        for model, keys in sorted(counted.items())
    )
    return f"{said}. {_machines(found)}"


def _machines(found: list[Row]) -> str:
    return f"{'; '.join(sorted({rows.where(row) for row in found}))}."


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "es" if what.endswith("ch") else "s")


TABLES: dict[str, Callable[[], str]] = {
    "bfloat16_gradient": gradient,
    "bfloat16_chance": chance,
    "bfloat16_rounding": rounding,
    "bfloat16_training": training,
}
