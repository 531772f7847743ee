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
from celora.kernels.plain import row_scales
from celora.numerics.products.int8 import Int8


class Int8BothWays(Int8):
    """`Int8` whose copy of the weight also multiplies in the forward; one scale per output channel serves both."""

    @property
    def operation(self) -> str:
        return "pack_both_ways"

    def unavailable(self, out_features: int, in_features: int, device: torch.device) -> str:
        if device.type == "cuda" and out_features % 8:
            return f"int8 forwards on CUDA need out_features that are a multiple of 8, not {out_features}"
        return super().unavailable(out_features, in_features, device) or super().unavailable(
            in_features, out_features, device
        )

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x W^T + bias` of `x: (..., in)`, `weight: (out, in)`, `bias: (out,)` or None: (..., out), in x's dtype."""
        packed = self._multiplied_with(weight)
        assert isinstance(packed, BothWays)
        rows, out_features = _inputs.quantised(x, packed), weight.shape[0]
        y = x.new_empty(*x.shape[:-1], out_features)  # no view, which FSDP2 cannot hook
        _onto(packed, rows, bias, y.view(-1, out_features))
        return y

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """`forward` of `x: (T, in)` into `out: (T, out)`, of the same dtype and contiguous."""
        packed = self._multiplied_with(weight)
        assert isinstance(packed, BothWays)
        return _onto(packed, packed.quantise(x), bias, out)

    def _scale_of(self, weight: Tensor) -> Tensor:
        return row_scales(weight)

    def _pack(self, weight: Tensor) -> BothWays:
        assert self._scale is not None
        return pack_both_ways(weight, self._scale)


def _onto(packed: BothWays, rows: QuantisedRows, bias: Tensor | None, out: Tensor) -> Tensor:
    """`rows W^T + bias` into `out`, also where the kernel has no such dtype."""
    return packed.multiply(rows, bias, out) if rows.dtype == out.dtype else out.copy_(packed.multiply(rows, bias))


class _Inputs:
    """The latest input in 8 bits. Query, key and value, or gate and up, are given the same one.

    It is dropped with the input, and made anew for another one or one that was changed in place. A change through
    `.data` or a NumPy view is not noticed.
    """

    def __init__(self) -> None:
        # In one attribute, so that threads see all of it or none.
        self._known: tuple[weakref.ref[Tensor], int, type, QuantisedRows] | None = None

    def quantised(self, x: Tensor, packed: BothWays) -> QuantisedRows:
        """The rows of `x: (..., in)` as `packed` multiplies them."""
        if x.is_inference():  # nothing tells whether such a tensor was changed
            return packed.quantise(x.reshape(-1, x.shape[-1]))
        known = self._known
        if known is not None and known[0]() is x and known[1:3] == (x._version, type(packed)):
            return known[3]
        rows = packed.quantise(x.reshape(-1, x.shape[-1]))
        self._known = weakref.ref(x, self._drop), x._version, type(packed), rows
        return rows

    def _drop(self, gone: object) -> None:
        known = self._known
        if known is not None and known[0] is gone:
            self._known = None


_inputs = _Inputs()
