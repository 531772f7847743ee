"""Which part of the gradient is worth computing: scores, and the choice made from them. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


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


def squared_row_norms(grad_output: Tensor) -> Tensor:
    """`||G[t, :]||^2` for `G: (T, out)`, in fp32 at least: (T,)."""
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(grad_output, dim=1, dtype=dtype)
    return norms.square()


def column_scores(squared_grad_norms: Tensor, residual_norms: Tensor) -> Tensor:
    """`||G[:, i]|| ||R[i, :]||`, the score of column i (CE-LoRA, arXiv 2502.01378): (out,).

    Both factors matter: permuting the columns of G permutes the scores with them.
    """
    return squared_grad_norms.sqrt() * residual_norms


def top_k(scores: Tensor, k: int) -> Tensor:
    """Positions of the k highest scores, ascending (sorted indices gather faster): (k,) int64."""
    return torch.topk(scores, k, sorted=False).indices.sort().values
