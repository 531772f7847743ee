"""The head as one more planned layer: time and error of a share of the words in the gradient of the logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from celora.machine.timing import interleaved
from celora.modeling.recognise import IGNORED
from celora.numerics.head import chunk_size, through_the_head
from celora.planning.bench import Bench
from celora.planning.candidates import EXACT
from celora.planning.evidence import MARGIN
from celora.planning.plan import Candidate, PlannedLayer
from celora.settings.config import LayerConfig
from celora.settings.names import HEAD
from celora.weights.sharded import whole

HEAD_SHARES = (0.3, 0.1, 0.03, 0.01)  # shares of the words that a plan considers


def head_evidence(bench: Bench) -> list[PlannedLayer]:
    """The vocabulary projection with time and error of each share; empty if celora does not compute it."""
    labels = bench.batches[bench.measuring].get("labels")
    if bench.language_model is None or not isinstance(labels, Tensor) or labels.dim() != 2:
        return []
    # Words are columns of the logits' gradient, so a plan stores a share of them as a keep ratio of columns.
    settings = {share: LayerConfig(keep_ratio=share, rank=0) for share in HEAD_SHARES}
    errors = {share: bench.audit({}, {HEAD: setting}).relative_error for share, setting in settings.items()}
    if errors[HEAD_SHARES[-1]] == 0:  # no error at all: celora did not compute the loss of this batch
        return []
    weight = whole(bench.language_model.head.weight).detach()
    ms = time_shares(weight, int((labels[:, 1:] != IGNORED).sum()), (1.0, *HEAD_SHARES))
    found = [Candidate(EXACT, round(ms[1.0], 5), 0.0)]
    for share, setting in settings.items():
        if ms[share] < MARGIN * ms[1.0]:
            found.append(Candidate(setting, round(ms[share], 5), round(errors[share], 6)))
    return [PlannedLayer(HEAD, len(weight), weight.shape[1], 1.0, tuple(found), 0)]


def time_shares(weight: Tensor, tokens: int, shares: Sequence[float]) -> dict[float, float]:
    """Milliseconds of the gradient of `tokens` tokens' logits, for each share of the words of `weight: (V, H)`."""
    calls, size = shares_of(weight, tokens, shares)
    measured = interleaved(calls, repeats=5, device=weight.device)
    return {share: measured[str(share)]["time_ms"] * tokens / size for share in shares}


def shares_of(weight: Tensor, tokens: int, shares: Sequence[float]) -> tuple[dict[str, Callable[[], object]], int]:
    """Functions that compute this gradient for a chunk of the tokens, by share, and the size of the chunk."""
    size = chunk_size(tokens, len(weight))
    grad = torch.randn(size, len(weight), device=weight.device).to(weight.dtype)
    out, targets = grad.new_empty(size, weight.shape[1]), torch.zeros(size, dtype=torch.long, device=weight.device)
    call = functools.partial(through_the_head, grad, weight, targets, out=out, seed=0)
    return {str(share): functools.partial(call, share) for share in shares}, size
