"""Tables, numbers and pictures of what is learnt, with estimates and without."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.learning import convergence_tables, quality_tables

HERE = Path(__file__).parent
_FEWEST_SEEDS = 3
_Pair = tuple[dict[int, float], dict[int, float]]  # an arm's losses by step, and exact LoRA's


def training() -> str:
    """Held-out loss after 200 steps, and what is kept of exact LoRA's improvement, at equal steps and equal time."""
    found = rows.read(HERE / "training.jsonl")
    times = rows.read(HERE / "training-time.jsonl")
    ratios = {row["arm"]: row["ratio"] for row in times}
    lossless = "preset exact"  # has no losses of its own: it learns what LoRA learns
    if copied := all(row["arm"] != lossless for row in found):
        found += [row | {"arm": lossless} for row in found if row["arm"] == "exact LoRA"]
    seeds = len({row["seed"] for row in found if row["arm"] == "exact LoRA"})
    body = []
    arms = dict.fromkeys(["exact LoRA", lossless, *(row["arm"] for row in found)])
    for arm, cpu in dict.fromkeys((arm, row["cpu"]) for arm in arms for row in found if row["arm"] == arm):
        pairs = _pairs(found, arm, cpu)
        kept = [_share(losses, lora, max(losses)) for losses, lora in pairs]
        last, ahead = [], {"exact LoRA": [], lossless: []}
        for losses, reference in pairs:
            end = max(losses)
            last.append(losses[end])
            for rival, by in ahead.items():
                if {arm, rival} <= ratios.keys() and arm != rival and ratios[arm] <= ratios[rival]:
                    by.append(_at(reference, end * ratios[arm] / ratios[rival]) - losses[end])
        body.append(
            [
                (arm if len(pairs) == seeds else f"{arm} (seeds: {len(pairs)})")
                + (", LoRA's losses" if arm == lossless and copied else ""),
                cpu,
                f"{statistics.mean(last):.3f} ({min(last):.3f} to {max(last):.3f})",
                f"{statistics.mean(kept):.1%} ({min(kept):.1%} to {max(kept):.1%})",
                f"{ratios[arm]:.3f}" if arm in ratios else "",
                *(_mean_and_range(by) if by else "" for by in ahead.values()),
            ]
        )
    where = "; ".join(dict.fromkeys(rows.where(row) for row in found))
    return (
        rows.markdown(
            [
                "",
                "CPU",
                "held-out loss",
                "share of exact LoRA's improvement",
                f"step time on {times[0]['cpu']}",
                "ahead at equal time",
                "of preset exact",
            ],
            body,
        )
        + f"\n\n{seeds} seeds, 200 steps of 4 x 128 tokens, bfloat16. Trained on {where}; each arm is compared with "
        "LoRA on the CPU of its name, whatever instructions either was kept to. Steps timed in turns: "
        f"{rows.where(times[0])}. Ahead: the loss after the same time of exact LoRA, or of preset `exact`, which "
        "learns the same faster, minus the arm's. Slower arms have no entry. `auto`, `fast` "
        "and `paper` skip what preset `exact` skips, the others do not."
    )


def _kept(found: list[dict[str, Any]], arm: str) -> list[float]:
    """The share of exact LoRA's improvement in held-out loss that an arm keeps, seed by seed."""
    return [_share(losses, lora, max(losses)) for losses, lora in _pairs(found, arm)]


def _pairs(found: list[dict[str, Any]], arm: str, cpu: str | None = None) -> list[_Pair]:
    """The losses of an arm's runs, each with those of exact LoRA on the same CPU and with the same seed."""
    exact = {(row["cpu"], row["seed"]): _losses(row) for row in found if row["arm"] == "exact LoRA"}
    return [
        (_losses(row), exact[row["cpu"], row["seed"]])
        for row in found
        if row["arm"] == arm and cpu in (None, row["cpu"]) and (row["cpu"], row["seed"]) in exact
    ]


def _share(losses: dict[int, float], lora: dict[int, float], at: int) -> float:
    """The share kept of exact LoRA's improvement until step `at`."""
    return (lora[0] - losses[at]) / (lora[0] - lora[at])


def share_kept(arm: str) -> str:
    """That share in a sentence: the mean and the range over the seeds."""
    shares = _kept(rows.read(HERE / "training.jsonl"), arm)
    return f"{statistics.mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%}, {len(shares)} seeds)"


def training_code() -> str:
    """What is kept of exact LoRA's improvement on the source of the standard library, on the way of a longer run."""
    return "\n\n".join(map(_training_code, _studies_on_code()))


def _studies_on_code() -> list[list[dict[str, Any]]]:
    """Runs that may be compared: of one dtype, length and norm at which gradients are clipped, smaller norms first.

    Arms without three seeds are left out: their runs are not all there.
    """
    kinds: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for row in rows.read(HERE / "training-code.jsonl"):
        kinds.setdefault((row["dtype"], max(_losses(row)), row.get("clip") or math.inf), []).append(row)
    whole = [
        [row for row in kinds[kind] if len(_pairs_on_code(kinds[kind], row["arm"])) >= _FEWEST_SEEDS]
        for kind in sorted(kinds)
    ]
    return [found for found in whole if found]


