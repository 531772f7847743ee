"""Computes on the original base model for a while: in scripts by `original_base`, in a Trainer's evaluations by itself.

A model may train with forwards in 8 bits, or on a base that is held in 8 bits. The adapter is then loaded onto the
original base. So an evaluation has two losses: `eval_loss` on the base that trained, `eval_base_loss` on the original.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from celora.errors import CELoraError
from celora.machine.device import random_states
from celora.machine.processes import any_of_them
from celora.modeling.eight_bit import EightBitHead
from celora.modeling.int8_base import held_in_8_bits, original_weights
from celora.modeling.language_model import pretrained
from celora.runtime.attachment import Attachment, attachments

# TRL's name, whatever the rows are called; and ours.
_ACCURACY, _BASE_ACCURACY = "eval_mean_token_accuracy", "eval_base_mean_token_accuracy"


@contextmanager
def original_base(model: nn.Module) -> Iterator[None]:
    """For a while, compute with the base model that the adapter will be loaded onto: `y = x W^T + b`, with the exact W.

    Evaluation and generation use the forward that was trained, as long as celora is attached. Inside this block, layers
    and logits in 8 bits are computed exactly, in the model's own dtype. If the base is held in 8 bits, its original
    weights are read from the checkpoint, layer by layer in each forward. Training goes on as before afterwards.

        with celora.original_base(model), torch.no_grad():
            loss = model.eval()(**batch).loss

    Args:
        model: a PEFT model, or any module around its layers. Without anything in 8 bits, the block changes nothing.

    Raises:
        CELoraError: the base is held in 8 bits, and an original weight cannot be read, or has changed.
    """
    with ExitStack() as stack:
        for attachment in _attached(model):
            stack.enter_context(attachment.switch.own_forwards())
        stack.enter_context(original_weights(model))
        yield


def base_losses(trainer: Any, dataloader: Any, logs: Mapping[str, Any]) -> dict[str, float]:
    """`..._base_loss` for the `..._loss` of an evaluation that has just ended: its rows are evaluated once more.

    If the trainer collects a token accuracy, as TRL's SFTTrainer does, `eval_base_mean_token_accuracy` is its value
    there. If nothing computes in 8 bits any more, or a head in 8 bits never pays here, the second values are the
    first ones. Then nothing is evaluated again.

    Empty if these are no logs of an evaluation, if nothing is in 8 bits, or if the second loss is there already. Empty,
    too, for TRL's trainers with rewards (GRPO and its like): they would generate other answers, and judge those. The
    random state is then the same as before. If several processes train together, all of them call this.

    Args:
        trainer: the Trainer that has evaluated; its own loop computes the mean, but calls no callback.
        dataloader: the rows that it evaluated.
        logs: what it logs about the evaluation.
    """
    prefixes = _evaluated(logs)
    if not prefixes or hasattr(trainer, "reward_funcs") or not _in_8_bits(trainer.model):
        return {}
    if not any_of_them(_computes_in_8_bits(trainer.model), trainer.args.device):
        same = {f"{prefix}_base_loss": float(logs[f"{prefix}_loss"]) for prefix in prefixes}
        return same | ({_BASE_ACCURACY: float(logs[_ACCURACY])} if _ACCURACY in logs else {})
    found: dict[str, float] = {}
    for prefix in prefixes:
        found |= _evaluate_on_the_base(trainer, dataloader, prefix)
    return found


def _evaluated(logs: Mapping[str, Any]) -> list[str]:
    """The prefixes of evaluations in these logs: `eval`, or `eval_NAME`. A training ends with logs alike: `train`."""
    timed = [key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")]
    return [name for name in timed if name != "train" and f"{name}_loss" in logs and f"{name}_base_loss" not in logs]


def _in_8_bits(model: nn.Module) -> bool:
    return any(attachment.forwards for attachment in _attached(model)) or bool(held_in_8_bits(model))


def _computes_in_8_bits(model: nn.Module) -> bool:
    """Whether an evaluation now computes something in 8 bits."""
    if held_in_8_bits(model):
        return True
    causal = pretrained(model)
    head = None if causal is None else causal.get_output_embeddings()
    computing = [
        head is not None and forward.applies(head.weight) if isinstance(forward, EightBitHead) else not forward.exact
        for attachment in _attached(model)
        for forward in attachment.forwards.values()
    ]
    return any(computing)


def _attached(model: nn.Module) -> list[Attachment]:
    """The attachments to this model, to a part of it, or to a wrapper around it."""
    modules = set(model.modules())
    return [attachment for attachment in list(attachments) if not modules.isdisjoint(attachment.modules())]


def _evaluate_on_the_base(trainer: Any, dataloader: Any, prefix: str) -> dict[str, float]:
    """Empty if an original weight cannot be read, with a warning; also if rows come only once, or have no loss."""
    from transformers import Trainer  # this room is imported without a Trainer, too

    missing = ""
    with ExitStack() as stack:
        try:
            stack.enter_context(original_base(trainer.model))
        except CELoraError as error:
            missing = str(error)
        # All processes evaluate once more, or none: one alone would wait for the others for ever.
        if any_of_them(bool(missing), trainer.args.device):
            missing = missing or "another process cannot read the original weights"
        if missing:
            warnings.warn(f"celora: the loss on the original base is not measured: {missing}.", stacklevel=2)
            return {}
        stack.enter_context(random_states([trainer.args.device]))
        for name in ("_stored_metrics", "_metrics"):  # TRL's CPO, ORPO and SFT log them before callbacks
            if (means := vars(trainer).get(name)) is not None:
                stack.callback(setattr, trainer, name, copy.deepcopy(means))
        seen = len(_accuracies(trainer))
        handler = trainer.callback_handler  # a progress bar would count these batches as the first evaluation's
        stack.callback(setattr, handler, "callbacks", handler.callbacks)
        handler.callbacks = []
        # The loop of the class: a subclass's may also generate answers, and log them.
        again = Trainer.evaluation_loop(
            trainer, dataloader, "Evaluation on the original base", True, metric_key_prefix=prefix
        )
        accuracies = _accuracies(trainer)[seen:]
    loss = again.metrics.get(f"{prefix}_loss")
    if loss is None:
        return {}
    more = {_BASE_ACCURACY: statistics.fmean(accuracies)} if accuracies else {}
    return {f"{prefix}_base_loss": loss} | more


def _accuracies(trainer: Any) -> list[float]:
    """The token accuracies of batches that TRL's SFTTrainer has collected in this evaluation; none elsewhere."""
    modes = vars(trainer).get("_metrics")
    evaluated = modes.get("eval") if isinstance(modes, dict) else None
    return [*evaluated.get("mean_token_accuracy", ())] if isinstance(evaluated, dict) else []
