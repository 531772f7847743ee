"""Draws items at random, and gives them weights that make sums unbiased."""

from __future__ import annotations

import torch
from torch import Tensor

from celora.machine.device import in_float64

_LEAST_SCORE = 1e-12  # relative to the highest, so that every item can be drawn


def inclusion_probabilities(scores: Tensor, k: int) -> Tensor:
    """`p_i = min(1, lambda score_i)` with the lambda that makes them add up to k: (n,) float64, on the `exact_device`.

    With these probabilities, k draws without replacement have the least variance. They are uniform if all scores are
    zero, or if one is not finite. If fewer than k scores are not zero, these are certain, and the others share the
    rest.
    """
    scores = in_float64(scores)
    total = scores.sum()
    scores = torch.where(torch.isfinite(total) & (total > 0), scores.clamp(min=_LEAST_SCORE * scores.amax()), 1.0)
    # If m items are certain, the others share k - m. The right m is the smallest for which no other probability is
    # above 1. At most k items are certain, so only the k largest need sorting.
    ordered, largest = scores.topk(k)
    rest = ordered.flip(0).cumsum(0).flip(0) + scores.index_fill(0, largest, 0).sum()
    certain = torch.arange(k, device=scores.device)
    scale = (k - certain).clamp(min=0) / rest.clamp(min=torch.finfo(torch.float64).tiny)
    fits = scale * ordered <= 1 + 1e-9
    first = fits.long().argmax(0, keepdim=True)  # used in `gather` below: as an index it would wait for an accelerator
    return (scores * scale.gather(0, first)).clamp(max=1)


def sample(probabilities: Tensor, k: int, offset: Tensor) -> tuple[Tensor, Tensor]:
    """k positions, ascending, position i with probability `p_i`, and the weights `1 / p_i` that make sums unbiased.

    Systematic sampling: the points `offset`, `offset + 1`, ... fall into the intervals of the cumulative sum. `offset`
    is uniform in [0, 1). The p_i add up to k, so exactly k items are drawn, and no device has to be asked how many.
    """
    edges = probabilities.cumsum(0)
    edges = edges * (k / edges[-1])  # so that rounding does not lose the last item
    points = torch.arange(k, device=edges.device, dtype=edges.dtype) + offset
    index = torch.searchsorted(edges, points, right=True).clamp(max=len(edges) - 1)
    return index, 1 / probabilities[index].clamp(min=torch.finfo(torch.float32).tiny)


def as_weights(factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights from `sample`, in a dtype to multiply `dtype` with in place. In float16 some would be infinite."""
    return factors.to(torch.float32 if dtype == torch.float16 else dtype)


def uniform(seed: int, draw: int, device: torch.device) -> Tensor:
    """A number in [0, 1): (). It depends on `seed` and the number of the draw, not on the global random state."""
    generator = torch.Generator(device).manual_seed(1_000_003 * seed + draw)
    return torch.rand((), generator=generator, device=device, dtype=torch.float64)
