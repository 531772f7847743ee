"""Frozen low-rank factors of a weight, `W ~= U V`. Products with U and V are exact; the residual is estimated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from celora.machine.device import exact_device

_OVERSAMPLE = 2
_ITERATIONS = 2
_WIDTH = 8  # products with a sketch are fastest if its number of columns is a multiple of this


def svd_factor(weight: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Truncated SVD of `weight: (out, in)` with sqrt(S) on each side: `U: (out, rank)`, `V: (rank, in)`, fp32 at least.

    Block Krylov iteration (Musco, Musco 2015). With `A = weight` and a random sketch P of k ~ rank + 2 columns, it
    finds the best factor in the span of `[A P, (A A^T) A P, (A A^T)^2 A P]`. This takes about `12 k out in` FLOPs
    instead of a full decomposition. If the basis would be nearly as large as the weight, the decomposition is exact.
    The random numbers depend on `seed` alone, and the global random state does not change. The estimate is right even
    if `U V` is not optimal, because the residual is computed from these factors. A matrix that is not finite gives
    zeros.
    """
    out_features, in_features = weight.shape
    matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    size = torch.linalg.vector_norm(matrix, ord=math.inf)
    finite = torch.isfinite(size)  # not finite after an overflow under a GradScaler: nothing was seen then
    sketch = -(-(rank + _OVERSAMPLE) // _WIDTH) * _WIDTH
    if 2 * (_ITERATIONS + 1) * sketch >= min(out_features, in_features):
        whole = torch.where(finite, matrix, 0).to(exact_device(matrix.device))
        left, singular, right = (part.to(matrix.device) for part in torch.linalg.svd(whole, full_matrices=False))
    else:
        size = torch.where(finite, size, 1).clamp(min=torch.finfo(matrix.dtype).tiny)

        def times(matrix: Tensor, block: Tensor) -> Tensor:
            return torch.where(finite, matrix @ block / size, 0)

        generator = torch.Generator(device=matrix.device).manual_seed(seed)
        probe = torch.randn(in_features, sketch, generator=generator, device=matrix.device, dtype=matrix.dtype)
        basis = _orthonormal(_orthonormal(times(matrix, probe)))  # twice, because of rounding
        image = times(matrix.T, basis)
        for _ in range(_ITERATIONS):
            block = times(matrix, image[:, -sketch:])
            for _ in range(2):
                block = _orthonormal(block - basis @ (basis.T @ block))
            basis, image = torch.cat([basis, block], 1), torch.cat([image, times(matrix.T, block)], 1)
        squares, vectors = _eigh(image.T @ image)
        singular, vectors = squares.flip(0)[:rank].clamp(min=0).sqrt(), vectors.flip(1)[:, :rank]
        left = basis @ vectors
        right = torch.where(singular > 0, 1 / singular, 0)[:, None] * (image @ vectors).T
        singular = singular * size
    root = singular[:rank].sqrt()
    return (left[:, :rank] * root).contiguous(), (root[:, None] * right[:rank]).contiguous()


def _orthonormal(block: Tensor) -> Tensor:
    """An orthonormal basis of the columns of a tall matrix; zeros for linearly dependent columns.

    It uses the eigenvectors of the Gram matrix, and reads the block three times. QR reads it once for each column.
    """
    squares, vectors = _eigh(block.T @ block)
    finfo = torch.finfo(block.dtype)
    least = (len(squares) * finfo.eps * squares[-1:]).clamp(min=finfo.tiny)
    scale = torch.where(squares > least, squares.clamp(min=finfo.tiny).rsqrt(), 0)
    basis: Tensor = block @ (vectors * scale)
    return basis


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of a small symmetric matrix."""
    values, vectors = torch.linalg.eigh(gram.to(exact_device(gram.device)))
    return values.to(gram.device), vectors.to(gram.device)


def residual_row_norms(weight: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """`||W[i, :] - U[i, :] V||` in fp32 at least: (out,). It goes block by block, so R is never whole in memory."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows, U, V = max(1, 2**20 // weight.shape[1]), U.to(dtype), V.to(dtype)
    return torch.cat(
        [
            torch.linalg.vector_norm(torch.addmm(w.to(dtype), u, V, alpha=-1), dim=1)
            for w, u in zip(weight.split(rows), U.split(rows), strict=True)
        ]
    )


class FrozenFactor:
    """The svd factor of one weight. It is computed when the weight is first available, and again when it has changed.

    Attributes:
        U, V: the factor in the weight's dtype; None with `rank=0`, and before there is a factor.
        residual_norms: `||W[i, :] - U[i, :] V||`, or `||W[i, :]||` without a factor.
    """

    def __init__(self, rank: int, seed: int = 0) -> None:
        self.rank = rank
        self.seed = seed
        self.U: Tensor | None = None
        self.V: Tensor | None = None
        self.residual_norms: Tensor | None = None
        self._weight_norms: Tensor | None = None

    @property
    def ready(self) -> bool:
        """Whether the factor needs only the weight."""
        return True

    def prepare(self, weight: Tensor) -> None:
        """Make the factor if it is missing and can be made. Call this before each use."""
        if self.rank and (self.V is None or self.V.device != weight.device):  # none yet, or the model was moved
            self.follow(weight)

    def observe(self, weight: Tensor, grad_input: Tensor) -> None:
        """Observe one exact backward of a refresh step."""
        self.follow(weight)

    def settle(self) -> None:
        """End a refresh."""

    def follow(self, weight: Tensor) -> None:
        """Factor `weight`, unless it is the one that was factored last.

        Adapters merge into `weight.data` without a version bump, so the row norms serve as fingerprint.
        """
        weight = weight.detach()  # de-quantises a quantised weight, once
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
        known = self._weight_norms
        if known is not None and known.device == norms.device and torch.equal(norms, known):
            return
        self._weight_norms = self.residual_norms = norms
        if self.rank and bool(torch.isfinite(norms).all()):  # not finite: memory that a launcher still has to fill
            matrix = weight.to(norms.dtype)  # converted once
            self._use(*rounded(matrix, *svd_factor(matrix, self.rank, seed=self.seed), weight.dtype))

    def state_dict(self) -> dict[str, Tensor]:
        """The state that does not follow from weight and seed."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor], in_features: int) -> None:
        """Restore what `state_dict` returned."""

    def _use(self, U: Tensor, V: Tensor, residual_norms: Tensor) -> None:
        self.U, self.V, self.residual_norms = replaced(self.U, U), replaced(self.V, V), residual_norms


def rounded(matrix: Tensor, U: Tensor, V: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """U and V in the weight's dtype, and the row norms of their residual."""
    U, V = U.to(dtype), V.to(dtype)
    return U, V, residual_row_norms(matrix, U, V)


def replaced(old: Tensor | None, new: Tensor) -> Tensor:
    """`new`, copied into `old` if the shapes agree, because compiled graphs keep referring to these tensors."""
    return new if old is None or old.device != new.device or old.shape != new.shape else old.copy_(new)
