"""Gradient checkpointing: off, unless memory asks for it. It computes every forward twice."""

from __future__ import annotations

from typing import Any

import torch

from celora.audit import trainable, untouched
from celora.memory import available_memory, saved_for_backward
from celora.train.processes import any_of_them, processes_here

_MOST = 0.8  # of what is free may be kept for backward; the rest is for what backward itself needs


def choose_checkpointing(trainer: Any, *, asked: bool) -> str:
    """Turn checkpointing on if a step would keep more for its backward than fits, and say in one line what was chosen.

    `asked`: the user has said on or off, and that is what it is.
    """
    args, model = trainer.args, trainer.model
    if getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing:
        return "Gradient checkpointing is on: every forward is computed twice. It is faster without, if memory allows."
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "Gradient checkpointing is off; what a step of a sharded model keeps is not measured."
    needed, free = _needed(trainer), available_memory(args.device)
    if free is not None and args.device.type == "cpu":
        free //= processes_here()
    line = f"a step keeps about {needed / 2**20:.0f} MiB for its backward"
    if free is not None:
        line += f", and {free / 2**20:.0f} MiB are free"
    short = any_of_them(free is not None and needed > _MOST * free, args.device)
    if asked or not short:
        return f"Gradient checkpointing is off: {line}."
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return f"Gradient checkpointing is turned on: {line}. --gradient_checkpointing false keeps it off."


def _needed(trainer: Any) -> int:
    """Bytes that a batch keeps for backward, from its first row: finding out may not take more than there is."""
    args, model = trainer.args, trainer.model
    with untouched(model, trainable(model)):
        batch = next(iter(trainer.get_train_dataloader()))
        row = {key: value[:1].to(args.device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
        packed = len(batch["input_ids"]) == 1
        with saved_for_backward(model) as saved:
            model(**(batch if packed else row))
    return saved.nbytes * len(batch["input_ids"])
