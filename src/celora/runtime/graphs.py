"""`torch.compile` for a model with celora: the decoder, and on accelerators the head, too.

A graph of the whole model would contain padding and unlabelled logits: what is left out depends on the batch, and a
graph must not read it. So celora's hooks stay outside, and what they call is compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from celora.errors import CELoraError
from celora.modeling.language_model import check_module, find_language_model
from celora.numerics.head_in_graph import score_chunk
from celora.runtime.attachment import require


def compile_model(model: nn.Module, **options: Any) -> None:
    """Compile the decoder in place, and on accelerators celora's loss over labelled tokens, too.

    Call it after `attach`. Everything that was compiled before in this process is compiled again when it is called:
    torch finds graphs by a model's code, and a graph of a model without celora would estimate nothing.

    Batches are packed before the decoder, and their labelled tokens are picked out behind it. Both numbers of tokens
    are rounded up to one of few, so few graphs, or CUDA graphs (`mode="reduce-overhead"`), serve all batches. On a CPU,
    padding stays in the batches of a compiled decoder, and the loss is that of celora's kernels.

    Outside of graphs stay the estimate of the head's gradient from words drawn (`head_keep_ratio`), the refreshes that
    measure it, and a head whose weight is sharded, or cast by autocast.

    Args:
        model: a PEFT model with celora attached.
        options: for `torch.compile`: `mode`, `backend`, `dynamic`, ...

    Raises:
        CELoraError: this is no model, celora is not attached, or it does not compute the loss of this model.
    """
    check_module(model)
    graft, found = require(model).forward, find_language_model(model)
    if graft is None or isinstance(found, str):
        why = found if isinstance(found, str) else "it was attached with labelled_head=False"
        raise CELoraError(f"celora does not compute the loss of this model: {why}; compile it with torch.compile.")
    torch._dynamo.reset()
    found.decoder.compile(**options)
    graft.scorer = torch.compile(score_chunk, **options)
