"""8-bit products in both directions from one copy of the weight, and 8-bit inputs that several layers share.

    W ~= diag(s) q,    y = x W^T + b ~= diag(s_x) (q_x q^T) diag(s) + b,    G W ~= diag(s_G) q_(G diag(s)) q,

with one scale s per output channel of W, one s_x per token of x, and s folded into G before G is quantised. The forward
is an estimate then: a model that trains so is a slightly other model, as one whose base is quantised (QLoRA).
Source: symmetric absmax quantisation as in LLM.int8 (arXiv 2208.07339); one copy for both directions is ours.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from celora.kernels.operations import pack_both_ways
from celora.kernels.packed import BothWays, QuantisedRows
from celora.kernels.plain import divisor
from celora.numerics.products.int8 import Int8


class Int8BothWays(Int8):
    """`Int8` whose copy of the weight also multiplies in the forward."""

    @property
    def operation(self) -> str:
        return "pack_both_ways"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x W^T + bias` of `x: (..., in)`, `weight: (out, in)`, `bias: (out,)` or None: (..., out), in x's dtype."""
        packed = self._multiplied_with(weight)
        assert isinstance(packed, BothWays)
        y = packed.multiply(_inputs.quantised(x, packed), bias)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])

    def _scale_of(self, weight: Tensor) -> Tensor:
        largest: Tensor = torch.linalg.vector_norm(weight.detach(), float("inf"), dim=1)
        return divisor(largest.float() / self._largest)

    def _pack(self, weight: Tensor) -> BothWays:
        assert self._scale is not None
        return pack_both_ways(weight, self._scale)


class _Inputs:
    """The latest input in 8 bits. Query, key and value, or gate and up, are given the same one.

    It is dropped with the input, and made anew for another one or one that was changed in place.
    """

    def __init__(self) -> None:
        self._made_of: tuple[weakref.ref[Tensor], int, type] | None = None
        self._rows: QuantisedRows | None = None

    def quantised(self, x: Tensor, packed: BothWays) -> QuantisedRows:
        """The rows of `x: (..., in)` as `packed` multiplies them."""
        if x.is_inference():  # nothing tells whether such a tensor was changed
            return packed.quantise(x.reshape(-1, x.shape[-1]))
        made_of = self._made_of
        same = made_of is not None and made_of[0]() is x and made_of[1:] == (x._version, type(packed))
        if self._rows is None or not same:
            self._rows = packed.quantise(x.reshape(-1, x.shape[-1]))
            self._made_of = weakref.ref(x, self._drop), x._version, type(packed)
        return self._rows

    def _drop(self, gone: object) -> None:
        if self._made_of is not None and self._made_of[0] is gone:
            self._made_of = self._rows = None


_inputs = _Inputs()