def _training_code(found: list[dict[str, Any]]) -> str:
    """Of runs of one length and dtype. Single losses of a constant rate are noisy, so each column has several."""
    one, shown, body = found[0], _fifths(found), []
    clipped = f"gradients clipped at {one['clip']:g}" if one.get("clip") else "gradients not clipped"
    times = rows.read(HERE / "training-time.jsonl")
    ratios = {row["arm"]: row["ratio"] for row in times}
    where = "; ".join(dict.fromkeys(rows.where(row) for row in found))
    for arm in dict.fromkeys(row["arm"] for row in found):
        pairs = _pairs_on_code(found, arm)
        if not pairs:
            continue
        cells = [_mean_share(pairs, part) for part in shown]
        ahead = [
            statistics.mean(_at(lora, at * ratios[arm]) - curve[at] for at in shown[-1])
            for curve, lora in pairs
            if ratios.get(arm, 1) < 1
        ]
        timed = [f"{ratios[arm]:.3f}" if arm in ratios else "", _mean_and_range(ahead) if ahead else ""]
        elsewhere = quality_tables.elsewhere(_by_seed(found, arm), _by_seed(found, "exact LoRA"))
        body.append([arm, f"{len(pairs)}{elsewhere}", *cells, *timed])
    header = ["share of exact LoRA's improvement", "seeds", *(f"steps {part[0]:,} to {part[-1]:,}" for part in shown)]
    return (
        rows.markdown([*header, "step time", "ahead at equal time"], body)
        + f"\n\n4 x 128 tokens, {one['dtype']}, {clipped}. Trained on {where}. Columns are means of {len(shown[0])} "
        f"held-out losses. Ahead: in the last column, nats. Steps timed in turns: {rows.where(times[0])}."
    )


def _pairs_on_code(found: list[dict[str, Any]], arm: str) -> list[_Pair]:
    """The losses of an arm's runs, each with those of exact LoRA with the same seed. Each run was made on one CPU."""
    runs, exact = _by_seed(found, arm), _by_seed(found, "exact LoRA")
    return [(_losses(runs[seed]), _losses(exact[seed])) for seed in runs if seed in exact]


def _by_seed(found: list[dict[str, Any]], arm: str) -> dict[int, dict[str, Any]]:
    return {row["seed"]: row for row in found if row["arm"] == arm}


def _fifths(found: list[dict[str, Any]]) -> list[list[int]]:
    """The steps at which losses were measured, in five parts."""
    steps = sorted(_losses(found[0]))[1:]
    width = max(1, len(steps) // 5)
    return [steps[first : first + width] for first in range(0, len(steps), width)]


def _mean_share(pairs: list[_Pair], steps: Sequence[int]) -> str:
    """The share kept of exact LoRA's improvement, of mean losses: the mean and the range over the seeds."""
    means = [[statistics.mean(curve[at] for at in steps) for curve in pair] for pair in pairs]
    shares = [(lora[0] - own) / (lora[0] - other) for (_, lora), (own, other) in zip(pairs, means, strict=True)]
    return f"{statistics.mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"


def at_length(arm: str) -> str:
    """That share in the last fifth of the longest runs; of those with clipped gradients, if the arm has them."""
    studies = [found for found in _studies_on_code() if _pairs_on_code(found, arm)]
    longest = max(studies, key=lambda found: max(_losses(found[0])))
    return _mean_share(_pairs_on_code(longest, arm), _fifths(longest)[-1])


def _mean_and_range(values: list[float]) -> str:
    return f"{statistics.mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})"


def _losses(row: dict[str, Any]) -> dict[int, float]:
    return {int(step): loss for step, loss in row["losses"].items()}


def _at(losses: dict[int, float], step: float) -> float:
    """The loss at a step, interpolated between two measured ones."""
    steps = sorted(losses)
    low = max(i for i, s in enumerate(steps[:-1]) if s <= step)
    along = (step - steps[low]) / (steps[low + 1] - steps[low])
    return losses[steps[low]] + along * (losses[steps[low + 1]] - losses[steps[low]])


TABLES: dict[str, Callable[[], str]] = {
    "training": training,
    "training_code": training_code,
    **quality_tables.TABLES,
    **convergence_tables.TABLES,
}
VALUES: dict[str, Callable[[], str]] = {
    "kept_by_auto": functools.partial(share_kept, "auto"),
    "kept_by_fast_on_int8": functools.partial(share_kept, "fast, base int8"),
    "kept_at_length_by_auto": functools.partial(at_length, "auto"),
    "kept_at_length_by_fast": functools.partial(at_length, "fast"),
    "kept_by_the_rule": functools.partial(share_kept, "int8 x tokens 0.99"),
    **quality_tables.VALUES,
}
PICTURES = convergence_tables.PICTURES
