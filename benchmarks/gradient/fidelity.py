"""How much of the LoRA gradient each setting keeps: `celora.audit` on a real model and real text, several seeds.

SmolLM2-135M-Instruct in fp32, LoRA r=16 on all linear layers after 15 exact warm-up steps, 2 x 128 tokens of technical
English (the Python language reference, which every Python installation has). The text is consecutive, from a place that
the seed decides. Every audit uses the two batches after the training batches. A "fresh" selection is made from the
judged batch itself. A "stale" one is from an earlier training batch, like in training. The two are the same if the
estimator selects in every backward. Writes `fidelity.jsonl`.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import celora
from benchmarks import rows
from celora import CELoraConfig
from celora.runtime.attachment import require
from celora.studies.assets import demo_model

BATCH, TOKENS, WARM_UP = 2, 128, 15
SETTINGS = {
    "columns 0.5, no factor": CELoraConfig(keep_ratio=0.5, rank=0),
    "columns 0.5, rank 14 (Double-LoRA)": CELoraConfig(keep_ratio=0.5, rank=14),
    "columns 0.25, rank 14 (Double-LoRA)": CELoraConfig(keep_ratio=0.25, rank=14),
    "paper": "paper",
    "columns 0.5, sampled": CELoraConfig(keep_ratio=0.5, rank=0, selection="sampled"),
    "columns 0.4, gradient factor, rank 32": CELoraConfig(keep_ratio=0.4, rank=32, factor="gradient"),
    "tokens 0.25": CELoraConfig(estimator="tokens", keep_ratio=0.25, rank=0),
    "tokens 0.5": CELoraConfig(estimator="tokens", keep_ratio=0.5, rank=0),
    "tokens 0.7": CELoraConfig(estimator="tokens", keep_ratio=0.7, rank=0),
    "tokens 0.5, gradient factor, rank 8": CELoraConfig(estimator="tokens", keep_ratio=0.5, rank=8, factor="gradient"),
    "tokens 0.5, sampled": CELoraConfig(estimator="tokens", keep_ratio=0.5, rank=0, selection="sampled"),
    "tokens, energy 0.99": CELoraConfig(estimator="tokens", keep_ratio=0.99, rank=0, selection="energy"),
    "tokens, energy 0.999": CELoraConfig(estimator="tokens", keep_ratio=0.999, rank=0, selection="energy"),
    "int8": CELoraConfig(estimator="int8"),
    "int8 x tokens 0.5": CELoraConfig(estimator="tokens", keep_ratio=0.5, rank=0, precision="int8"),
    "int8 x tokens, energy 0.99": CELoraConfig(
        estimator="tokens", keep_ratio=0.99, rank=0, selection="energy", precision="int8"
    ),
}


def language_reference() -> str:
    """The Python language reference, which every installation has: 108,000 tokens of technical English."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def standard_library() -> str:
    """The source of the standard library's own modules, without its packages: above a million tokens of code."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


def text_batches(
    seed: int, *, consecutive: bool = False, text: Callable[[], str] = language_reference
) -> list[dict[str, torch.Tensor]]:
    """Disjoint batches of a text: shuffled by the seed, or in text order from the third that the seed names."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    ids = torch.tensor(tokenizer(text(), verbose=False)["input_ids"])
    chunks = ids[: ids.numel() // (BATCH * TOKENS) * BATCH * TOKENS].view(-1, BATCH, TOKENS)
    if consecutive:
        order = torch.arange(len(chunks)).roll(-(seed % 3) * len(chunks) // 3)
    else:
        order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": chunks[i], "labels": chunks[i].clone()} for i in order.tolist()]


def warmed_up(seed: int, batches: list[dict[str, torch.Tensor]]) -> PeftModel:
    """The model after an exact step on each of these batches."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    model.enable_input_require_grads()
    exact_steps(model, batches, rate=1e-3)
    return model


def exact_steps(model: PeftModel, batches: list[dict[str, torch.Tensor]], *, rate: float) -> torch.optim.AdamW:
    """Train on each of these batches once. Returns the optimizer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def study(seed: int) -> list[dict[str, object]]:
    batches = text_batches(seed, consecutive=True)
    model = warmed_up(seed, batches[:WARM_UP])
    found = []
    for name, config in SETTINGS.items():
        report = celora.attach(model, config)
        for selection in ("fresh", "stale"):
            if selection == "stale":
                model(**batches[WARM_UP - 1]).loss.backward()
                model.zero_grad()
                require(model).clock.advance()
            audits = [celora.audit(model, batch) for batch in batches[WARM_UP : WARM_UP + 2]]
            found.append(
                {
                    "setting": name,
                    "selection": selection,
                    "seed": seed,
                    "cost": round(report.cost, 4),
                    "cosine": round(statistics.mean(a.cosine for a in audits), 4),
                    "relative_error": round(statistics.mean(a.relative_error for a in audits), 4),
                    "norm_ratio": round(statistics.mean(a.norm_ratio for a in audits), 4),
                }
                | rows.conditions()
            )
        celora.detach(model)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    logging.disable_progress_bar()
    found = [row for seed in range(options.seeds) for row in study(seed)]
    table = Table(title="LoRA gradient, estimated against exact")
    for column in ("setting", "selection", "FLOPs", "cosine", "relative error"):
        table.add_column(column)
    for name in SETTINGS:
        for selection in ("fresh", "stale"):
            matching = [row for row in found if (row["setting"], row["selection"]) == (name, selection)]
            mean = [
                f"{statistics.mean(row[key] for row in matching):.2f}" for key in ("cost", "cosine", "relative_error")
            ]
            table.add_row(name, selection, *mean)
    Console().print(table)
    rows.write(Path(__file__).with_name("fidelity.jsonl"), found)


if __name__ == "__main__":
    main()
