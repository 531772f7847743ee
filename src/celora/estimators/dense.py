"""The exact product: the estimator that estimates nothing, and the baseline of all others."""

from __future__ import annotations

from torch import Tensor

from celora.estimators.base import Estimator


class Dense(Estimator):
    """`grad_input = grad_output @ W`, bit for bit what autograd computes for a linear layer."""

    name = "dense"

    @property
    def cost(self) -> float:
        return 1.0

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        return grad_output @ weight.to(grad_output.dtype)
