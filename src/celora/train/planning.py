"""What preset auto trains with: a plan that is made or given before the first step, or `exact` if the run is short."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

from rich.console import Console

import celora
from celora.errors import CELoraError
from celora.machine.device import random_states
from celora.machine.processes import from_first
from celora.modeling.survey import survey
from celora.planning.fastest import gate
from celora.planning.plan import Plan
from celora.planning.planner import DEFAULT_FIDELITY, MOST_BATCHES
from celora.settings.config import CELoraConfig
from celora.settings.names import HEAD
from celora.train.output.folder import CONFIG, PLAN
from celora.train.processes import is_first, processes
from celora.train.progress import PlanProgress, say
from celora.train.request.arguments import PLANNING, TrainRequest

# Making a plan takes 20 to 130 forward and backward passes. It then saves 10 to 30 % of a pass over `exact`
# (docs/measured/speed.md). A middling plan has earned back its making after about this many passes.
FEWEST_PASSES = 400


def passes(trainer: Any) -> int:
    """Forward and backward passes of the run that `trainer` is set up for, in each process."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps * args.gradient_accumulation_steps)
    batches = math.ceil(len(trainer.train_dataset) / (args.train_batch_size * processes()))
    count: float = args.num_train_epochs * batches
    return math.ceil(count)


def choose(request: TrainRequest, trainer: Any, console: Console, *, begun: bool) -> tuple[CELoraConfig, Plan | None]:
    """What to attach: the preset asked for or, with preset auto, a plan. A resumed run keeps what it began with.

    A run of fewer than `FEWEST_PASSES` passes is `exact`, unless `fidelity`, `plan` or `memory_limit` ask for a plan.
    """
    options = request.options
    if request.preset not in ("auto", "fast"):
        return request.config, None
    if begun and (request.output / PLAN).is_file():
        plan = Plan.load(request.output / PLAN)
        plan.check_layers(survey(trainer.model))
        if reason := plan.elsewhere(next(trainer.model.parameters()).device):
            say(console, False, f"Note: {reason}. The run goes on with it, but what it estimates may not pay here.")
        say(console, options.quiet, str(plan))
        return plan.config(request.config), plan
    if begun and (request.output / CONFIG).is_file():
        return CELoraConfig.load(request.output / CONFIG), None
    if request.preset == "fast":
        return gate(survey(trainer.model), request.config), None
    asked = any(getattr(options, name) is not None for name in PLANNING)
    if not asked and (count := passes(trainer)) < FEWEST_PASSES:
        say(
            console,
            options.quiet,
            f"Preset exact: too short for a plan to pay, {count:,} forward and backward passes (a plan takes 20 to "
            f"130, and pays from about {FEWEST_PASSES}). --fidelity {DEFAULT_FIDELITY} makes one anyway.",
        )
        own = options.celora or {}
        return replace(request.config, zero_tokens=own.get("zero_tokens", True)), None
    return planned(request, trainer, console)


def planned(request: TrainRequest, trainer: Any, console: Console) -> tuple[CELoraConfig, Plan]:
    """The plan that was given, or a new one, and the configuration that carries it out."""
    if request.options.plan is not None:
        plan = Plan.load(request.options.plan)
        plan.check(trainer.model)
    else:
        plan = make_plan(request, trainer, console)
    say(console, request.options.quiet, str(plan))
    return plan.config(request.config), plan


def make_plan(request: TrainRequest, trainer: Any, console: Console) -> Plan:
    """Plan on the first batches of the training data. Training then sees the same rows in the same order."""
    limit, options = request.options.memory_limit, request.options
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise CELoraError(
            "preset 'auto' cannot measure a model that will be sharded; make a plan on one device with celora plan and "
            "give it with --plan, or choose --preset exact or paper"
        )
    with random_states({parameter.device for parameter in trainer.model.parameters()}):
        batches = list(
            itertools.islice(trainer.get_train_dataloader(), MOST_BATCHES)
        )  # in all processes, at the same time
        if not is_first():
            return Plan.from_dict(from_first(None))
        with PlanProgress(console, quiet=options.quiet) as progress:
            plan = celora.make_plan(
                trainer.model,
                batches,
                DEFAULT_FIDELITY if options.fidelity is None else options.fidelity,
                memory_limit=None if limit is None else int(limit * 2**20),
                progress=progress,
            )
    from_first(plan.to_dict())
    return plan


def planned_errors(plan: Plan | None, estimated: Any) -> dict[str, float]:
    """The relative errors in the plan: of the layers in `estimated` and of the vocabulary projection."""
    layers = () if plan is None else (*plan.layers, *(() if plan.head is None else (plan.head,)))
    return {
        layer.name: layer.choice.relative_error
        for layer in layers
        if layer.choice.setting.estimator != "dense" and (layer.name in estimated or layer.name == HEAD)
    }
