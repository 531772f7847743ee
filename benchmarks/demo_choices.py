"""What the demo leaves to choose, chosen on sentences that the demo's results never see (the validation split).

The wording of the question: of those tried, the accuracy of the untouched model, and for the best two the accuracy
after plain LoRA, which decides. Then each contender's learning rate, so that neither is handicapped. Writes
`results/demo-choices.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import rows
from celora.train import sentiment
from celora.train.assets import demo_model
from celora.train.demo import ARMS, run_demo
from celora.train.sentiment import splits, to_rows
from celora.train.stock_eval import label_accuracy

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


def trained(
    folder: Path, wording: tuple[str, str], rate: float, arms: list[str], seeds: int
) -> list[dict[str, object]]:
    """Accuracy of the contenders after training with this wording and learning rate."""
    sentiment.SYSTEM, sentiment.QUESTION = wording
    of = run_demo(folder, seeds=seeds, judge="validation", learning_rates=dict.fromkeys(ARMS, rate), arms=arms)
    return [
        {
            "choice": "training",
            "arm": row.arm,
            "seed": row.seed,
            "system": wording[0],
            "question": wording[1],
            "learning_rate": rate,
            "accuracy": row.accuracy,
            "sentences": row.held_out,
        }
        for row in of
        if row.arm != "untouched"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo-choices"))
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3])
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    logging.disable_progress_bar()
    found = wordings()
    best = sorted(found, key=lambda row: -row["accuracy"])[:2]
    pairs = [(row["system"], row["question"]) for row in best]
    for number, wording in enumerate(pairs):
        found += trained(options.folder / f"wording-{number}", wording, options.rates[-1], ["LoRA"], options.seeds)

    def mean(**of: object) -> float:
        return statistics.mean(row["accuracy"] for row in found if of.items() <= row.items())

    wording = max(pairs, key=lambda pair: mean(arm="LoRA", system=pair[0], question=pair[1]))
    for rate in options.rates:
        arms = ["CE-LoRA"] if rate == options.rates[-1] else list(ARMS)
        found += trained(options.folder / f"rate-{rate}", wording, rate, arms, options.seeds)
    for row in found:
        Console().print_json(json.dumps(row))
    rows.write(rows.RESULTS / "demo-choices.jsonl", [row | rows.conditions() for row in found])


if __name__ == "__main__":
    main()
