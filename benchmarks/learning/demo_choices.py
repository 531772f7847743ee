"""Makes the demo's choices on sentences that its results never use (the validation split).

`wordings`: the accuracy of the untouched model with each wording of the question; the best is kept. `train`: the
accuracy of both arms after training with one wording, learning rate, number of steps and batch size. Appends rows to
`demo-choices.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks import rows
from celora.studies import sentiment
from celora.studies.assets import demo_model
from celora.studies.demo import ARMS, run_demo
from celora.studies.sentiment import splits, to_rows
from celora.studies.stock_eval import label_accuracy

SYSTEM = "Classify the sentiment of movie reviews."
WORDINGS = [
    (SYSTEM, "{text}\nSentiment:"),
    (SYSTEM, "Review: {text}\nSentiment (positive or negative):"),
    (SYSTEM, "{text}\nSentiment (positive or negative):"),
    (SYSTEM, "Is this review positive or negative?\n{text}"),
    (SYSTEM, "Review: {text}\nIs the sentiment positive or negative?"),
    ("Classify the sentiment as positive or negative.", "{text}\nSentiment:"),
    ("Answer with one word: positive or negative.", "{text}\nSentiment:"),
    ("You are a helpful assistant.", "{text}\nSentiment:"),
]


def wordings() -> list[dict[str, object]]:
    """Accuracy of the untouched model with each wording."""
    reviews = splits(0, validation=600, test=600).validation
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.bfloat16).eval()
    return [
        {
            "choice": "wording",
            "system": system,
            "question": question,
            "accuracy": label_accuracy(model, tokenizer, to_rows(reviews, system=system, question=question)),
            "sentences": len(reviews),
        }
        for system, question in WORDINGS
    ]


def trained(folder: Path, wording: int, rate: float, steps: int, batch: int, seeds: int) -> list[dict[str, object]]:
    """Accuracy of the contenders after training so."""
    sentiment.SYSTEM, sentiment.QUESTION = WORDINGS[wording]
    rates = dict.fromkeys(ARMS, rate)
    outcomes = run_demo(folder, seeds=seeds, judge="validation", learning_rates=rates, steps=steps, batch_size=batch)
    return [
        {
            "choice": "training",
            "arm": row.arm,
            "seed": row.seed,
            "system": sentiment.SYSTEM,
            "question": sentiment.QUESTION,
            "learning_rate": rate,
            "steps": steps,
            "batch_size": batch,
            "accuracy": row.accuracy,
            "sentences": row.held_out,
        }
        for row in outcomes
        if row.arm != "untouched"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["wordings", "train"])
    parser.add_argument("--folder", type=Path, default=Path("demo-choices"))
    parser.add_argument("--wording", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    logging.disable_progress_bar()
    if options.what == "wordings":
        found = wordings()
    else:
        found = trained(options.folder, options.wording, options.rate, options.steps, options.batch, options.seeds)
    for row in found:
        Console().print_json(json.dumps(row))
        rows.append(Path(__file__).with_name("demo-choices.jsonl"), row | rows.conditions())


if __name__ == "__main__":
    main()
