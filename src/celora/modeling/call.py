"""One forward pass of a language model that celora has taken over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from celora.modeling.recognise import Probe

TRL = "fused_lm_head"  # TRL's trainers ask for log-probabilities instead of logits
# Arguments that ask for something which only the model's own head can give.
REFUSED = ("cache", "past_key_values", "use_cache", "logits_to_keep", "shift_labels")
OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")  # also in the configuration
# Arguments of a batch that is packed already, or that has no tokens.
UNPACKED = ("inputs_embeds", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_BATCH = ("input_ids", "attention_mask", "position_ids", "labels", "num_items_in_batch")
_KNOWN = frozenset({*_BATCH, *REFUSED, *OUTPUTS, *UNPACKED, TRL, "return_dict", "ignore_index"})


@dataclass
class ScoredOutput(ModelOutput):  # type: ignore[misc]
    """What TRL expects of a call with `fused_lm_head=True`; per-token fields are (B, T-1), 0 without a label."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass
class Call:
    """One forward pass that has been taken over."""

    owner: nn.Module  # whose forward it is
    given: dict[str, Any]  # the arguments that it would have got
    next_labels: Tensor  # (B, T): the label of each token's successor
    place: Tensor  # of the tokens with such a label, in the flattened batch: (N,)
    rows: Tensor  # of the same in the hidden states
    shape: torch.Size  # of the tokens that the model gets
    keeps: Any  # the positions whose logits the model computes
    known: tuple[Any, ...]  # what its head and loss are known by
    probe: Probe | None  # where they are not known yet
    hidden: Tensor | None = None


def unknown_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that celora does not know, also those that say no: for `is_causal`, that is a lot."""
    return {name: value for name, value in given.items() if name not in _KNOWN and value is not None}


def fit(labels: Tensor, given: Mapping[str, Any]) -> bool:
    """Whether these are labels for the tokens; a model's own error says best what is wrong with others."""
    if labels.dtype != torch.int64 or labels.dim() != 2:
        return False
    tokens: Any = next((of for name in ("input_ids", "inputs_embeds") if (of := given.get(name)) is not None), None)
    return isinstance(tokens, Tensor) and tokens.shape[:2] == labels.shape


def is_set(value: Any) -> bool:
    return isinstance(value, Tensor) or value not in (None, False, 0)
