"""The factor of a weight that the gradients seen on refresh steps need."""

from __future__ import annotations

import torch
from torch import Tensor

from celora.errors import CELoraError
from celora.numerics.factor import FrozenFactor, rounded, svd_factor


def make_factor(kind: str, rank: int, seed: int) -> FrozenFactor:
    """The factor of this kind: `svd` or `gradient`. Without a rank there is nothing to choose."""
    return GradientFactor(rank, seed) if kind == "gradient" and rank else FrozenFactor(rank, seed)


class GradientFactor(FrozenFactor):
    """The factor that gradients need rather than the one the weight is best described by.

    V holds the leading right singular vectors of `grad_input` as seen on the latest refresh, and `U = W V^T`, so that
    `(G U) V = G W V^T V` is the exact product projected onto the subspace in which most of it lies.
    """

    def __init__(self, rank: int, seed: int = 0) -> None:
        super().__init__(rank, seed)
        self._seen: Tensor | None = None
        self._next: tuple[Tensor, Tensor, Tensor] | None = None  # made of it

    @property
    def ready(self) -> bool:
        return self.V is not None

    def prepare(self, weight: Tensor) -> None:
        if self.V is not None and (self.U is None or self.U.device != weight.device):  # loaded, or the model was moved
            self._use(*_projection(weight, self.V))

    def observe(self, weight: Tensor, grad_input: Tensor) -> None:
        values, vectors = leading_right_vectors(grad_input, self.rank, seed=self.seed)
        seen = values[:, None] * vectors
        if self._seen is not None:  # the spectrum so far and the new one, merged
            values, vectors = leading_right_vectors(torch.cat([self._seen, seen]), self.rank, seed=self.seed)
            seen = values[:, None] * vectors
        norms = torch.linalg.vector_norm(seen, dim=1, keepdim=True)
        # While the weight is at hand: what FSDP2 gathered of it is gone before the refresh ends.
        self._seen, self._next = seen, _projection(weight, torch.where(norms > 0, seen / norms, 0))

    def settle(self) -> None:
        """Use what was observed from now on, unless it was nothing but zeros."""
        following, self._seen, self._next = self._next, None, None
        if following is not None and bool(following[1].any()):  # once a refresh, so the synchronisation is cheap
            self._use(*following)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.V is None else {"V": self.V}

    def load_state_dict(self, state: dict[str, Tensor], in_features: int) -> None:
        V = state.get("V")
        if V is not None and V.shape != (self.rank, in_features):
            raise CELoraError(
                f"saved factor of shape {tuple(V.shape)}, not {(self.rank, in_features)}; resume with the same "
                "configuration and model."
            )
        self.U, self.V, self._seen, self._next = None, V, None, None


def leading_right_vectors(matrix: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The `rank` largest singular values of `matrix: (T, n)` and their right vectors: (rank,), (rank, n), fp32."""
    _, V = svd_factor(matrix, rank, seed=seed)
    V = torch.nn.functional.pad(V, (0, 0, 0, rank - len(V)))  # fewer tokens than the rank
    root = torch.linalg.vector_norm(V, dim=1)  # V holds sqrt(S) times orthonormal rows
    return root.square(), torch.where(root > 0, 1 / root, 0)[:, None] * V


def _projection(weight: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factor `W V^T, V`."""
    weight = weight.detach()
    matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
    V = V.to(matrix)
    return rounded(matrix, matrix @ V.T, V, weight.dtype)
