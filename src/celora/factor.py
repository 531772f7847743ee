"""Frozen low-rank factors of a weight: `W ~= U V`, multiplied exactly while the residual `W - U V` is estimated."""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLE = 8
_POWER_ITERATIONS = 3


def svd_factor(weight: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Truncated SVD of `weight: (out, in)` with sqrt(S) on each side: `U: (out, rank)`, `V: (rank, in)`, fp32 at least.

    Randomised range finder with power iterations (Halko, Martinsson, Tropp 2011): about
    `4 (rank + 8) out in` FLOPs an iteration instead of a full decomposition; the exact one where the
    sketch would be nearly as large as the weight. Draws from a generator of its own, so the result depends on
    `seed` alone and the global random state is left as it was. `U V` need not be optimal for the estimate to be
    right: the residual is taken from whatever factors come out.
    """
    out_features, in_features = weight.shape
    matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    sketch = rank + _OVERSAMPLE
    if 2 * sketch >= min(out_features, in_features):
        left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator(device=matrix.device).manual_seed(seed)
        probe = torch.randn(in_features, sketch, generator=generator, device=matrix.device, dtype=matrix.dtype)
        basis = torch.linalg.qr(matrix @ probe).Q
        for _ in range(_POWER_ITERATIONS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        small, singular, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ small
    root = singular[:rank].sqrt()
    return (left[:, :rank] * root).contiguous(), (root[:, None] * right[:rank]).contiguous()


def residual_row_norms(weight: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """`||W[i, :] - U[i, :] V||` in fp32 at least: (out,). Row block by row block: R is never held whole."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows = max(1, 2**20 // weight.shape[1])
    return torch.cat(
        [
            torch.linalg.vector_norm(w.to(dtype) - u.to(dtype) @ V.to(dtype), dim=1)
            for w, u in zip(weight.split(rows), U.split(rows), strict=True)
        ]
    )


class FrozenFactor:
    """The factor of one weight, built when the weight is first at hand and again when it has changed.

    Attributes:
        U, V: in the weight's dtype, or None with `rank=0` and before the first `follow`.
        residual_norms: `||W[i, :] - U[i, :] V||`, or `||W[i, :]||` without a factor.
    """

    def __init__(self, rank: int, seed: int = 0) -> None:
        self.rank = rank
        self.seed = seed
        self.U: Tensor | None = None
        self.V: Tensor | None = None
        self.residual_norms: Tensor | None = None
        self._weight_norms: Tensor | None = None

    def follow(self, weight: Tensor) -> None:
        """Factor `weight`, unless it is the one that was factored last.

        Adapters merge into `weight.data` without a version bump, so the row norms serve as fingerprint.
        """
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
        known = self._weight_norms
        if known is not None and known.device == norms.device and torch.equal(norms, known):
            return
        self._weight_norms = self.residual_norms = norms
        if self.rank:
            self.U, self.V = (part.to(weight.dtype) for part in svd_factor(weight, self.rank, seed=self.seed))
            self.residual_norms = residual_row_norms(weight, self.U, self.V)
