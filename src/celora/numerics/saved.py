"""What norms, gates and adapters save for backward, in 8 bits: each row of an activation with its own scale.

`x ~= scale q`, as rows are quantised for an 8-bit product. A number takes a byte and is off by half a step of
`max |row| / 127`, and in half precision by the rounding of scale and product, which may be as much again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from celora.kernels.operations import quantise_rows
from celora.kernels.packed import QuantisedRows
from celora.numerics.inputs import LatestInput


@dataclass(frozen=True)
class Saving:
    """How an autograd function saves activations.

    Attributes:
        dtype: of the activations.
        in_8_bits: whether they are saved in 8 bits.
    """

    dtype: torch.dtype
    in_8_bits: bool

    def save(self, *activations: Tensor) -> tuple[Tensor, ...]:
        """What to save of activations: themselves or, in 8 bits, the two tensors of `quantise` for each."""
        return tuple(part for x in activations for part in quantise(x)) if self.in_8_bits else activations

    def restore(self, *saved: Tensor) -> tuple[Tensor, ...]:
        """The activations again."""
        if not self.in_8_bits:
            return saved
        pairs = zip(saved[::2], saved[1::2], strict=True)
        return tuple(q.to(self.dtype).mul_(scale.to(self.dtype)) for q, scale in pairs)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """q, (..., n) int8, and scale, (..., 1) float32, with `x ~= scale q`."""
    q, scale = quantise_rows(x.reshape(-1, x.shape[-1]))
    return q.view(x.shape), scale.view(*x.shape[:-1], 1)


def rounded_input(x: Tensor) -> QuantisedRows:
    """A layer's input `x: (..., in)` in 8 bits, to be saved for `grad_A = p^T x`. Layers that share x share the result.

    It takes one pass over x and a byte a number: `x ~= diag(s) q`, so `grad_A ~= (diag(s) p)^T q`. Each number of x is
    off by at most half a step of its row.
    """
    return _inputs.quantised(x, _Rounding())


class _Rounding:
    """Rounds inputs that no 8-bit product multiplies."""

    input_scale = None

    def quantise(self, x: Tensor) -> QuantisedRows:
        return QuantisedRows(*quantise_rows(x))


_inputs = LatestInput()
