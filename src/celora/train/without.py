"""What the same run would have taken with PEFT alone, measured on its own batches after it has ended.

PEFT and celora take turns at the same micro-batches, forward and backward, without a step of the optimizer:

    PEFT's training = celora's + (ratio - 1) x celora's forwards and backwards,
    ratio = sum of PEFT's times / sum of celora's times.

It takes four pairs at most, the first to warm up, and about a tenth of the training. Nothing is measured for

- runs that are too short, compiled, in several processes, within a budget of memory, or on a base in 8 bits;
- runs whose logits of all tokens might not fit into memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from celora.errors import out_of_memory
from celora.machine.device import random_states
from celora.machine.memory import available_memory
from celora.machine.processes import in_company
from celora.machine.timing import timed
from celora.modeling.int8_base import held_in_8_bits
from celora.modeling.switch import Mode
from celora.runtime.attachment import Attachment, require
from celora.runtime.gradients import training

_SHARE = 0.1  # of the training's time that the measurement may take
_FEWEST, _PAIRS = 2, 4  # pairs of PEFT's and celora's, at least and at most; the first warms up
_SLOWER = 3  # times as long as celora, which PEFT takes at most; assumed, to keep to `_SHARE`
_LOGIT = 12  # bytes of a logit: itself, its float32 copy, and its gradient
_ROOM = 3  # times the logits have to be free


def seconds_of_peft(trainer: Any, seconds: float, steps: int, begin: Callable[[], None]) -> float | None:
    """Seconds that the training would have taken with PEFT alone, or None if that is not measured.

    Args:
        trainer: a trainer whose training has ended, with celora attached.
        seconds: how long the training took.
        steps: optimizer steps in that time.
        begin: called before the measurement.
    """
    args = trainer.args
    pairs = min(_PAIRS, int(_SHARE * steps * args.gradient_accumulation_steps / (1 + _SLOWER)))
    if pairs < _FEWEST or in_company() or args.torch_compile or held_in_8_bits(trainer.model):
        return None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    busy = sum(trainer.phases.seconds[phase] for phase in ("forward", "backward"))  # before the measurement adds to it
    try:
        begin()
        times = _times(trainer, pairs)
    except RuntimeError as error:
        if out_of_memory(error):
            return None
        raise
    finally:
        trainer.model.zero_grad(set_to_none=True)
    if len(times) < _FEWEST:
        return None
    ratio = sum(peft for _, peft in times[1:]) / sum(own for own, _ in times[1:])
    return seconds + (ratio - 1) * (busy if args.device.type == "cpu" else seconds)


def _times(trainer: Any, pairs: int) -> list[tuple[float, float]]:
    """Milliseconds of celora and of PEFT, for so many of the first micro-batches that fit into memory."""
    attachment, device, times = require(trainer.model), trainer.args.device, []
    devices = {parameter.device for parameter in trainer.model.parameters()}
    # Evaluation has left the model in its own mode, in which celora's layers are PEFT's.
    with random_states(devices), training(trainer.model), _between_refreshes(attachment):
        for batch in itertools.islice(trainer.get_train_dataloader(), pairs):
            if not _fits(trainer, batch):
                break
            step = partial(_step, trainer, batch)
            own = timed(step, device)
            with attachment.switch.off():
                times.append((own, timed(step, device)))
    return times


def _step(trainer: Any, batch: dict[str, Any]) -> None:
    with trainer.accelerator.autocast():
        trainer.compute_loss(trainer.model, dict(batch)).backward()


def _fits(trainer: Any, batch: dict[str, Any]) -> bool:
    """Whether PEFT's logits fit. An accelerator says so itself, by an error."""
    device, words = trainer.args.device, trainer.model.config.get_text_config().vocab_size
    free = available_memory(device) if device.type == "cpu" else None
    return free is None or _ROOM * _LOGIT * batch["input_ids"].numel() * words <= free


@contextmanager
def _between_refreshes(attachment: Attachment) -> Iterator[None]:
    """For a while, no layer that is ready looks at its gradient, as in most steps."""
    ready = [graft for graft in attachment.grafts.values() if graft.estimator.ready]
    looking: list[Any] = [*ready, *filter(None, [attachment.forward])]
    before = [graft.mode for graft in looking]
    for graft in looking:
        graft.mode = Mode.EXACT if graft.mode is Mode.EXACT else Mode.ESTIMATE
    try:
        yield
    finally:
        for graft, mode in zip(looking, before, strict=True):
            graft.mode = mode
