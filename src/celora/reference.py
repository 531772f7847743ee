"""Every formula of celora, written plainly: the judge of everything fast.

Nothing here is used in training. The tests compare each estimator with its twin in this file, in float64.

Notation, for one frozen linear layer `y = x W^T + b` and one backward pass over T tokens:
`W: (out, in)`, `grad_output = G: (T, out)`, `grad_input: (T, in)`, frozen factor `U: (out, r0)`, `V: (r0, in)`,
residual `R = W - U V`, `index`: the kept columns of G, which are rows of W.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense(grad_output: Tensor, weight: Tensor) -> Tensor:
    """The exact product `G W`: (T, out) x (out, in) -> (T, in)."""
    return grad_output @ weight


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r0 factors `U V ~= W`, sqrt(S) on each side (CE-LoRA, arXiv 2502.01378, Double-LoRA)."""
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    root = singular[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def residual(weight: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """What the frozen factor leaves over: `R = W - U V`."""
    return weight - U @ V


def column_scores(grad_output: Tensor, rows: Tensor) -> Tensor:
    """How much column i of G and row i of `rows` (R, or W without a factor) contribute: `||G[:, i]|| ||R[i, :]||`."""
    return grad_output.square().sum(0).sqrt() * rows.square().sum(1).sqrt()


def top_k(scores: Tensor, k: int) -> Tensor:
    """The k highest-scored positions, ascending."""
    return scores.topk(k).indices.sort().values


def columns(grad_output: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Approximated matrix multiplication: the kept columns of G times the kept rows of W, `G[:, I] W[I, :]`."""
    return grad_output[:, index] @ weight[index]


def double_lora(grad_output: Tensor, weight: Tensor, U: Tensor, V: Tensor, index: Tensor) -> Tensor:
    """Double-LoRA: the factor exactly, the residual on the kept columns, `(G U) V + G[:, I] R[I, :]`."""
    return (grad_output @ U) @ V + columns(grad_output, residual(weight, U, V), index)


def tokens(grad_output: Tensor, weight: Tensor, index: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Kept tokens exactly, the others through the factor: `G[t] W` for t in `index`, else `(G[t] U) V`."""
    estimate = grad_output @ U @ V
    estimate[index] = grad_output[index] @ weight
    return estimate
