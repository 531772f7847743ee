"""What Adam sees of an estimated gradient: the cosine after each number is divided by its root mean square.

The cosine of a whole gradient is dominated by a few large numbers. Adam divides each number g by its own scale, with
the second moments v of the optimizer after t steps:

    g / (sqrt(v / (1 - beta2^t)) + eps)

SmolLM2-135M-Instruct in float32, LoRA r=16 on all linear layers, after 30 exact steps of AdamW on 2 x 128 tokens of the
Python language reference; the sum of the four next batches, three seeds. `python -m benchmarks.gradient.adam` writes
`adam.jsonl`: every setting on all layers, and one setting on each kind of layer alone. A plan spends an allowed squared
error where it saves the most time. If both squared errors are in the same ratio for all kinds of layers, a plan for
either of them is the same plan.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import celora
from benchmarks import rows
from benchmarks.gradient import fidelity
from benchmarks.learning.training import LINEAR, energy
from celora import CELoraConfig
from celora.settings.presets import PRESETS

RESULTS = Path(__file__).with_name("adam.jsonl")
STEPS, BATCHES = 30, 4
SETTINGS: dict[str, Any] = {
    "int8": CELoraConfig(estimator="int8", spread=True),
    "int8 x tokens 0.9997 (auto's rule)": energy(0.9997, "int8"),
    "int8 x tokens 0.999": energy(0.999, "int8"),
    "int8 x tokens 0.99": energy(0.99, "int8"),
    "tokens 0.99": energy(0.99, "native"),
    "fast": PRESETS["fast"],
    "paper": PRESETS["paper"],
}
ALONE = "int8 x tokens 0.99"


def only(kind: str) -> CELoraConfig:
    """The setting that is tried on one kind of layer, with all others exact."""
    alone = SETTINGS[ALONE]
    fields = {name: getattr(alone, name) for name in ("estimator", "keep_ratio", "rank", "selection", "precision")}
    return CELoraConfig(estimator="dense", keep_ratio=1.0, rank=0, spread=True, overrides={f"*{kind}": fields})


def study(seed: int) -> list[dict[str, Any]]:
    batches = fidelity.text_batches(seed, consecutive=True)
    model = fidelity.warmed_up(seed, [])
    optimizer = fidelity.exact_steps(model, batches[:STEPS], rate=1e-3)
    settings = SETTINGS | {f"{ALONE}, {kind} alone": only(kind) for kind in LINEAR}
    found = []
    for name, config in settings.items():
        celora.attach(model, config)
        report = celora.audit(model, batches[STEPS : STEPS + BATCHES], optimizer=optimizer)
        celora.detach(model)
        seen = report.preconditioned
        assert seen is not None
        found.append(
            {
                "setting": name,
                "seed": seed,
                "cosine": round(report.cosine, 5),
                "squared_error": report.relative_error**2,
                "adam_cosine": round(seen.cosine, 5),
                "adam_squared_error": seen.relative_error**2,
            }
            | rows.conditions()
        )
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # sums have one order
    rows.write(RESULTS, [row for seed in range(options.seeds) for row in study(seed)])


if __name__ == "__main__":
    main()
