"""Products by oneDNN, which torch carries: in 8 bits, and in float32 where torch's own library is slow."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from celora.borrowed import borrow
from celora.kernels.backends import choose
from celora.kernels.packed import LibraryPacked
from celora.kernels.plain import blocks, is_plain, takes_integers
from celora.machine.cpu import features, wider_than_mkl

_LINEAR = "torch:ops.mkldnn._linear_pointwise"
_PREPACK = "torch:ops.onednn.qlinear_prepack"
_QLINEAR = "torch:ops.onednn.qlinear_pointwise"
_ROWS = 1024  # are added at a time, so that their product takes little memory
_OFFSET = 128  # the zero point of unsigned activations


class Prepacked(LibraryPacked):
    """A weight for oneDNN's quantised linear, which applies the column scales itself.

    It does so before the row scales are applied, and sums times large column scales may overflow where the result does
    not. A power of two that brings the largest scale below 1 is therefore moved to the row scales. The bits stay.

    Rows are unsigned: signed ones can meet a reference kernel that takes a hundred times as long.
    """

    offset = _OFFSET

    def __init__(self, packed: Tensor, scale: Tensor) -> None:
        exponent = torch.frexp(scale.max()).exponent
        self.packed, self.scale = packed, scale
        self._fractions, self._power = torch.ldexp(scale, -exponent), torch.ldexp(scale.new_ones(()), exponent)

    @classmethod
    def pack(cls, weight: Tensor, scale: Tensor) -> Prepacked:
        transposed = choose("quantise_columns", weight).run(weight, scale).t().contiguous()
        return cls(borrow(_PREPACK)(transposed, None), scale)

    def quantised(self, x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        q, row_scale = super().quantised(x, index)
        return q, row_scale * self._power

    def product(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        zero_points, multiply = _zero_points(self.scale.shape[0]), borrow(_QLINEAR)
        y: Tensor = multiply(
            q, 1.0, _OFFSET, self.packed, self._fractions, zero_points, None, 1.0, 0, dtype, "none", [], ""
        )
        return y


def takes(device: torch.device) -> bool:
    """Whether oneDNN has a fast quantised linear here, and adds up its products without overflow."""
    there = device.type == "cpu" and dot_products() and None not in (borrow(_PREPACK), borrow(_QLINEAR))
    return there and takes_integers(device)


def describe(_: torch.device) -> str:
    return "oneDNN's quantised linear"


def dot_products() -> bool:
    """Whether this CPU has the 8-bit dot products that oneDNN's quantised linear is fast with."""
    return features()["vnni"]


@functools.lru_cache(maxsize=64)
def _zero_points(columns: int) -> Tensor:
    return torch.zeros(columns, dtype=torch.int32)


def takes_floats(x: Tensor) -> bool:
    """Whether oneDNN multiplies x, float32 on a CPU, faster than torch's own library."""
    takes = x.dtype == torch.float32 and is_plain(x) and x.numel() > 0
    return takes and wider_than_mkl() and borrow(_LINEAR) is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # other layouts meet a reference kernel that takes a thousand times as long
    y: Tensor = borrow(_LINEAR)(x, weight.to(x.dtype), bias, "none", [], "")
    return y if out is None else out.copy_(y)


def skinny_product(x: Tensor, m: Tensor, *, alpha: float, onto: Tensor | None) -> Tensor:
    if onto is not None:
        for part in blocks(x, _ROWS * x.shape[1]):  # autograd lets nobody write into what `split` gives
            onto[part].add_(linear(x[part], m.t()), alpha=alpha)
        return onto
    y = linear(x, m.t())
    return y if alpha == 1 else y.mul_(alpha)


def transposed_product(p: Tensor, x: Tensor) -> Tensor:
    return linear(p.t(), x.to(p.dtype).t())
