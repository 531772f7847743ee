"""How estimates change training: held-out loss against exact LoRA, at equal steps and at equal wall-clock.

SmolLM2-135M-Instruct, bf16, LoRA r=16 on all linear layers, AdamW, 4 x 128 tokens of technical English (the Python
language reference), 200 steps, three seeds; the held-out loss is measured every 40 steps on text that is never trained
on. Arms: exact LoRA, the same on the upper half of the layers only, the same with three quarters of the batch, the
paper's preset, single estimators, and presets on a base in 8 bits.

`python -m benchmarks.learning.training run` trains run by run into `training.jsonl`, and can be interrupted. With
`--text code` it trains on the source of the standard library, which is long enough for thousands of steps (`--steps`),
into `training-code.jsonl`, and clips gradients as Trainer does: two steps that were too large spoilt a run. `python -m
benchmarks.learning.training time` measures the whole step of each arm in turns, on an otherwise idle machine, into
`training-time.jsonl`. Equal wall-clock compares each arm's last loss with the one that exact LoRA has at the same time,
interpolated between its measured losses.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import celora
from benchmarks import rows
from benchmarks.learning import text as texts
from celora import CELoraConfig
from celora.machine.allocator import keep_freed_memory
from celora.machine.timing import interleaved
from celora.runtime.attachment import find
from celora.settings.presets import PRESETS
from celora.studies.assets import demo_model

STEPS, EVALUATE_EVERY, BATCH, HELD_OUT = 200, 40, 4, 8
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RESULTS, TIMES = Path(__file__).with_name("training.jsonl"), Path(__file__).with_name("training-time.jsonl")
CODE = Path(__file__).with_name("training-code.jsonl")
CLIP = 1.0  # Trainer's `max_grad_norm`
TEXTS: dict[str, tuple[Callable[[], str], Path, float | None]] = {
    "reference": (texts.language_reference, RESULTS, None),
    "code": (texts.standard_library, CODE, CLIP),
}
Batch = dict[str, Tensor]


def energy(share: float, precision: str) -> CELoraConfig:
    return CELoraConfig(
        estimator="tokens", keep_ratio=share, rank=0, selection="energy", precision=precision, spread=True
    )


CONFIGS: dict[str, Any] = {
    "exact LoRA": None,
    "exact, upper half": None,
    "exact, 3/4 batch": None,
    "preset exact": "exact",  # what auto has beside its estimates: how much of auto's lead is that?
    "paper": "paper",
    "int8": CELoraConfig(estimator="int8", spread=True),
    "int8 x tokens 0.999": energy(0.999, "int8"),
    "int8 x tokens 0.99": energy(0.99, "int8"),
    "Double-LoRA 0.5": CELoraConfig(keep_ratio=0.5, rank=14, refresh_every=20),
    "fast": PRESETS["fast"],  # in every layer, whatever is faster here; held-out losses are on the untouched base
    "exact, base int8": "exact",  # what a base in 8 bits costs by itself
    "fast, base int8": PRESETS["fast"],
    "auto": "auto",  # by its rule, as a run begins
}


def make_model(arm: str, seed: int, dtype: str = "bfloat16") -> PeftModel:
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=getattr(torch, dtype))
    half = base.config.num_hidden_layers // 2
    upper = list(range(half, 2 * half)) if arm == "exact, upper half" else None
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, layers_to_transform=upper))
    if upper is None:
        model.enable_input_require_grads()
    if arm.endswith("base int8"):
        celora.quantise_base(model)
    model.train()
    return model


def attach(model: PeftModel, arm: str, batches: list[Batch]) -> celora.AttachReport | None:
    config = CONFIGS[arm]
    return None if config is None else celora.attach(model, config)


def batches_of(seed: int, text: str = "reference") -> tuple[list[Batch], list[Batch]]:
    """Training batches in the seed's order, and the same held-out ones for every seed."""
    everything = texts.text_batches(TEXTS[text][0], BATCH)
    held_out, rest = everything[:HELD_OUT], everything[HELD_OUT:]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rest[i] for i in order], held_out


@torch.no_grad()
def loss_on(model: PeftModel, batches: list[Batch]) -> float:
    model.eval()
    with celora.original_base(model):
        losses = [float(model(**batch).loss) for batch in batches]
    model.train()
    return statistics.fmean(losses)


