"""What the same run would have taken with PEFT alone, measured on its own batches after the adapter is saved.

PEFT and celora take turns at the same micro-batches, forward and backward, without a step of the optimizer:

    PEFT's training = celora's + (ratio - 1) x celora's forwards and backwards,
    ratio = sum of PEFT's times / sum of celora's times.

It takes four pairs at most, the first to warm up, and a tenth of the training. A run that is too short, trains in
several processes or on a base in 8 bits is not told, nor one whose logits of all tokens might not fit into memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

from celora.errors import out_of_memory
from celora.machine.device import random_states
from celora.machine.memory import available_memory
from celora.machine.processes import in_company
from celora.machine.timing import timed
from celora.modeling.int8_base import held_in_8_bits
from celora.runtime.attachment import require

_SHARE = 0.1  # of the training's time that the measurement may take
_FEWEST, _PAIRS = 2, 4  # pairs of PEFT's and celora's, at least and at most; the first warms up
_SLOWER = 3  # times as long as celora, which PEFT takes at most; assumed, to keep to `_SHARE`
_LOGIT = 12  # bytes of a logit: itself, its float32 copy, and its gradient
_ROOM = 3  # times the logits have to be free


def seconds_of_peft(trainer: Any, seconds: float, steps: int, begin: Callable[[], None]) -> float | None:
    """Seconds that the training would have taken with PEFT alone, or None where that is not measured.

    Args:
        trainer: whose training has ended, with celora attached.
        seconds: of the training.
        steps: optimizer steps in that time.
        begin: called before the measurement.
    """
    attachment, args = require(trainer.model), trainer.args
    pairs = min(_PAIRS, int(_SHARE * steps * args.gradient_accumulation_steps / (1 + _SLOWER)))
    if in_company() or held_in_8_bits(trainer.model) or not attachment.switch.on:
        return None
    if pairs < _FEWEST:
        return None
    busy = sum(trainer.phases.seconds[phase] for phase in ("forward", "backward")) or seconds  # before more is added
    begin()
    times: dict[str, list[float]] = {"celora": [], "PEFT": []}
    devices = {parameter.device for parameter in trainer.model.parameters()}
    try:
        with random_states(devices):
            for batch in itertools.islice(trainer.get_train_dataloader(), pairs):
                if not _fits(trainer, batch):
                    return None
                times["celora"].append(timed(partial(_step, trainer, batch), args.device))
                with attachment.switch.off():
                    times["PEFT"].append(timed(partial(_step, trainer, batch), args.device))
    except RuntimeError as error:
        if out_of_memory(error):
            return None
        raise
    finally:
        trainer.model.zero_grad(set_to_none=True)
    if len(times["PEFT"]) < _FEWEST:  # there were no more batches
        return None
    ratio = sum(times["PEFT"][1:]) / sum(times["celora"][1:])
    return seconds + (ratio - 1) * busy


def _step(trainer: Any, batch: dict[str, Any]) -> None:
    with trainer.accelerator.autocast():
        trainer.compute_loss(trainer.model, dict(batch)).backward()


def _fits(trainer: Any, batch: dict[str, Any]) -> bool:
    free, words = available_memory(trainer.args.device), trainer.model.config.get_text_config().vocab_size
    return free is None or _ROOM * _LOGIT * batch["input_ids"].numel() * words <= free
