"""Which part of the gradient is worth computing: scores, and the choice made from them. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from celora.kernels.operations import choose_rows
from celora.kernels.plain import energy_count, measurable, rounded_up, top_k
from celora.numerics.sampling import inclusion_probabilities, sample, uniform

__all__ = [
    "column_scores",
    "columns_of",
    "critical_rows",
    "drawn",
    "energy_count",
    "grain",
    "measurable",
    "rounded_up",
    "squared_column_norms",
    "top_k",
]


def squared_column_norms(grad_output: Tensor) -> Tensor:
    """`||G[:, i]||^2` for `G: (T, out)`, in fp32 at least: (out,).

    Squares are summed rather than `linalg.vector_norm(dim=0)` taken, which is five times slower on CPU, and block
    by block, so that the wide copy of a half-precision gradient stays small.
    """
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    total = torch.zeros(grad_output.shape[1], dtype=dtype, device=grad_output.device)
    for block in grad_output.split(1024):
        total += block.to(dtype).square().sum(0)
    return total


def columns_of(x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """`x[:, index]`. Half-precision numbers as integers: on CPU, `gather` moves those up to five times faster."""
    integers = torch.int16 if x.element_size() == 2 else x.dtype
    out = x.new_empty(len(x), len(index)) if out is None else out
    torch.gather(x.view(integers), 1, index.expand(len(x), -1), out=out.view(integers))
    return out


def column_scores(squared_grad_norms: Tensor, residual_norms: Tensor) -> Tensor:
    """`||G[:, i]|| ||R[i, :]||`, the score of column i (CE-LoRA, arXiv 2502.01378): (out,).

    Both factors matter: permuting the columns of G permutes the scores with them.
    """
    return squared_grad_norms.sqrt() * residual_norms


def critical_rows(
    squared: Tensor, *, kept: int | None, share: float = 1.0, step: int = 1
) -> tuple[Tensor, Tensor | None]:
    """The `kept` rows of largest `squared` norm, ascending, and, where it came for free, their inverse (see products).

    With `kept=None` as many as hold `share` of the sum, at least one, rounded up to a multiple of `step`.
    """
    if kept is not None:
        kept = min(kept, len(squared))
    return choose_rows(squared, kept=kept, share=share, step=step)


def grain(rows: int) -> int:
    """What numbers of rows near `rows` are rounded up to: the power of two at or below a sixteenth of it.

    A product of a new shape has to be set up first, on CPU for milliseconds; so few shapes should be many steps'.
    """
    return 1 << max(0, (rows // 16).bit_length() - 1)


def drawn(scores: Tensor, k: int, *, seed: int, draw: int) -> tuple[Tensor, Tensor, Tensor]:
    """k positions and their weights, as `sample` draws them by these scores, and the probabilities of all.

    On the scores' device; weights and probabilities in float64, or in float32 where it has no float64.
    """
    device = scores.device
    p = inclusion_probabilities(scores, k)
    index, factors = sample(p, k, uniform(seed, draw, p.device))
    if p.device != device:
        return index.to(device), factors.float().to(device), p.float().to(device)
    return index, factors, p
