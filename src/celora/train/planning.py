"""Settles what presets `auto` and `fast` train with: a rule and a moment of timing, or a plan if one is asked for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

import celora
from celora.errors import CELoraError
from celora.machine.device import random_states
from celora.machine.processes import made_by_first
from celora.modeling.recognise import IGNORED
from celora.modeling.survey import survey
from celora.planning.fastest import gate
from celora.planning.plan import Plan
from celora.planning.planner import DEFAULT_FIDELITY, MOST_BATCHES
from celora.settings.config import CELoraConfig
from celora.settings.names import HEAD
from celora.settings.presets import ruled
from celora.train.output.folder import CONFIG, PLAN
from celora.train.progress import PlanProgress, say
from celora.train.request.arguments import PLANNING, TrainRequest


@dataclass(frozen=True)
class Chosen:
    """The configuration to attach, the plan that it carries out, if there is one, and the timings of the gate."""

    config: CELoraConfig
    plan: Plan | None = None
    timings: tuple[dict[str, Any], ...] = ()


def choose(request: TrainRequest, trainer: Any, console: Console, *, begun: bool) -> Chosen:
    """The configuration to attach, and what it was chosen by.

    Preset `auto` plans if the user gave `fidelity`, `plan` or `memory_limit`. `begun`: the run is resumed, and keeps
    the configuration that it began with.
    """
    options = request.options
    if request.preset not in ("auto", "fast"):
        return Chosen(request.config)
    if begun and (request.output / PLAN).is_file():
        plan = Plan.load(request.output / PLAN)
        found = survey(trainer.model)
        plan.check_layers(found)
        if reason := plan.elsewhere(found.device):
            say(console, False, f"Note: {reason}. The run goes on with its plan, but the estimates may not pay here.")
        say(console, options.quiet, str(plan))
        return Chosen(plan.config(request.config, request.options.celora or ()), plan)
    if begun and (request.output / CONFIG).is_file():
        return Chosen(CELoraConfig.load(request.output / CONFIG))
    return settled(request, trainer, console)


def settled(request: TrainRequest, trainer: Any, console: Console) -> Chosen:
    """What `choose` returns for a new run."""
    given = request.options.celora or {}
    if any(getattr(request.options, name) is not None for name in PLANNING):
        return planned(request, trainer, console)
    config = ruled(request.preset, request.config, given)
    gated = gate(survey(trainer.model), config, *batch_size(trainer), given=given)
    return Chosen(gated.config, timings=gated.timings)


def batch_size(trainer: Any) -> tuple[int, int]:
    """How many tokens the first batch has, and how many of them have a label. All processes call this together."""
    with random_states({parameter.device for parameter in trainer.model.parameters()}):
        batch = next(iter(trainer.get_train_dataloader()))
    return tokens_of(batch), int((batch["labels"] != IGNORED).sum())


def tokens_of(batch: Mapping[str, Any]) -> int:
    """How many tokens a batch has, without padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None or mask.dim() != 2 else mask.sum())


def planned(request: TrainRequest, trainer: Any, console: Console) -> Chosen:
    """The plan that the user gave, or a new one; and the configuration that carries it out."""
    if request.options.plan is not None:
        plan = Plan.load(request.options.plan)
        plan.check(trainer.model)
    else:
        plan = make_plan(request, trainer, console)
    say(console, request.options.quiet, str(plan))
    return Chosen(plan.config(request.config, request.options.celora or ()), plan)


def make_plan(request: TrainRequest, trainer: Any, console: Console, *, forward: bool = False) -> Plan:
    """Plan on the first batches of the training data. Random states are put back, so training sees the same rows."""
    limit, options = request.options.memory_limit, request.options
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise CELoraError(
            "preset 'auto' cannot measure a model that will be sharded; make a plan on one device with celora plan and "
            "give it with --plan, or choose --preset exact or paper"
        )
    with random_states({parameter.device for parameter in trainer.model.parameters()}):
        batches = list(itertools.islice(trainer.get_train_dataloader(), MOST_BATCHES))  # collective

        def measured() -> dict[str, Any]:
            with PlanProgress(console, quiet=options.quiet) as progress:
                plan = celora.make_plan(
                    trainer.model,
                    batches,
                    DEFAULT_FIDELITY if options.fidelity is None else options.fidelity,
                    forward=forward,
                    memory_limit=None if limit is None else int(limit * 2**20),
                    progress=progress,
                )
            return plan.to_dict()

        return Plan.from_dict(made_by_first(measured))


def planned_errors(plan: Plan | None, estimated: Any) -> dict[str, float]:
    """The plan's relative errors, by layer: for the layers in `estimated` and for the vocabulary projection."""
    layers = () if plan is None else (*plan.layers, *(() if plan.head is None else (plan.head,)))
    return {
        layer.name: layer.choice.relative_error
        for layer in layers
        if layer.choice.setting.estimator != "dense" and (layer.name in estimated or layer.name == HEAD)
    }
