"""The whole product: exact, or in 8-bit arithmetic."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from celora.numerics.estimators.base import Estimator


class Dense(Estimator):
    """`grad_input = grad_output @ W`: where torch multiplies, bit for bit what autograd computes for a linear layer."""

    name = "dense"

    @property
    def cost(self) -> float:
        return self.product.relative_cost

    @property
    def traceable(self) -> bool:
        return self.product.traceable

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        return self.product(grad_output, weight)


class Int8(Dense):
    """The whole product in 8-bit integers, with one scale per token and one per input column."""

    name = "int8"
    uses = frozenset({"seed", "precision", "weight_copy", "forward"})

    def __init__(self, out_features: int, in_features: int, **settings: Any) -> None:
        super().__init__(out_features, in_features, **{**settings, "precision": self.name})


class Fp8(Int8):
    """The same in 8-bit floats (e4m3)."""

    name = "fp8"
    uses = frozenset({"seed", "precision", "weight_copy"})
