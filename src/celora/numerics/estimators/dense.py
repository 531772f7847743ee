"""The whole product: exact, or in 8-bit arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from celora.numerics.estimators.base import Estimator
from celora.numerics.estimators.observed import Finding, Observed


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

    def judge(self, observed: Observed) -> Finding:
        return Finding(observed.rounding(self.product))


class Int8(Dense):
    """The whole product in 8-bit integers, with one scale per token and one per input column."""

    name = "int8"
    lent = True
    uses = frozenset({"seed", "precision", "weight_copy", "forward"})

    def __init__(self, out_features: int, in_features: int, **settings: Any) -> None:
        super().__init__(out_features, in_features, **{**settings, "precision": self.name})

    @classmethod
    def candidates(cls, out_features: int, in_features: int, device: torch.device) -> Iterable[Mapping[str, Any]]:
        return {"weight_copy": True}, {"weight_copy": False}


class Fp8(Int8):
    """The same in 8-bit floats (e4m3)."""

    name = "fp8"
    uses = frozenset({"seed", "precision", "weight_copy"})
