"""Computes gradients of a model on batches, and puts the model back as it was."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from celora.errors import CELoraError
from celora.machine.device import random_states
from celora.modeling.hooks import settle_all
from celora.weights.sharded import whole


class NotFinite(CELoraError):
    """The loss of a batch is no finite number."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name. Raises CELoraError if there are none."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise CELoraError("no trainable parameters: load the adapter with is_trainable=True.")
    return parameters


def on_device(batch: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The batch, moved to the model's device. CELoraError if it is none."""
    if not isinstance(batch, Mapping):
        raise CELoraError(
            f"a batch is {reprlib.repr(batch)}; expected a mapping with the model's arguments, like "
            "{'input_ids': ..., 'labels': ...}"
        )
    device = next(iter(parameters.values())).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def gradient(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None,
    parameters: Mapping[str, nn.Parameter],
) -> tuple[dict[str, Tensor], float]:
    """The gradient of each parameter, summed over the batches (zeros if there is none), and the mean loss."""
    for p in parameters.values():
        p.grad = None
    total = 0.0
    for batch in batches:
        with torch.enable_grad():
            value = loss(model, batch) if loss is not None else getattr(model(**batch), "loss", None)
            if value is None:
                raise CELoraError("the model returned no loss for this batch; add labels to it, or give loss=.")
            value.backward()
        found = float(value.detach())
        if not math.isfinite(found):
            raise NotFinite(f"the loss of this batch is {found}; give one whose loss is a finite number.")
        total += found
    gradients = {n: whole(torch.zeros_like(p) if p.grad is None else p.grad) for n, p in parameters.items()}
    return gradients, total / len(batches)


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Put a model into training mode for a while. `from_pretrained` leaves it in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def untouched(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[Callable[[], None]]:
    """At the end, restore what forwards and backwards have changed: `.grad`, buffers, random state.

    Meanwhile no hook of `register_post_accumulate_grad_hook` runs: an optimizer may make its step there.

    Yields a function that sets the random state back to the beginning, so that dropout repeats itself.
    """
    hooks = [(found, dict(found)) for p in parameters.values() if (found := p._post_accumulate_grad_hooks)]
    grads = {name: p.grad for name, p in parameters.items()}
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    with random_states(devices) as rewind:
        for found, _ in hooks:
            found.clear()
        try:
            yield rewind
        finally:
            settle_all(model)
            for found, own in hooks:
                found.update(own)
            for name, p in parameters.items():
                p.grad = grads[name]
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
