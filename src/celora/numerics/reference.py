"""Every formula of celora, written plainly. Tests compare all fast code with it.

Training uses nothing in this file. The tests compare each estimator with its twin here, in float64.

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
    """The residual of the frozen factor: `R = W - U V`."""
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


def energy(squared: Tensor, share: float) -> Tensor:
    """The smallest set of positions that has `share` of the sum, ascending; for a share of 1, all that are not zero."""
    order = squared.argsort(descending=True, stable=True)
    reached, count = 0.0, 0
    while count < len(order) and squared[order[count]] > 0 and (share == 1 or reached < share * float(squared.sum())):
        reached += float(squared[order[count]])
        count += 1
    return order[:count].sort().values


def inclusion_probabilities(scores: Tensor, k: int) -> Tensor:
    """`p_i = min(1, lambda score_i)` with a sum of k. Values above 1 are set to 1, and lambda is computed again."""
    certain = torch.zeros_like(scores, dtype=torch.bool)
    while True:
        scale = (k - certain.sum()) / scores[~certain].sum()
        p = torch.where(certain, torch.ones_like(scores), scale * scores)
        if not (p > 1 + 1e-12).any():
            return p
        certain |= p > 1


def quantise(x: Tensor, dim: int, *, paired: bool = False) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit integers: `q = round(x / s)` in [-127, 127] with `s = max |x| / 127` over `dim`: (q, s).

    With `paired`, the maximum is that of `|x_2i| + |x_2i+1|`, as AVX2's kernel wants it.
    """
    size = x.abs()
    if paired:
        size = torch.stack([part.sum(dim) for part in size.split(2, dim)], dim)  # an odd one out stands alone
    scale = size.amax(dim, keepdim=True) / 127
    return (x / torch.where(scale == 0, 1, scale)).round(), scale


def int8(grad_output: Tensor, weight: Tensor, *, paired: bool = False) -> Tensor:
    """`s_G (q_G q_W) s_W`, one scale per row of G and one per column of W (as in LLM.int8, arXiv 2208.07339).

    `paired` is how the rows of G are quantised.
    """
    q_grad, s_grad = quantise(grad_output, 1, paired=paired)
    q_weight, s_weight = quantise(weight, 0)
    return s_grad * (q_grad @ q_weight) * s_weight


def gradient_factor(grad_input: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`V` = the leading right singular vectors of `grad_input`, `U = W V^T`: `(G U) V` projects `G W` onto them."""
    V = torch.linalg.svd(grad_input, full_matrices=False).Vh[:rank]
    return weight @ V.T, V


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """`(1-s) log p_t + s mean log p` of `p = softmax(y)`, `y = scale W h`, or `cap tanh(scale W h / cap)`: (N,)."""
    y = scale * hidden @ weight.T
    if cap is not None:
        y = cap * torch.tanh(y / cap)
    log_p = y.log_softmax(-1)
    return (1 - smoothing) * log_p.gather(-1, targets[:, None])[:, 0] + smoothing * log_p.mean(-1)


def lora_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """`x W^T + scaling x A^T B^T`."""
    return x @ weight.T + scaling * (x @ A.T) @ B.T


def estimated_head_gradient(
    hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, index: Tensor, factors: Tensor
) -> Tensor:
    """`(grad (e_t - softmax(W h))) W` from the words `index`, drawn with probabilities `1 / factors`: (N, H).

    Words with a probability of 1 count exactly. Of the other words the average counts exactly, and the draw estimates
    each token's deviation from it, with the average subtracted from W's rows.
    """
    p = (hidden @ weight.T).softmax(-1)
    of_logits = torch.nn.functional.one_hot(targets, len(weight)) - p
    certain = index[factors == 1]
    others = of_logits.index_fill(1, certain, 0)
    q = (-others.sum(0)).clamp(min=0)
    q = q / q.sum().clamp(min=1e-30)
    a, mean = others.sum(1, keepdim=True), q @ weight
    differs = (others - a * q).index_fill(1, certain, 0)[:, index] * factors
    exactly = of_logits[:, certain] @ weight[certain] + a * mean
    return grad[:, None] * (exactly + differs @ (weight[index] - mean))