def optimize(
    model: PeftModel,
    training: list[Batch],
    held_out: list[Batch],
    *,
    steps: int,
    evaluate_every: int = EVALUATE_EVERY,
    rate: float = 5e-4,
    clip: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[int, float]:
    """Train. Returns the held-out loss at step 0, and at every 40th step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    losses = {0: loss_on(model, held_out)}
    begun = time.perf_counter()
    for step in range(steps):
        model(**training[step % len(training)]).loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % evaluate_every == 0:
            losses[step + 1] = loss_on(model, held_out)
            say(f"step {step + 1}: {losses[step + 1]:.4f}  {time.perf_counter() - begun:.0f} s")
    return losses


def train(
    arm: str,
    seed: int,
    say: Callable[[str], None],
    *,
    text: str = "reference",
    steps: int = STEPS,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    training, held_out = batches_of(seed, text)
    model = make_model(arm, seed, dtype)
    report = attach(model, arm, training)
    if arm == "exact, 3/4 batch":
        training = [{key: value[: 3 * BATCH // 4] for key, value in batch.items()} for batch in training]
    clip = TEXTS[text][2]
    losses = optimize(
        model, training, held_out, steps=steps, clip=clip, say=lambda text: say(f"{arm}, seed {seed}, {text}")
    )
    return {
        "arm": arm,
        "seed": seed,
        "losses": {str(step): round(loss, 5) for step, loss in losses.items()},
        "cost": round(report.cost, 4) if report else 1.0,
        "dtype": dtype,
        "clip": clip,
    } | rows.conditions(arm)


def run(arms: list[str], seeds: list[int], *, text: str, steps: int, dtype: str) -> None:
    results = TEXTS[text][1]
    results.parent.mkdir(parents=True, exist_ok=True)
    found = rows.found(results)
    done = {(row["arm"], row["seed"], row.get("dtype", "bfloat16"), max(map(int, row["losses"]))) for row in found}
    for seed in seeds:
        for arm in arms:
            if (arm, seed, dtype, steps) not in done:
                row = train(arm, seed, functools.partial(print, flush=True), text=text, steps=steps, dtype=dtype)
                rows.append(results, row)


def time_steps(arms: list[str], repeats: int) -> None:
    """The whole optimizer step of every arm, taking turns. One model each: estimates must not share caches."""
    keep_freed_memory()
    training, _ = batches_of(0)
    contenders: dict[str, Callable[[], object]] = {}
    for arm in arms:
        model = make_model(arm, 0)
        attach(model, arm, training)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
        batch = training[0]
        if arm == "exact, 3/4 batch":
            batch = {key: value[: 3 * BATCH // 4] for key, value in batch.items()}
        contenders[arm] = functools.partial(_step, model, optimizer, batch)
        attached = find(model)
        for _ in range(12 if attached is None else attached.first_steps + 2):  # past the first observations
            contenders[arm]()
    times = interleaved(contenders, repeats=repeats)
    exact = times[arms[0]]["time_ms"]
    rows.write(
        TIMES,
        [
            {"arm": arm, **timed, "ratio": round(timed["time_ms"] / exact, 4)} | rows.conditions(arm)
            for arm, timed in times.items()
        ],
    )


def _step(model: PeftModel, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "time"])
    parser.add_argument("--arms", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--text", choices=list(TEXTS), default="reference")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"a multiple of {EVALUATE_EVERY}")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if options.steps % EVALUATE_EVERY or options.steps < 1:
        parser.error(f"--steps {options.steps}; expected a multiple of {EVALUATE_EVERY}, at which losses are measured.")
    if options.text == "reference" and (options.steps, options.dtype) != (STEPS, "bfloat16"):
        parser.error(f"the study on the reference has {STEPS} steps in bfloat16; others are for --text code.")
    logging.disable_progress_bar()
    if options.what == "run":
        run(options.arms, options.seeds, text=options.text, steps=options.steps, dtype=options.dtype)
    else:
        time_steps(options.arms, options.repeats)
        for row in rows.read(TIMES):
            Console().print(f"{row['arm']}: {row['time_ms']:.0f} ms, {row['ratio']:.3f} of exact LoRA")


if __name__ == "__main__":
    main()
