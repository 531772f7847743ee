"""The scores of a chunk of tokens as one function of tensors, which `torch.compile` makes one graph of.

The numbers are those of `celora.numerics.head`. There, kernels fill in buffers; a CUDA graph could not record that, and
inductor could not fuse it. Here everything between the two products is element-wise or a sum over words. So a compiled
chunk reads its logits, and writes their gradient once, in their own dtype. Without a cap, none of them are in float32.

Chunks are padded to few different sizes, as packed batches are, so few graphs are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from celora.kernels.recorded import Recorded, product_in_graph
from celora.numerics.select import grain


class ChunkScores(NamedTuple):
    """What a chunk gives; see `celora.numerics.head.TokenScores`.

    Attributes:
        log_probs: (n,) float32.
        entropy: (n,) float32, and top1: (n,) bool; None unless asked for.
        gradient: of `log_probs` by the hidden states, (n, H); None unless asked for.
    """

    log_probs: Tensor
    entropy: Tensor | None
    top1: Tensor | None
    gradient: Tensor | None


def score_chunk(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copy: Recorded | None,
    *,
    scale: float,
    cap: float | None,
    smoothing: float,
    statistics: bool,
    wanted: bool,
) -> ChunkScores:
    """The scores of `targets: (n,)` after the tokens with these hidden states, (n, H).

    Args:
        weight: of the head, (V, H), and bias, (V,) or None, in the dtype of `hidden`.
        copy: the weight in 8 bits, which then gives the logits; the gradient is multiplied with `weight`.
        scale: the logits are `y = cap tanh(scale z / cap)` of the head's output z, or `scale z` without `cap`.
        smoothing: label smoothing, 0 <= s < 1.
        statistics: whether entropy and top1 are asked for. wanted: whether the gradient is.
    """
    z = F.linear(hidden, weight, bias) if copy is None else product_in_graph(hidden, copy, bias, hidden.dtype)
    y, target = _logits(z, scale, cap), targets[:, None]
    most = y.amax(1, keepdim=True)
    below = y - most
    total = below.exp().sum(1, keepdim=True)
    p, rest = below.exp() / total, total.log()
    # What is gathered or scattered has to be in memory: z is, and the float32 numbers that follow from it never are.
    of_target = _logits(z.gather(1, target), scale, cap)
    log_p = of_target - most - rest
    log_probs = log_p if smoothing == 0 else (1 - smoothing) * log_p + smoothing * (below.mean(1, keepdim=True) - rest)
    entropy, top1, gradient = None, None, None
    if statistics:
        entropy = rest[:, 0] - torch.where(p > 0, p * below, 0.0).sum(1)
        top1 = (of_target >= most)[:, 0]
    if wanted:
        by_y = torch.where(torch.arange(len(weight), device=z.device) == target, 1 - smoothing, 0.0) - p
        by_y = by_y if smoothing == 0 else by_y + smoothing / len(weight)
        by_z = by_y * scale if cap is None else by_y * (1 - (y / cap).square()) * scale
        gradient = by_z.to(z.dtype) @ weight
    return ChunkScores(log_probs[:, 0], entropy, top1, gradient)


def _logits(z: Tensor, scale: float, cap: float | None) -> Tensor:
    """What the model makes of its head's output, in float32."""
    return z.float() * scale if cap is None else torch.tanh(z.float() * (scale / cap)) * cap


Scorer = Callable[..., ChunkScores]


def sizes(tokens: int, chunk: int) -> tuple[int, int]:
    """The size of each chunk, one of few, and how many tokens are added to `tokens` so that all chunks have it.

    Args:
        chunk: the size that chunks without padding would have.
    """
    size = chunk + -chunk % grain(chunk)
    return size, -tokens % size
