"""How much the method's settings matter: keep ratio, rank, refresh interval and learning rate, one at a time.

Two studies of Double-LoRA, `columns` with a frozen factor:

* `network`: every layer of the network of `convergence.py`, 1,000 steps of momentum SGD, five seeds. It is small enough
  for a wide sweep. The result is the squared norm of the whole, exact gradient at the end.
* `language-model`: SmolLM2-135M-Instruct, text and batches of `training.py`, the modules that the paper estimates, 100
  steps of AdamW, three seeds. The result is the fall of the held-out loss.

Both are divided by LoRA's result with the same seed, and with the same learning rate if that is swept.

`python -m benchmarks.learning.sensitivity [STUDY ...]` writes `sensitivity-STUDY.jsonl` run by run, so an interrupted
study can be continued. `python -m benchmarks.tables` makes the tables and the pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import celora
from benchmarks import rows
from benchmarks.learning import convergence, training
from celora import CELoraConfig
from celora.runtime.attachment import require
from celora.settings.presets import PRESETS


@dataclass(frozen=True)
class Study:
    """One sweep: its settings, and how a run with some of them is trained and judged.

    Attributes:
        train: the row of a run, from `usual` with one setting changed, `arm` and `seed`.
        judged: the field of that row whose ratio to LoRA's is shown.
        called: the ratio, on the picture's axes.
        ticks: on these axes, which are logarithmic; the first is the lowest that is shown.
    """

    name: str
    usual: Mapping[str, float]
    sweeps: Mapping[str, Sequence[float]]
    seeds: Sequence[int]
    train: Callable[[Mapping[str, Any]], dict[str, Any]]
    judged: str
    called: str
    rate_unit: str
    ticks: Sequence[float]
    caption: str

    @property
    def results(self) -> Path:
        return Path(__file__).with_name(f"sensitivity-{self.name}.jsonl")

    def found(self) -> list[dict[str, Any]]:
        return rows.found(self.results)

    def wanted(self) -> list[dict[str, Any]]:
        """Every run: LoRA at every learning rate, CE-LoRA at every setting, none twice."""
        every = [{"arm": "LoRA", "learning rate": rate} for rate in self.sweeps["learning rate"]]
        every += [
            {"arm": "CE-LoRA", **self.usual, name: value} for name, values in self.sweeps.items() for value in values
        ]
        distinct = list({json.dumps(run, sort_keys=True): run for run in every}.values())
        return [run | {"seed": seed} for seed in self.seeds for run in distinct]

    def run(self, seeds: Sequence[int] | None = None) -> None:
        """Train what is missing, of these seeds alone if any are given."""
        for key in self.wanted():
            skipped = seeds is not None and key["seed"] not in seeds
            if skipped or any(key.items() <= row.items() for row in self.found()):
                continue
            row = key | self.train(key) | rows.conditions()
            print({name: row[name] for name in (*key, self.judged, "relative_error")}, flush=True)
            rows.append(self.results, row)

    def ratios(self, found: list[dict[str, Any]], name: str, value: float) -> list[float]:
        """CE-LoRA over LoRA, seed by seed, at one setting."""
        settings = {**self.usual, name: value}
        estimated = {row["seed"]: row[self.judged] for row in found if _is(row, "CE-LoRA", settings)}
        base = {
            row["seed"]: row[self.judged]
            for row in found
            if _is(row, "LoRA", {"learning rate": settings["learning rate"]})
        }
        return [
            estimated[seed] / base[seed] for seed in sorted(estimated.keys() & base.keys()) if math.isfinite(base[seed])
        ]

    def _every(self, found: list[dict[str, Any]]) -> list[list[float]]:
        return [self.ratios(found, name, value) for name, values in self.sweeps.items() for value in values]

    def furthest(self, *, means: bool) -> str:
        """How far a run, or the mean over the seeds, goes from LoRA's at any setting."""
        every = [[statistics.fmean(ratios)] if means else ratios for ratios in self._every(self.found())]
        return f"{max(abs(ratio - 1) for ratios in every for ratio in ratios):.0%}"

    def table(self) -> str:
        """Every setting: the ratio to LoRA, mean and range over seeds, and the error of the estimate."""
        found, body = self.found(), []
        for name, values in self.sweeps.items():
            for value in values:
                ratios = self.ratios(found, name, value)
                if not ratios:
                    continue
                errors = [r["relative_error"] for r in found if _is(r, "CE-LoRA", {**self.usual, name: value})]
                # A selection is judged when the next one replaces it; in a run of one there is nothing to judge.
                told = f"{statistics.median(errors):.2f}" if any(errors) else "not measured"
                usual = " (usual)" if value == self.usual[name] else ""
                ratio = f"{statistics.fmean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                body.append([name, f"{value:g}{usual}", ratio, told])
        if not body:
            return "Not measured yet."
        header = ["setting", "value", f"{self.called} (range)", "relative error, worst layer"]
        return rows.markdown(header, body) + f"\n\n{self.caption} {rows.where(found[0])}."

    def picture(self) -> str:
        """Four small charts beside each other: one point for each seed, a line through the means."""
        found = self.found()
        width, height, left, top, bottom = 260, 220, 56, 30, 50
        lowest, above = self.ticks[0], next(tick for tick in self.ticks if tick > 1)
        highest = max(max(ratios, default=1.0) for ratios in self._every(found))
        low, high = math.log10(lowest), max(math.log10(above), 1.05 * math.log10(highest))

        def y_of(ratio: float) -> float:
            return top + (high - math.log10(max(ratio, lowest))) / (high - low) * (height - top - bottom)

        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {2 * height}" font-family="sans-serif" '
            'font-size="11">',
            f'<rect width="{2 * width}" height="{2 * height}" fill="white"/>',
        ]
        for i, (name, values) in enumerate(self.sweeps.items()):
            parts.append(f'<g transform="translate({i % 2 * width} {i // 2 * height})">')
            step = (width - left - 20) / (len(values) - 1)
            for tick in self.ticks:
                if math.log10(tick) <= high:
                    y = y_of(tick)
                    parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - 12}" y2="{y:.1f}" stroke="#ddd"/>')
                    parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
            means = []
            for j, value in enumerate(values):
                x, ratios = left + j * step, self.ratios(found, name, value)
                weight = ' font-weight="bold"' if value == self.usual[name] else ""
                parts.append(
                    f'<text x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle"{weight}>{value:g}</text>'
                )
                parts += [
                    f'<circle cx="{x:.1f}" cy="{y_of(r):.1f}" r="2.5" fill="#0072b2" opacity="0.5"/>' for r in ratios
                ]
                if ratios:
                    means.append(f"{x:.1f},{y_of(statistics.fmean(ratios)):.1f}")
            parts.append(f'<polyline points="{" ".join(means)}" fill="none" stroke="#d55e00" stroke-width="2"/>')
            unit = {"refresh interval": ", steps", "learning rate": self.rate_unit}.get(name, "")
            middle = left + (width - left - 20) / 2
            parts.append(f'<text x="{middle:.0f}" y="{height - 14}" text-anchor="middle">{name}{unit}</text>')
            parts.append(f'<text x="8" y="16">{self.called}</text></g>')
        return "\n".join([*parts, "</svg>", ""])


