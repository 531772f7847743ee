"""How much the method's settings matter: keep ratio, rank, refresh interval and learning rate, one at a time.

The network of `convergence.py`, 1,000 steps of momentum SGD, five seeds: small enough to sweep, and it has an exact
gradient to be judged by. It shows which settings matter and in which direction; the numbers of a language model are
others. Measured is the squared norm of the whole gradient at the end, as a ratio to LoRA's with the same seed (with the
same learning rate, where that is swept).

Writes `results/sensitivity.jsonl`, run by run, so an interrupted study goes on; `python benchmarks/tables.py` makes the
table and the picture.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

import convergence
import rows
from celora import CELoraConfig

STEPS, SEEDS = 1000, range(5)
USUAL: dict[str, float] = {"keep ratio": 0.5, "rank": 4, "refresh interval": 50, "learning rate": 1.0}
SWEEPS: dict[str, Sequence[float]] = {
    "keep ratio": (0.1, 0.25, 0.4, 0.5, 0.65, 0.8),
    "rank": (0, 2, 4, 8, 16),
    "refresh interval": (1, 10, 50, 200, 1000),
    "learning rate": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
}
RESULTS = rows.RESULTS / "sensitivity.jsonl"


def configuration(settings: dict[str, float]) -> CELoraConfig:
    return CELoraConfig(
        **convergence.COLUMNS | {"refresh_every": int(settings["refresh interval"])},
        keep_ratio=settings["keep ratio"],
        rank=int(settings["rank"]),
    )


def wanted() -> list[dict[str, Any]]:
    """Every run: LoRA at every learning rate, CE-LoRA at every setting, none twice."""
    every = [{"arm": "LoRA", "learning rate": rate} for rate in SWEEPS["learning rate"]]
    every += [{"arm": "CE-LoRA", **USUAL, name: value} for name, values in SWEEPS.items() for value in values]
    distinct = list({json.dumps(of, sort_keys=True): of for of in every}.values())
    return [of | {"seed": seed} for seed in SEEDS for of in distinct]


def run() -> None:
    """Train what is missing."""
    found = rows.read(RESULTS) if RESULTS.exists() else []
    for key in wanted():
        if any(key.items() <= row.items() for row in found):
            continue
        config = None if key["arm"] == "LoRA" else configuration(key)
        row = key | convergence.train(config, STEPS, key["seed"], key["learning rate"]) | rows.conditions()
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def ratios(found: list[dict[str, Any]], name: str, value: float) -> list[float]:
    """CE-LoRA's squared gradient at the end over LoRA's, seed by seed, at one setting."""
    settings = {**USUAL, name: value}
    of = {row["seed"]: row for row in found if row["arm"] == "CE-LoRA" and settings.items() <= row.items()}
    base = {
        row["seed"]: row for row in found if row["arm"] == "LoRA" and row["learning rate"] == settings["learning rate"]
    }
    last = "last_squared_gradient"
    return [of[seed][last] / base[seed][last] for seed in sorted(of) if math.isfinite(base[seed][last])]


def furthest_mean() -> str:
    """How far the mean over the seeds goes from LoRA's at any setting."""
    return _furthest([[statistics.fmean(of)] for of in _by_setting()])


def furthest_run() -> str:
    """How far one run goes from LoRA's at any setting."""
    return _furthest(_by_setting())


def _by_setting() -> list[list[float]]:
    found = rows.read(RESULTS)
    return [ratios(found, name, value) for name, values in SWEEPS.items() for value in values]


def _furthest(of: list[list[float]]) -> str:
    return f"{max(abs(ratio - 1) for by_seed in of for ratio in by_seed):.0%}"


def table() -> str:
    """Every setting: the ratio to LoRA, mean and range over seeds, and the error of the estimate."""
    found = rows.read(RESULTS)
    body = []
    for name, values in SWEEPS.items():
        for value in values:
            of = ratios(found, name, value)
            settings = {**USUAL, name: value}
            errors = [r["relative_error"] for r in found if r["arm"] == "CE-LoRA" and settings.items() <= r.items()]
            # A selection is judged when the next one replaces it; in a run of one there is nothing to judge.
            told = f"{statistics.median(errors):.2f}" if any(errors) else "not measured"
            usual = " (usual)" if value == USUAL[name] else ""
            ratio = f"{statistics.fmean(of):.2f} ({min(of):.2f} to {max(of):.2f})"
            body.append([name, f"{value:g}{usual}", ratio, told])
    header = ["setting", "value", "squared gradient over LoRA's (range)", "relative error, worst layer"]
    return (
        rows.markdown(header, body)
        + f"\n\n{STEPS:,} steps, {len(SEEDS)} seeds, network and learning rate as in `convergence.py`."
    )


def picture() -> str:
    """Four small charts beside each other: one point for each seed, a line through the means."""
    found = rows.read(RESULTS)
    width, height, left, top, bottom = 260, 220, 56, 30, 50
    top_ratio = max(max(ratios(found, name, value)) for name, values in SWEEPS.items() for value in values)
    low, high = math.log10(0.5), max(math.log10(2), math.log10(top_ratio) * 1.05)

    def y_of(ratio: float) -> float:
        return top + (high - math.log10(max(ratio, 0.5))) / (high - low) * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {2 * height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{2 * width}" height="{2 * height}" fill="white"/>',
    ]
    for i, (name, values) in enumerate(SWEEPS.items()):
        parts.append(f'<g transform="translate({i % 2 * width} {i // 2 * height})">')
        step = (width - left - 20) / (len(values) - 1)
        for tick in (0.5, 1, 2, 5, 10, 20, 50, 100):
            if low <= math.log10(tick) <= high:
                y = y_of(tick)
                parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - 12}" y2="{y:.1f}" stroke="#ddd"/>')
                parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        means = []
        for j, value in enumerate(values):
            x, of = left + j * step, ratios(found, name, value)
            means.append(f"{x:.1f},{y_of(statistics.fmean(of)):.1f}")
            weight = ' font-weight="bold"' if value == USUAL[name] else ""
            parts.append(f'<text x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle"{weight}>{value:g}</text>')
            parts += [f'<circle cx="{x:.1f}" cy="{y_of(r):.1f}" r="2.5" fill="#0072b2" opacity="0.5"/>' for r in of]
        parts.append(f'<polyline points="{" ".join(means)}" fill="none" stroke="#d55e00" stroke-width="2"/>')
        unit = {"refresh interval": ", steps", "learning rate": ", / sqrt(T)"}.get(name, "")
        middle = left + (width - left - 20) / 2
        parts.append(f'<text x="{middle:.0f}" y="{height - 14}" text-anchor="middle">{name}{unit}</text>')
        parts.append('<text x="8" y="16">||gradient||² over LoRA\'s</text></g>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)  # matrices this small are slower on more
    run()
    print(table())


if __name__ == "__main__":
    main()
