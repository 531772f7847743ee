"""The theorem's setting: momentum SGD on a smooth non-convex loss, where the whole gradient can be computed.

A network of tanh layers with LoRA on all of them learns the outputs of a teacher with other adapters, on 512 points,
from minibatches of 4. An L2 term keeps the loss smooth. For each number of steps T the learning rate is `c / sqrt(T)`.
The study measures the mean over steps of the squared norm of the *whole, exact* gradient, `1/T sum ||grad f(x_t)||^2`.
The theorem bounds it by O(1/sqrt(T)) for LoRA, and for CE-LoRA while the estimate's relative error stays below 1. The
slope is from log-log least squares over more than two decades of T, with the 95 % interval from the seeds.

The second study looks for the boundary: sampled columns with smaller and smaller keep ratios, until the relative error
is above 1. It runs once without celora's guard, which is the theorem's setting, and once with the guard, which makes
such layers exact.

Presets `auto` (its rule in every layer) and `fast` also train with Adam, for which the theorem says nothing. The
forward of `fast` is an estimate, too. Its gradient is measured on the untouched model all the same.

Writes `convergence.jsonl` run by run, so an interrupted study can be continued.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import statistics
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import Tensor, nn

import celora
from benchmarks import rows
from celora import CELoraConfig
from celora.modeling.switch import Mode
from celora.runtime import attachment
from celora.runtime.attachment import find, require
from celora.settings.presets import PRESETS, by_rule
from celora.studies.outcomes import Difference

STEPS = (64, 160, 400, 1000, 2500, 6300, 16000)  # 2.4 decades
SEEDS = range(5)
WIDTH, DEPTH, POINTS, BATCH, DECAY = 32, 3, 512, 4, 0.03
RATE, ADAM_RATE = 1.0, 0.1
RESULTS = Path(__file__).with_name("convergence.jsonl")
# The last layer has one output, so nothing to select from.
COLUMNS: dict[str, Any] = {
    "estimator": "columns", "refresh_every": 50, "overrides": {str(2 * DEPTH): {"estimator": "dense"}}
}  # fmt: skip
GUARDED, ADAM = ", guarded", ", Adam"
PRESET: dict[str, Any] = {"refresh_every": 50, "overrides": COLUMNS["overrides"]}
AUTO = by_rule(dataclasses.replace(PRESETS["auto"], **PRESET))
FAST = dataclasses.replace(PRESETS["fast"], **PRESET)
ARMS: dict[str, CELoraConfig | None] = {
    "LoRA": None,
    "CE-LoRA": CELoraConfig(keep_ratio=0.5, rank=4, **COLUMNS),
    "auto": AUTO,
    "fast": FAST,
    **{name + ADAM: config for name, config in {"LoRA": None, "auto": AUTO, "fast": FAST}.items()},
    **{
        f"sampled {keep:g}{guard}": CELoraConfig(keep_ratio=keep, rank=0, selection="sampled", **COLUMNS)
        for guard in ("", GUARDED)
        for keep in (0.75, 0.5, 0.25, 0.1, 0.05)
    },
}
RATED = tuple(arm for arm in ARMS if not arm.startswith("sampled"))  # those with a slope
BOUNDARY_STEPS = 2500


def problem(seed: int) -> tuple[PeftModel, Tensor, Tensor]:
    """A student, the points, and the teacher's outputs for them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    network = nn.Sequential(*layers, nn.Linear(WIDTH, 1))
    for p in network.parameters():
        if p.dim() == 2:
            nn.init.orthogonal_(p, gain=1.3)
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    x = torch.randn(POINTS, WIDTH)
    lora = {"r": 4, "lora_alpha": 4, "target_modules": names}
    teacher = get_peft_model(network, LoraConfig(init_lora_weights=False, **lora))
    with torch.no_grad():
        y = teacher(x) + 0.5 * torch.randn(POINTS, 1)  # noise, so that minibatches disagree to the end
    student = get_peft_model(teacher.unload(), LoraConfig(**lora))
    for name, p in student.named_parameters():
        if "lora_B" in name:  # zeros are a saddle, which says little about rates
            nn.init.normal_(p, std=0.3)
    return student.train(), x, y


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    weights = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
    return (model(x) - y).square().mean() + DECAY * weights


