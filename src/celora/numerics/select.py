"""Scores of parts of the gradient, and the choice of parts by their scores. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from celora.kernels.operations import choose_rows, squared_column_norms
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


def columns_of(x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """`x[:, index]`. Half-precision numbers move as integers: on CPU, `gather` is up to five times faster so."""
    integers = torch.int16 if x.element_size() == 2 else x.dtype
    out = x.new_empty(len(x), len(index)) if out is None else out
    torch.gather(x.view(integers), 1, index.expand(len(x), -1), out=out.view(integers))
    return out


def column_scores(squared_grad_norms: Tensor, residual_norms: Tensor) -> Tensor:
    """`||G[:, i]|| ||R[i, :]||`, the score of column i (CE-LoRA, arXiv 2502.01378): (out,).

    Both norms matter: a column with a large gradient may meet a small row.
    """
    return squared_grad_norms.sqrt() * residual_norms


def critical_rows(
    squared: Tensor, *, kept: int | None, share: float = 1.0, step: int = 1
) -> tuple[Tensor, Tensor | None]:
    """The `kept` rows with the largest `squared` norm, ascending; and their inverse, or None.

    With `kept=None`, the fewest rows that have `share` of the sum, at least one, rounded up to a multiple of `step`.
    """
    if kept is not None:
        kept = min(kept, len(squared))
    return choose_rows(squared, kept=kept, share=share, step=step)


def grain(rows: int) -> int:
    """Numbers of rows near `rows` are rounded up to a multiple of this: the power of two at or below a sixteenth.

    Setting up a product of a new shape takes milliseconds on CPU. So many steps should share few shapes.
    """
    return 1 << max(0, (rows // 16).bit_length() - 1)


def drawn(scores: Tensor, k: int, *, seed: int, draw: int) -> tuple[Tensor, Tensor, Tensor]:
    """k positions drawn by `sample` with these scores, their weights, and the probabilities of all positions.

    All are on the scores' device. Weights and probabilities are float64, or float32 if the device has no float64.
    """
    device = scores.device
    p = inclusion_probabilities(scores, k)
    index, factors = sample(p, k, uniform(seed, draw, p.device))
    if p.device != device:
        return index.to(device), factors.float().to(device), p.float().to(device)
    return index, factors, p
