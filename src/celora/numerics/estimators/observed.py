"""One exact backward of one layer, and what it tells about the candidates of a plan.

Many candidates ask the same questions: how many tokens carry a share of the gradient, how large the error of 8 bits is.
Each answer is computed once.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from celora.kernels.operations import squared_row_norms
from celora.machine.device import in_float64
from celora.numerics.products.base import Native, Product
from celora.numerics.select import energy_count


class Finding(NamedTuple):
    """What one candidate does to one observed gradient.

    Attributes:
        error: `||estimate - grad_input|| / ||grad_input||`.
        kept: share of the tokens that it multiplies, if its time depends on that; else 1.
    """

    error: float
    kept: float = 1.0


class Observed:
    """One exact backward of one layer.

    Attributes:
        grad_output: (T, out).
        weight: (out, in).
        grad_input: `grad_output @ weight`, (T, in).
    """

    def __init__(self, grad_output: Tensor, weight: Tensor, grad_input: Tensor) -> None:
        self.grad_output, self.weight, self.grad_input = grad_output, weight, grad_input
        self._needed: dict[float, int] = {}
        self._rounding: dict[str, float] = {}

    def relative_error(self, estimate: Tensor) -> float:
        """`||estimate - grad_input|| / ||grad_input||`, in fp32."""
        exact = self.grad_input.float()
        norm = torch.linalg.vector_norm(exact).clamp(min=1e-30)
        return float(torch.linalg.vector_norm(estimate.float() - exact) / norm)

    def rounding(self, product: Product) -> float:
        """The relative error of the whole product in this arithmetic. A copy of the weight that it makes is dropped."""
        if isinstance(product, Native):
            return 0.0
        if product.name not in self._rounding:
            self._rounding[product.name] = self.relative_error(product(self.grad_output, self.weight))
            product.forget()
        return self._rounding[product.name]

    def needed(self, share: float) -> int:
        """How many tokens, the largest `||grad_output[t]||` first, carry `share` of `||grad_output||^2`."""
        if share not in self._needed:
            self._needed[share] = int(energy_count(self._squared_norms, share))
        return self._needed[share]

    def lost(self, kept: int) -> float:
        """The relative error of leaving out all but the `kept` tokens with the largest `||grad_output[t]||`.

        It is the norm of the other tokens' exact rows, so no estimate has to be computed.
        """
        if kept >= len(self._squared_lost):
            return 0.0
        return math.sqrt(self._squared_lost[kept] / (self._squared_lost[0] or 1.0))

    @functools.cached_property
    def _squared_norms(self) -> Tensor:
        return squared_row_norms(self.grad_output)

    @functools.cached_property
    def _squared_lost(self) -> list[float]:
        """Entry k is the squared norm of `grad_input` without the first k tokens."""
        order = self._squared_norms.argsort(descending=True)
        lost: list[float] = in_float64(squared_row_norms(self.grad_input)[order]).flip(0).cumsum(0).flip(0).tolist()
        return lost