def run(arm: str, steps: int, seed: int) -> dict[str, Any]:
    as_it_is = contextlib.nullcontext()
    never_exact = patch.object(attachment, "TOO_OFTEN", math.inf)
    with as_it_is if arm.endswith(GUARDED) else never_exact:
        found = train(ARMS[arm], steps, seed, ADAM_RATE if arm.endswith(ADAM) else RATE, adam=arm.endswith(ADAM))
    return {"arm": arm, "steps": steps, "seed": seed} | found | rows.conditions(arm)


def train(
    config: CELoraConfig | None, steps: int, seed: int, rate: float = RATE, *, adam: bool = False
) -> dict[str, Any]:
    """The result of a run at the learning rate `rate / sqrt(steps)`; plain LoRA without a configuration."""
    model, x, y = problem(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config is not None:
        celora.attach(model, config)
    lr, kind = rate / steps**0.5, torch.optim.Adam if adam else partial(torch.optim.SGD, momentum=0.9, dampening=0.9)
    optimizer = kind(parameters, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    every = max(1, steps // 200)
    squared = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(steps):
            if step % every == 0:
                squared.append(whole_gradient(model, parameters, x, y))
            chosen = torch.randint(POINTS, (BATCH,), generator=generator)
            # With a gradient, or the first layer would have no grad_input to estimate.
            loss_of(model, x[chosen].requires_grad_(), y[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
    errors = require(model).relative_errors.values() if config is not None else []
    made_exact = len(require(model).made_exact) if config is not None else 0
    return {
        "mean_squared_gradient": statistics.fmean(squared),
        "last_squared_gradient": statistics.fmean(squared[-10:]),
        "relative_error": max(errors, default=0.0),
        "made_exact": made_exact,
        "monitor": any("relative error" in str(w.message) for w in said),
    }


def whole_gradient(model: nn.Module, parameters: list[nn.Parameter], x: Tensor, y: Tensor) -> float:
    """`||grad f||^2` over all points, exact. It changes nothing in model and estimators."""
    attachment = find(model)
    grafts = [] if attachment is None else list(attachment.grafts.values())
    modes = [graft.mode for graft in grafts]
    for graft in grafts:
        graft.mode = Mode.EXACT
    with contextlib.nullcontext() if attachment is None else attachment.switch.own_forwards():
        grads = torch.autograd.grad(loss_of(model, x, y), parameters)
    for graft, mode in zip(grafts, modes, strict=True):
        graft.mode = mode
    return float(sum(g.square().sum() for g in grads))


def slope(found: list[dict[str, Any]], arm: str) -> tuple[float, float]:
    """Least-squares slope of log mean squared gradient over log T: mean over seeds, half-width of its 95 % interval."""
    slopes = []
    for seed in sorted({row["seed"] for row in found}):
        matching = [row for row in found if row["arm"] == arm and row["seed"] == seed and row["steps"] in STEPS]
        if len(matching) < len(STEPS):
            continue
        t = torch.tensor([row["steps"] for row in matching], dtype=torch.float64).log()
        g = torch.tensor([row["mean_squared_gradient"] for row in matching], dtype=torch.float64).log()
        t = t - t.mean()
        slopes.append(float((t * g).sum() / t.square().sum()))
    if len(slopes) < 2:
        return (slopes[0] if slopes else float("nan")), float("nan")
    found_slope = Difference.of(slopes, [0.0] * len(slopes))
    assert found_slope.high is not None
    return found_slope.mean, found_slope.high - found_slope.mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="only these")
    chosen = parser.parse_args().arms
    torch.set_num_threads(1)  # matrices this small are slower on more
    done = {(r["arm"], r["steps"], r["seed"]) for r in rows.read(RESULTS)} if RESULTS.exists() else set()
    wanted = [(arm, steps, seed) for seed in SEEDS for arm in RATED for steps in STEPS]
    wanted += [(arm, BOUNDARY_STEPS, seed) for seed in SEEDS for arm in ARMS if arm.startswith("sampled")]
    for key in wanted:
        if key not in done and key[0] in chosen:
            row = run(*key)
            print({name: row[name] for name in ("arm", "steps", "seed", "mean_squared_gradient", "relative_error")})
            rows.append(RESULTS, row)
    found = rows.read(RESULTS)
    slopes = {arm: slope(found, arm) for arm in RATED}
    for arm, (mean, width) in slopes.items():
        steep = "" if mean - width <= -0.5 else ", less steep than 1/sqrt(T)"
        Console().print(f"{arm}: slope {mean:.3f} ± {width:.3f}{steep}")


if __name__ == "__main__":
    main()
