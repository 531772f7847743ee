"""One forward of a language model whose loss celora computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from celora.modeling.recognise import IGNORED, Probe
from celora.numerics.head import TokenScores

TRL = "fused_lm_head"  # TRL's trainers ask for log-probabilities instead of logits
# Arguments that only the model's own head can serve.
REFUSED = ("cache", "past_key_values", "use_cache", "logits_to_keep", "shift_labels")
OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")  # also in the configuration
# Arguments of a batch that is packed already, or that has no tokens.
UNPACKED = ("inputs_embeds", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_BATCH = ("input_ids", "attention_mask", "position_ids", "labels", "num_items_in_batch")
_KNOWN = frozenset({*_BATCH, *REFUSED, *OUTPUTS, *UNPACKED, TRL, "return_dict", "ignore_index"})


@dataclass
class ScoredOutput(ModelOutput):  # type: ignore[misc]
    """The output of a call with `fused_lm_head=True`, as TRL expects it.

    The fields of each token are (B, T-1), and 0 where a token has no label.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass
class Call:
    """One forward whose loss celora computes."""

    owner: Any  # the model that was called
    given: dict[str, Any]  # the caller's arguments
    next_labels: Tensor  # (B, T): the label of each token's successor
    place: Tensor  # (N,): positions in the flattened batch of tokens whose successor is labelled
    rows: Tensor  # (N,): positions of the same tokens in the hidden states
    shape: torch.Size  # shape of the tokens that the model gets
    known: tuple[Any, ...]  # everything that decides how the model turns hidden states into a loss
    probe: Probe | None  # given if this is not known yet
    hidden: Tensor | None = None  # the decoder's output

    def for_trl(self, loss: Tensor, scores: TokenScores) -> ScoredOutput:
        """The output that TRL asks for with `fused_lm_head=True`."""
        assert scores.entropy is not None
        assert scores.top1 is not None
        log_probs, entropy, is_top1 = map(self._spread, (scores.log_probs, scores.entropy, scores.top1))
        mask = self.next_labels[:, :-1] != IGNORED
        return ScoredOutput(loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask)

    def _spread(self, values: Tensor) -> Tensor:
        """Put values of the labelled tokens, (N,), at their positions in the batch: (B, T-1)."""
        full = values.new_zeros(self.next_labels.numel()).index_copy(0, self.place.to(values.device), values)
        return full.view(self.next_labels.shape)[:, :-1]


def unknown_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call that celora does not know. A value of False counts, too: `is_causal=False` matters."""
    return {name: value for name, value in given.items() if name not in _KNOWN and value is not None}


def fit(labels: Tensor, given: Mapping[str, Any]) -> bool:
    """Whether these labels fit the tokens. If not, the model's own error explains it best."""
    if labels.dtype != torch.int64 or labels.dim() != 2:
        return False
    tokens: Any = next((of for name in ("input_ids", "inputs_embeds") if (of := given.get(name)) is not None), None)
    return isinstance(tokens, Tensor) and tokens.shape[:2] == labels.shape


def is_set(value: Any) -> bool:
    return isinstance(value, Tensor) or value not in (None, False, 0)
