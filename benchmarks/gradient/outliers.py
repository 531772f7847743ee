"""What outlier features cost the LoRA gradient with forwards in 8 bits: `celora.audit` against exact forwards.

Everything is in float32. A random Llama (hidden 256, 12 blocks) and SmolLM2 are measured as they are and with planted
outliers: the random ones of `bfloat16_models.planted`, and SmolLM2 with four features after each norm that are 60 times
as large, with weights that are 60 times as small. That SmolLM2 computes what the other one computes. The adapter has
taken some exact steps. Scales of inputs are those that an audit learns from the judged batch.

Two settings: all layers in 8 bits both ways, and preset `fast`, which also drops tokens, draws words and computes
logits in 8 bits. Random models predict all words alike, so a tenth of the words tells little of their gradient there.

`python -m benchmarks.gradient.outliers` writes `outliers.jsonl` model by model.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.utils import logging

import celora
from benchmarks import rows
from benchmarks.gradient import bfloat16_models, fidelity
from benchmarks.learning.training import LINEAR
from celora import CELoraConfig
from celora.settings.presets import PRESETS

RESULTS = Path(__file__).with_name("outliers.jsonl")
WARM_UP, BATCHES = 8, 3
SETTINGS = {
    "8 bits both ways": CELoraConfig(estimator="int8", forward="int8"),
    "fast, all words": dataclasses.replace(PRESETS["fast"], head_keep_ratio=1.0),
    "fast": PRESETS["fast"],
}


@torch.no_grad()
def planted_smollm2(seed: int, size: float = 60.0) -> nn.Module:
    """SmolLM2 with four large features after each norm. The products that read them give what they gave."""
    model: Any = bfloat16_models.smollm2(seed).float()  # bfloat16 would round the divided weights
    draw = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            features = torch.randperm(len(norm.weight), generator=draw)[:4]
            norm.weight[features] *= size
            for reader in readers:
                reader.weight[:, features] /= size
    return model


_SMOLLM2, _PLANTED = bfloat16_models.MODELS["SmolLM2-135M"], bfloat16_models.MODELS["planted"]
MODELS = {
    "random": dataclasses.replace(
        _PLANTED, base=partial(bfloat16_models.planted, hidden=256, layers=12, gain=1.5, sink=0, outliers=False)
    ),
    "random, planted": _PLANTED,
    "random, planted, sharp": bfloat16_models.MODELS["planted, sharp"],
    "SmolLM2-135M": _SMOLLM2,
    "SmolLM2-135M, planted": dataclasses.replace(_SMOLLM2, base=planted_smollm2),
}


def study(name: str, seed: int) -> list[dict[str, Any]]:
    """Audit the batches after the exact steps, under each setting."""
    kind = MODELS[name]
    batches, base = kind.batches(seed), kind.base(seed).float()
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR)).train()
    fidelity.exact_steps(model, batches[:WARM_UP], rate=kind.rate)
    found = []
    for setting, config in SETTINGS.items():
        celora.attach(model, config)
        for i, batch in enumerate(batches[WARM_UP : WARM_UP + BATCHES]):
            report = celora.audit(model, batch)
            row = {"model": name, "setting": setting, "seed": seed, "batch": i, "cosine": round(report.cosine, 5)}
            row |= {"relative_error": round(report.relative_error, 5), "loss_shift": round(report.loss_shift, 5)}
            found.append(row | rows.conditions())
            print(row, flush=True)
        celora.detach(model)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # sums have one order
    for name in options.models:
        for seed in range(options.seeds):
            rows.replace(RESULTS, study(name, seed), ("model", "setting", "seed", "batch"))


if __name__ == "__main__":
    main()
