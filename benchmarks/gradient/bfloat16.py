"""How large the error of bfloat16 in the LoRA gradient is, with PEFT and with celora, and which rounding causes it.

Every gradient is compared with the float32 gradient of the same weights (`celora.planning.upcast`). There are three
models: SmolLM2 (135M, 30 layers, text of `fidelity.py`), and two random Llamas, `planted`, with the activations of
large models. These have outlier features in every token, and a first token with one massive coordinate that attracts
the attention (`sharp`: nearly all of it). The base is in bfloat16, the adapters in float32 after a few exact steps.
Three studies, each with several seeds and batches:

* `gradient`: plain PEFT, `exact`, and parts of `exact` one at a time. PEFT and `exact` are also measured on `neighbour`
  models, whose base weights are one unit in the last place away. Neighbours have nearly the same true gradient, but
  round every number differently. So differences of an arm's error among neighbours are chance.
* `rounding`: the float32 model, where one kind of operation is rounded to bfloat16: its results in the forward, or the
  gradients of its inputs in the backward.
* `training`: held-out loss (in float32) and distance of the adapter from its start, of PEFT in bfloat16, of `exact` in
  bfloat16, and of PEFT in float32, on the same batches.

`python -m benchmarks.gradient.bfloat16 [STUDY ...]` writes `bfloat16.jsonl` row by row. An interrupted study can be
continued.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.utils import logging

import celora
from benchmarks import rows
from benchmarks.gradient import fidelity
from benchmarks.gradient.bfloat16_models import MODELS, Batch, smollm2
from benchmarks.gradient.bfloat16_rounding import BLOCKS, DIRECTIONS, OPERATIONS, Rounding
from celora import CELoraConfig
from celora.modeling.passes import gate as gate_module
from celora.modeling.passes import known as passes
from celora.modeling.passes import norm as norm_module
from celora.modeling.passes import rotation as rotation_module
from celora.modeling.survey import Survey, survey
from celora.planning.fidelity import Fidelity
from celora.planning.gradients import gradient, trainable
from celora.planning.upcast import in_float32

RESULTS = Path(__file__).with_name("bfloat16.jsonl")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP = 8
Gradient = dict[str, Tensor]


def prepared(name: str, seed: int) -> tuple[PeftModel, list[Batch]]:
    """The model after the exact warm-up steps, and the batches that follow."""
    model_of = MODELS[name]
    batches = model_of.batches(seed)
    base = model_of.base(seed)
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR)).train()
    fidelity.exact_steps(model, batches[:WARM_UP], rate=model_of.rate)
    return model, batches[WARM_UP : WARM_UP + model_of.batches_judged]


def without_fusing(model: PeftModel) -> Survey:
    """The survey of a model, with every adapter marked as not fusible."""
    found = survey(model)
    apart = {
        name: dataclasses.replace(layer, cannot_fuse="this arm leaves it out") for name, layer in found.layers.items()
    }
    return dataclasses.replace(found, layers=apart)


@contextmanager
def attached(model: PeftModel, config: str | CELoraConfig, *parts: str) -> Iterator[None]:
    """celora with only these parts of the setting `fused`: "adapters", and passes by name."""
    known = passes.known
    with ExitStack() as stack:
        if parts:
            chosen = lambda root: {m: kind for m, kind in known(root).items() if kind.name in parts}  # noqa: E731
            stack.enter_context(mock.patch.object(passes, "known", chosen))
            if "adapters" not in parts:
                stack.enter_context(mock.patch("celora.attaching.survey", without_fusing))
        celora.attach(model, config)
    try:
        yield
    finally:
        celora.detach(model)


FUSED = CELoraConfig(estimator="dense", fused=True)
WHOLE = CELoraConfig(estimator="dense", labelled_head=True, padding_free=True, zero_tokens=True)
ARMS: dict[str, Callable[[PeftModel], Any]] = {
    "PEFT": lambda _: nullcontext(),
    "exact": lambda model: attached(model, "exact"),
    "adapters": lambda model: attached(model, FUSED, "adapters"),
    "norms": lambda model: attached(model, FUSED, norm_module.Norm.name),
    "gates": lambda model: attached(model, FUSED, gate_module.Gate.name),
    "rotations": lambda model: attached(model, FUSED, rotation_module.Rotation.name),
    "head, padding, zero tokens": lambda model: attached(model, WHOLE),
}


@contextmanager
def neighbour(model: PeftModel, number: int) -> Iterator[None]:
    """For a while, a neighbouring model: every base weight moves one unit in its last place up or down, at random.

    Number 0 is the model itself. A neighbour computes nearly the same, but rounds every number anew.
    """
    draw = torch.Generator().manual_seed(number)
    kept = [(p, p.data) for p in model.parameters() if p.dtype == torch.bfloat16 and p.dim() == 2] if number else []
    for p, data in kept:
        sign = torch.randint(0, 2, data.shape, generator=draw, dtype=torch.int16) * 2 - 1
        p.data = (data.view(torch.int16) + sign * (data != 0)).view(torch.bfloat16)
    try:
        yield
    finally:
        for p, data in kept:
            p.data = data


def gradient_of(model: PeftModel, batch: Batch) -> tuple[Gradient, float]:
    found = gradient(model, [batch], None, trainable(model))
    model.zero_grad()
    return found


@contextmanager
def watched(model: PeftModel) -> Iterator[dict[str, Tensor]]:
    """The gradient of the hidden states after each block of the backward inside, by the block's name: (T, hidden)."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: seen.update({name: grad.detach().float().flatten(0, 1)}))

        return hook

    blocks = {name: m for name, m in model.named_modules() if type(m).__name__.endswith("DecoderLayer")}
    handles = [block.register_forward_hook(keep(name)) for name, block in blocks.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def heaviest_token(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, Any]:
    """The largest share of a block's squared error that one token has, in the gradients of the hidden states."""
    shares = {name: (found[name] - true[name]).square().sum(1) for name in true}
    shares = {name: share / share.sum() for name, share in shares.items()}
    name = max(shares, key=lambda name: float(shares[name].max()))
    return {
        "token_share": round(float(shares[name].max()), 5),
        "token": int(shares[name].argmax()),
        "block": int(name.rpartition(".")[2]),
    }


def judged(found: Gradient, true: Gradient) -> dict[str, float]:
    measured = Fidelity.of([(found[name], true[name]) for name in true])
    return {name: round(value, 5) for name, value in dataclasses.asdict(measured).items()}


def each_batch(study: str, seeds: list[int], models: list[str]) -> Iterator[tuple[dict[str, Any], PeftModel, Batch]]:
    """Every batch without rows so far, with its model."""
    for seed in seeds:
        for name in models:
            done = {
                r["batch"] for r in rows.found(RESULTS) if (r["study"], r["model"], r["seed"]) == (study, name, seed)
            }
            if done >= set(range(MODELS[name].batches_judged)):
                continue
            model, batches = prepared(name, seed)
            for i, batch in enumerate(batches):
                if i not in done:
                    yield {"study": study, "model": name, "seed": seed, "batch": i}, model, batch


def gradient_study(seeds: list[int], models: list[str]) -> None:
    for key, model, batch in each_batch("gradient", seeds, models):
        found = []
        for number in range(1 + MODELS[key["model"]].neighbours):
            with neighbour(model, number):
                with in_float32(model), watched(model) as states:
                    true, value = gradient_of(model, batch)
                norm = math.sqrt(sum(float(g.double().square().sum()) for g in true.values()))
                place = key | {"neighbour": number}
                found.append(place | {"arm": "float32", "norm": round(norm, 5), "loss": round(value, 5)})
                for arm, context in ARMS.items():
                    if number == 0 or arm in ("PEFT", "exact"):
                        with context(model), watched(model) if arm == "PEFT" else nullcontext() as own:
                            g, value = gradient_of(model, batch)
                        found.append(place | {"arm": arm, "loss": round(value, 5)} | judged(g, true))
                        if arm == "PEFT":
                            found[-1] |= heaviest_token(own, states)
        save(found)


def rounding_study(seeds: list[int], models: list[str]) -> None:
    wanted = [("everything", direction) for direction in DIRECTIONS]
    wanted += [("first three blocks", "forward"), ("other blocks", "forward")]
    wanted += [(operation, direction) for operation in OPERATIONS for direction in ("forward", "backward")]
    for key, model, batch in each_batch("rounding", seeds, models):
        found = [key | {"arm": "PEFT", "direction": "both"}]
        peft, _ = gradient_of(model, batch)
        with in_float32(model):
            true, _ = gradient_of(model, batch)
            found[0] |= judged(peft, true)
            for operation, direction in wanted:
                kinds = (operation,) if operation in OPERATIONS else tuple(OPERATIONS)
                with Rounding(model, kinds, direction, BLOCKS.get(operation, range(1000))):
                    g, _ = gradient_of(model, batch)
                found.append(key | {"arm": operation, "direction": direction} | judged(g, true))
        save(found)


def save(found: list[dict[str, Any]]) -> None:
    """The rows of one batch, together."""
    for row in found:
        rows.append(RESULTS, row | rows.conditions())
    shown = {f"{r['arm']} {r.get('direction', r.get('neighbour', ''))}": r["cosine"] for r in found if "cosine" in r}
    print({key: found[0][key] for key in ("study", "model", "seed", "batch")}, shown, flush=True)


STEPS, RATE, TRAINED_ON, HELD_OUT = 60, 5e-4, 128, 6  # tokens of a step; held-out batches


def training_study(seeds: list[int], models: list[str]) -> None:
    """Train the same adapter on the same batches in three ways; always on SmolLM2."""
    done = {row["seed"] for row in rows.found(RESULTS) if row["study"] == "training"}
    fidelity.BATCH, fidelity.TOKENS = 1, TRAINED_ON
    everything = fidelity.text_batches(0)
    held_out, rest = everything[:HELD_OUT], everything[HELD_OUT:]
    for seed in [seed for seed in seeds if seed not in done]:
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:STEPS].tolist()
        found, ways = [], {}
        for arm in ("float32", "PEFT", "exact"):  # the others are compared with the first
            torch.manual_seed(seed)
            model = get_peft_model(smollm2(seed), LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR)).train()
            first = {name: p.detach().clone() for name, p in trainable(model).items()}
            before = judge(model, held_out)
            with in_float32(model) if arm == "float32" else ARMS[arm](model):
                optimize(model, [rest[i] for i in order])
            ways[arm] = {name: p.detach() - first[name] for name, p in trainable(model).items()}
            row = {"study": "training", "model": "SmolLM2-135M", "seed": seed, "batch": 0, "arm": arm, "steps": STEPS}
            row |= {"before": before, "after": judge(model, held_out)} | judged(ways[arm], ways["float32"])
            print(row, flush=True)
            found.append(row)
        save(found)


def optimize(model: PeftModel, batches: list[Batch]) -> None:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def judge(model: PeftModel, batches: list[Batch]) -> float:
    """The mean loss of these batches, in float32 whatever the model trains in."""
    model.eval()
    with in_float32(model):
        loss = statistics.fmean(float(model(**batch).loss) for batch in batches)
    model.train()
    return round(loss, 5)


STUDIES = {"gradient": gradient_study, "rounding": rounding_study, "training": training_study}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    logging.disable_progress_bar()
    for study in options.studies:
        STUDIES[study](options.seeds, options.models)


if __name__ == "__main__":
    main()
