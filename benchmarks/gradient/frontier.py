"""How much of the LoRA gradient a given share of `grad_input` time buys: plans at many fidelities.

There are three models:

* SmolLM2-135M-Instruct after eight exact steps on the Python language reference;
* random weights of hidden size 2048, the shape of the benchmark of whole steps, after fifteen steps on the same text;
* random weights on random tokens. Nothing can be learnt from such labels, so all tokens have about the same norm, and
  none can be left out cheaply.

All tokens are labelled, or 70 % have no label, like prompts. T = 1024 tokens, bf16 (`--dtype float32` for CPUs that
emulate it), LoRA r=16 on all linear layers. The cosine is audited on the sum of eight batches that planning did not use
otherwise. Time is measured inside whole backwards. Both are relative to the exact backward in the same dtype. Writes
`frontier.jsonl`; `python -m benchmarks.tables` makes the tables and the pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks import rows
from benchmarks.gradient import fidelity
from celora.machine.allocator import keep_freed_memory
from celora.planning.planner import MOST_BATCHES, make_plans
from celora.studies.assets import demo_model
from celora.studies.cells import Cell, shape_config

FIDELITIES = [0.9, 0.95, 0.98, 0.99, 0.998]
BATCH = 8
Batches = list[dict[str, torch.Tensor]]


def smollm(dtype: torch.dtype) -> tuple[PeftModel, Batches]:
    batches = _text()
    torch.manual_seed(0)
    model = _adapted(AutoModelForCausalLM.from_pretrained(demo_model(), dtype=dtype))
    return _warmed_up(model, batches, steps=8)


def hidden_2048(dtype: torch.dtype) -> tuple[PeftModel, Batches]:
    batches = _text()
    # Numbered anew: embeddings are random, so which word has which number does not matter.
    _, numbered = torch.unique(torch.stack([batch["input_ids"] for batch in batches]), return_inverse=True)
    batches = [{"input_ids": ids, "labels": ids.clone()} for ids in numbered]
    torch.manual_seed(0)
    model = _adapted(LlamaForCausalLM(shape_config(Cell("h2048-v32k", "full"))).to(dtype))
    return _warmed_up(model, batches, steps=fidelity.WARM_UP)


def random_tokens(dtype: torch.dtype) -> tuple[PeftModel, Batches]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=3, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, use_cache=False,
    )  # fmt: skip
    model = _adapted(LlamaForCausalLM(config).to(dtype))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)  # as after some training: at zero lora_A has no gradient
    generator = torch.Generator().manual_seed(0)
    shape = MOST_BATCHES, BATCH, fidelity.TOKENS
    return model, [{"input_ids": i, "labels": i.clone()} for i in torch.randint(0, 32000, shape, generator=generator)]


def _text() -> Batches:
    fidelity.BATCH = BATCH
    return fidelity.text_batches(0)


def _warmed_up(model: PeftModel, batches: Batches, *, steps: int) -> tuple[PeftModel, Batches]:
    """The model after some exact steps, and the batches after these steps."""
    fidelity.exact_steps(model, batches[:steps], rate=5e-4)
    return model, batches[steps : steps + MOST_BATCHES]


def _adapted(base: Any) -> PeftModel:
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    model.enable_input_require_grads()
    return model.train()


MODELS = {"SmolLM2-135M": smollm, "hidden 2048": hidden_2048, "hidden 2048, random tokens": random_tokens}


def study(name: str, dtype: torch.dtype, fidelities: list[float], memory_limit: int | None) -> list[dict[str, object]]:
    model, batches = MODELS[name](dtype)
    found = []
    for masked in (0.0, 0.7):
        used = [dict(batch, labels=batch["labels"].clone()) for batch in batches]
        for batch in used:
            batch["labels"][:, : round(masked * fidelity.TOKENS)] = -100
        begin = time.monotonic()
        plans = make_plans(model, used, fidelities, memory_limit=memory_limit, head=False)
        seconds = round(time.monotonic() - begin, 1)
        for plan in plans:
            found.append(
                {
                    "model": name,
                    "masked": masked,
                    **{f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name != "layers"},
                    "memory": plan.memory,
                    "seconds": seconds,  # planning took so long, for all fidelities together
                }
                | rows.conditions()
            )
            print(
                name, masked, plan.fidelity, plan.predicted_cosine, plan.audited_cosine, plan.audited_time, flush=True
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--fidelities", type=float, nargs="+", default=FIDELITIES)
    parser.add_argument("--memory-limit", type=int, default=10**12, help="bytes; by default 8-bit copies are free")
    options = parser.parse_args()
    logging.disable_progress_bar()
    keep_freed_memory()
    asked = getattr(torch, options.dtype), options.fidelities, options.memory_limit
    found = [row for name in options.models for row in study(name, *asked)]
    rows.replace(Path(__file__).with_name("frontier.jsonl"), found, ["model", "dtype"])
    Console().print(f"{len(found)} rows written")


if __name__ == "__main__":
    main()
