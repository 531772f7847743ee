"""A factor of the weight that is made for the gradients of refresh steps, instead of for the weight alone."""

from __future__ import annotations

import torch
from torch import Tensor

from celora.errors import CELoraError
from celora.numerics.factor import FrozenFactor, rounded, svd_factor


def make_factor(kind: str, rank: int, seed: int) -> FrozenFactor:
    """Make a factor of this kind, `svd` or `gradient`. With rank 0 the kind does not matter."""
    return GradientFactor(rank, seed) if kind == "gradient" and rank else FrozenFactor(rank, seed)


class GradientFactor(FrozenFactor):
    """The factor that suits the gradients, rather than the best approximation of the weight.

    V has the leading right singular vectors of `grad_input` at the latest refresh, and `U = W V^T`. So
    `(G U) V = G W V^T V` projects the exact product onto a subspace. Most of the product lies in this subspace.
    """

    def __init__(self, rank: int, seed: int = 0) -> None:
        super().__init__(rank, seed)
        self._seen: Tensor | None = None
        self._next: tuple[Tensor, Tensor, Tensor] | None = None  # the factor made of `_seen`

    @property
    def ready(self) -> bool:
        return self.V is not None

    def prepare(self, weight: Tensor) -> None:
        if self.V is not None and (self.U is None or self.U.device != weight.device):  # from a checkpoint, or moved
            self._use(*_projection(weight, self.V))

    def observe(self, weight: Tensor, grad_input: Tensor) -> None:
        values, vectors = leading_right_vectors(grad_input, self.rank, seed=self.seed)
        seen = values[:, None] * vectors
        if self._seen is not None:  # merge the spectrum so far with the new one
            values, vectors = leading_right_vectors(torch.cat([self._seen, seen]), self.rank, seed=self.seed)
            seen = values[:, None] * vectors
        norms = torch.linalg.vector_norm(seen, dim=1, keepdim=True)
        # Now, while the weight is available: FSDP2 frees it before the refresh ends.
        self._seen, self._next = seen, _projection(weight, torch.where(norms > 0, seen / norms, 0))

    def settle(self) -> None:
        """Use the observed factor from now on, unless everything observed was zero."""
        following, self._seen, self._next = self._next, None, None
        if following is not None and bool(following[1].any()):  # synchronises once for each refresh, which is cheap
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
    V = torch.nn.functional.pad(V, (0, 0, 0, rank - len(V)))  # there may be fewer tokens than the rank
    root = torch.linalg.vector_norm(V, dim=1)  # V is sqrt(S) times orthonormal rows
    return root.square(), torch.where(root > 0, 1 / root, 0)[:, None] * V


def _projection(weight: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factor `W V^T, V`."""
    weight = weight.detach()
    matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
    V = V.to(matrix)
    return rounded(matrix, matrix @ V.T, V, weight.dtype)
