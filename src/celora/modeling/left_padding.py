"""Finds batches where padding before a sequence predicts a label: that of the sequence's first token.

No token is behind such a gradient, and a norm makes it huge. So it would decide which tokens an estimate keeps. The
layers compute the backward of such a call exactly (`Switch.astray`). Padding after a sequence attends to its tokens,
and is harmless.

Where celora computes the loss, the labels tell. Elsewhere the gradient of the last hidden states does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from celora.machine.device import reads_freely
from celora.modeling.hooks import Hook
from celora.modeling.language_model import decoder_of, pretrained
from celora.modeling.switch import Switch


def before_sequences(attention_mask: Tensor) -> Tensor:
    """Which positions of a mask, (B, T), are padding before a sequence: (B, T) bool."""
    return attention_mask.cumsum(1) == 0


def predicts_a_label(labelled: Tensor, attention_mask: Any) -> Tensor:
    """Whether padding before a sequence predicts a label, 0-d bool.

    Args:
        labelled: (B, T), whether a token's successor has a label.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != labelled.shape:
        return labelled.new_zeros(())
    return (labelled & before_sequences(attention_mask)).any()


def watch(switch: Switch, decoder: nn.Module, kwargs: Mapping[str, Any], output: Any) -> None:
    """After a decoder's forward: let its backward set `switch.astray` before the backward of any layer.

    Nothing is watched on an accelerator, because looking would wait for it.

    Args:
        kwargs: what the decoder was called with; `attention_mask` is (B, T), or nothing is watched.
        output: what the decoder returned; the last hidden states, (B, T, H), come first.
    """
    if not switch.on or not decoder.training or torch.compiler.is_compiling():
        return
    attention_mask = kwargs.get("attention_mask")
    hidden = output[0] if isinstance(output, tuple | ModelOutput) and len(output) else None
    if type(hidden) is not Tensor or not hidden.requires_grad or not reads_freely(hidden.device):
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != hidden.shape[:2]:
        return
    if bool(attention_mask[:, 0].all()):
        return
    padding = before_sequences(attention_mask)

    def look(gradient: Tensor) -> None:
        switch.astray = bool(gradient[padding].any())

    hidden.register_hook(look)


class OwnLoss(Hook):
    """The hooks of the decoder in a model whose loss celora never computes."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch

    def enters(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook: what the latest backward has found is of another call."""
        self.switch.astray = False

    def leaves(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook (with kwargs)."""
        watch(self.switch, module, kwargs, output)

    def under(self, model: nn.Module) -> None:
        """Hook the decoder of this model, if the model is a decoder of Transformers."""
        causal = pretrained(model)
        if causal is None or causal.config.is_encoder_decoder:
            return
        decoder = decoder_of(causal)
        if decoder is causal and hasattr(causal, "get_decoder"):
            decoder = causal.get_decoder()  # it is deeper inside, as in BLIP-2, which holds a whole language model
        if isinstance(decoder, nn.Module):
            decoder.register_forward_pre_hook(self.enters)
            decoder.register_forward_hook(self.leaves, with_kwargs=True)
