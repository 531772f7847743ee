"""Settles what presets `auto` and `fast` train with: a rule and a moment of timing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from celora.machine.device import random_states
from celora.modeling.recognise import IGNORED
from celora.modeling.survey import survey
from celora.runtime.gate import gate
from celora.settings.config import CELoraConfig
from celora.settings.presets import ruled
from celora.train.output.folder import CONFIG
from celora.train.request.arguments import TrainRequest


@dataclass(frozen=True)
class Chosen:
    """The configuration to attach, and the timings of the gate."""

    config: CELoraConfig
    timings: tuple[dict[str, Any], ...] = ()


def choose(request: TrainRequest, trainer: Any, *, begun: bool) -> Chosen:
    """The configuration to attach, and what it was chosen by.

    `begun`: the run is resumed, and keeps the configuration that it began with.
    """
    if request.preset not in ("auto", "fast"):
        return Chosen(request.config)
    if begun and (request.output / CONFIG).is_file():
        return Chosen(CELoraConfig.load(request.output / CONFIG))
    return settled(request, trainer)


def settled(request: TrainRequest, trainer: Any) -> Chosen:
    """What `choose` returns for a new run."""
    given = request.options.celora or {}
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