def _is(row: Mapping[str, Any], arm: str, settings: Mapping[str, float]) -> bool:
    return row["arm"] == arm and settings.items() <= row.items()


def _on_the_network(key: Mapping[str, Any]) -> dict[str, Any]:
    config = None
    if key["arm"] == "CE-LoRA":
        config = CELoraConfig(
            **convergence.COLUMNS | {"refresh_every": int(key["refresh interval"])},
            keep_ratio=key["keep ratio"],
            rank=int(key["rank"]),
        )
    return convergence.train(config, NETWORK_STEPS, key["seed"], key["learning rate"])


def _on_the_language_model(key: Mapping[str, Any]) -> dict[str, Any]:
    batches, held_out = training.batches_of(key["seed"])
    model = training.make_model("exact LoRA", key["seed"])
    if key["arm"] == "CE-LoRA":
        columns = {"estimator": "columns", "keep_ratio": key["keep ratio"], "rank": int(key["rank"])}
        celora.attach(
            model,
            CELoraConfig(
                estimator="dense",
                refresh_every=int(key["refresh interval"]),
                overrides=dict.fromkeys(PRESETS["paper"].overrides, columns),
            ),
        )
    rate = key["learning rate"]
    losses = training.optimize(model, batches, held_out, steps=MODEL_STEPS, evaluate_every=MODEL_STEPS, rate=rate)
    errors = require(model).relative_errors.values() if key["arm"] == "CE-LoRA" else []
    return {
        "first_loss": losses[0],
        "last_loss": losses[MODEL_STEPS],
        "improvement": losses[0] - losses[MODEL_STEPS],
        "relative_error": max(errors, default=0.0),
    }


NETWORK_STEPS, MODEL_STEPS = 1000, 100
NETWORK = Study(
    name="network",
    usual={"keep ratio": 0.5, "rank": 4, "refresh interval": 50, "learning rate": 1.0},
    sweeps={
        "keep ratio": (0.1, 0.25, 0.4, 0.5, 0.65, 0.8),
        "rank": (0, 2, 4, 8, 16),
        "refresh interval": (1, 10, 50, 200, 1000),
        "learning rate": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    },
    seeds=range(5),
    train=_on_the_network,
    judged="last_squared_gradient",
    called="squared gradient over LoRA's",
    rate_unit=", / sqrt(T)",
    ticks=(0.5, 1, 2, 5, 10, 20, 50, 100),
    caption=f"{NETWORK_STEPS:,} steps, 5 seeds, network and learning rate as in `convergence.py`.",
)
LANGUAGE_MODEL = Study(
    name="language-model",
    usual={"keep ratio": 0.5, "rank": 14, "refresh interval": 20, "learning rate": 5e-4},
    sweeps={
        "keep ratio": (0.25, 0.5, 0.75),
        "rank": (0, 14, 56),
        "refresh interval": (5, 20, 100),
        "learning rate": (2.5e-4, 5e-4, 1e-3, 2e-3),
    },
    seeds=range(3),
    train=_on_the_language_model,
    judged="improvement",
    called="fall of the loss over LoRA's",
    rate_unit="",
    ticks=(0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1),
    caption=f"SmolLM2-135M (weights unpacked from 4 bits), {MODEL_STEPS} steps of 4 x 128 tokens, 3 seeds, text and "
    "batches as in `training.py`.",
)
STUDIES = {study.name: study for study in (NETWORK, LANGUAGE_MODEL)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"{' or '.join(STUDIES)}; default: both")
    parser.add_argument("--seeds", type=int, nargs="+", help="these alone")
    options = parser.parse_args()
    if unknown := set(options.studies) - STUDIES.keys():
        parser.error(f"no study named {', '.join(sorted(unknown))}; expected {' or '.join(STUDIES)}.")
    threads = torch.get_num_threads()
    for study in (STUDIES[name] for name in options.studies or STUDIES):
        torch.set_num_threads(1 if study is NETWORK else threads)  # matrices so small are slower on more
        study.run(options.seeds)
        print(study.table())


if __name__ == "__main__":
    main()
