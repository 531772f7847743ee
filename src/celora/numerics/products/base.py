"""The interface of a product, and the plain product.

In: `grad_output: (T, out)`, the weight `(out, in)`, and which rows are kept. Out: `grad_input: (T, in)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from celora.kernels.operations import linear, squared_row_norms
from celora.numerics.select import critical_rows, grain


class Product(ABC):
    """Multiplies the gradients of one layer with its weight. It may keep a copy of the weight in another format."""

    name: ClassVar[str]
    relative_cost: ClassVar[float] = 1.0  # nominal cost of one multiplication
    traceable: ClassVar[bool] = False  # whether torch.compile can look inside

    def __call__(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """`(T, out) , (out, in) -> (T, in)`, in the dtype of `grad_output`."""
        return self.rows(grad_output, weight, None)

    @abstractmethod
    def rows(
        self,
        grad_output: Tensor,
        weight: Tensor,
        index: Tensor | None,
        *,
        position: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        """`G[t] W` at each row t of `index`, ascending; at the other rows `onto[t]`, or 0: (T, in).

        All rows if `index` is None. `position` is the inverse of `index` (k or -1 for each t, int32); give it if you
        have it. `onto` is overwritten.
        """

    def critical_rows(
        self,
        grad_output: Tensor,
        weight: Tensor,
        *,
        kept: int | None,
        share: float,
        onto: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Multiply only the rows of `grad_output` with the largest norms: (T, in).

        `kept` gives their number; if None, take the fewest rows that have `share` of `||G||^2`. `onto` computes the
        result of the other rows; without it they are 0. It is not called if there are no other rows.
        """
        squared = squared_row_norms(grad_output)
        step = self.grain(len(squared), squared.device)
        index, position = critical_rows(squared, kept=kept, share=share, step=step)
        if len(index) == len(grad_output):
            return self(grad_output, weight)
        return self.rows(grad_output, weight, index, position=position, onto=None if onto is None else onto())

    def grain(self, rows: int, device: torch.device) -> int:
        """A number of kept rows, out of `rows`, is rounded up to a multiple of this: see `select.grain`."""
        return grain(rows)

    @property
    def holds_copy(self) -> bool:
        """Whether a copy of the weight is kept, so that the weight itself is not read."""
        return False

    def notice(self) -> None:  # noqa: B027 - optional by design
        """Forget a copy of a weight that has changed since, as far as a few of its numbers show."""

    def recheck(self, weight: Tensor) -> None:  # noqa: B027 - optional by design
        """Drop everything derived from the weight if the weight has changed without a change of its version."""

    def forget(self) -> None:  # noqa: B027 - optional by design
        """Drop everything derived from the weight."""

    def unavailable(self, out_features: int, in_features: int, device: torch.device) -> str:
        """Why this product cannot multiply a layer of this shape on this device; '' if it can."""
        return ""

    def pays(self, out_features: int, in_features: int, device: torch.device) -> bool:
        """Whether it is available for this shape on this device, and not known to be slow there."""
        return not (self.unavailable(out_features, in_features, device) or self.slow(device))

    def slow(self, device: torch.device) -> str:
        """Why it is slow on this device for any shape; '' if it need not be."""
        return ""


class Native(Product):
    """The product in the dtype of the gradient, as autograd computes it."""

    name = "native"
    traceable = True

    def rows(
        self,
        grad_output: Tensor,
        weight: Tensor,
        index: Tensor | None,
        *,
        position: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        kept = grad_output if index is None else grad_output.index_select(0, index)
        y = linear(kept, weight.detach().t())
        if index is None:
            return y
        onto = grad_output.new_zeros(grad_output.shape[0], weight.shape[1]) if onto is None else onto
        return onto.index_copy_(0, index, y)
