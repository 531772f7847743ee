"""Gradient checkpointing is off unless memory is short, because it computes every forward twice.

celora measures the memory that a step keeps for its backward on the longest row. It scales this to the largest batch
that training can see: the batch of the longest rows. So the order of the rows does not matter, and two rows are enough.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from celora.machine.memory import available_memory, saved_for_backward
from celora.machine.processes import any_of_them
from celora.runtime.gradients import trainable, training, untouched
from celora.train.processes import processes_here
from celora.train.progress import Phases
from celora.train.rows.truncation import row_lengths

_MOST = 0.8  # share of the free memory for what a forward keeps; backward itself needs the rest
_ROUNDED = 17 / 16  # room for the padding that stays: celora rounds token counts up, or keeps a twentieth


def choose_checkpointing(trainer: Any, *, asked: bool) -> str:
    """Turn checkpointing on if a step would keep more for its backward than fits. Returns a line that says so.

    `asked`: the user chose on or off; the choice stands.
    """
    args, model = trainer.args, trainer.model
    if getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing:
        return "Gradient checkpointing is on: every forward is computed twice. It is faster without, if memory allows."
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "Gradient checkpointing is off; celora does not measure the memory of a sharded model's step."
    free = available_memory(args.device)
    if free is not None and args.device.type == "cpu":
        free //= processes_here()
    needed = kept_by_a_step(trainer)
    line = f"a step keeps up to {needed / 2**20:.0f} MiB for its backward"
    if free is not None:
        line += f", and {free / 2**20:.0f} MiB are free"
    short = any_of_them(free is not None and needed > _MOST * free, args.device)
    if asked or not short:
        return f"Gradient checkpointing is off: {line}."
    _turn_on(model)
    return f"Gradient checkpointing is turned on: {line}. --gradient_checkpointing false keeps it off."


def _turn_on(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Turn checkpointing on for a while."""
    _turn_on(model)
    try:
        yield
    finally:
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()


def kept_by_a_step(trainer: Any) -> int:
    """An estimate of the bytes that the largest batch of the training data keeps for its backward; rarely too low."""
    lengths = row_lengths(trainer.train_dataset)
    longest = np.argsort(-lengths, kind="stable")[: trainer.args.per_device_train_batch_size]
    row, most, tokens = trainer.train_dataset[int(longest[0])], int(lengths[longest[0]]), int(lengths[longest].sum())
    half, quarter, few = _cut(row, max(4, most // 2)), _cut(row, max(2, most // 4)), _cut(row, 2)
    with _trying(trainer) as probe:
        if len(longest) == 1:
            return _kept(probe, [_cut(row, most)])
        if trainer.padding_free:  # TRL joins all rows into one; the mask grows with the square of its length
            one, part = (_kept(probe, [row, row]) for row in (half, quarter))
            n, less = (2 * len(row["input_ids"]) for row in (half, quarter))
            square = max(0.0, (one / n - part / less) / (n - less)) if n > less else 0.0
            return int(tokens * (one / n - square * n) + tokens**2 * square)
        # A second row, nearly all padding, shows whether padding stays: first at half the length, then at all of it.
        short = _kept(probe, [half, few])
        if short <= 1.5 * _kept(probe, [half]):
            one = _kept(probe, [_cut(row, most), few])
            if one <= 3 * short:
                return int(one * tokens / most * _ROUNDED)
        return len(longest) * _kept(probe, [_cut(row, most)], padded=True)


@contextmanager
def _trying(trainer: Any) -> Iterator[Any]:
    """A trainer around the same model, in training mode. Whatever it changes is put back at the end."""
    model, probe = trainer.model, copy.copy(trainer)
    probe.phases = Phases()
    vars(probe)["_metrics"] = copy.deepcopy(vars(trainer).get("_metrics"))  # TRL's
    with untouched(model, trainable(model)), training(model):
        yield probe


def _kept(trainer: Any, rows: list[dict[str, Any]], *, padded: bool = False) -> int:
    """Bytes that a batch of these rows keeps. `padded`: mask one token, as if a row were shorter than the batch."""
    batch = trainer.data_collator(rows)
    if padded:
        batch["attention_mask"][:, -1] = 0
    return kept_by(trainer, batch)


def kept_by(trainer: Any, batch: dict[str, Any]) -> int:
    """Bytes that a batch keeps for its backward."""
    batch |= {key: value.to(trainer.args.device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    with saved_for_backward(trainer.model) as saved, trainer.accelerator.autocast():
        trainer.compute_loss(trainer.model, batch)
    return saved.nbytes


def _cut(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The first `tokens` tokens of a row, each with a label, so that the loss counts all of them."""
    found: dict[str, Any] = {"input_ids": row["input_ids"][:tokens], "labels": row["input_ids"][:tokens]}
    if "seq_lengths" in row:
        ends = np.minimum(np.cumsum(row["seq_lengths"]), tokens)
        found["seq_lengths"] = [int(n) for n in np.diff(ends, prepend=0) if n]
    return found
