"""8-bit products as operators of a compiled graph, which a CUDA graph may record: they read nothing but their tensors.

In: the tensors of a copy of a weight, `W ~= diag(scale) q diag(u)`, `q: (out, in)` row by row, as copies on
accelerators are laid out (`BothWays`). Out: `x W^T + b` and `G W`, bit for bit what the copy itself computes. A graph
does not look at the weight: it sees a change when the optimizer step ends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from celora.borrowed import borrow
from celora.kernels.operations import quantise_rows
from celora.kernels.packed import BothWays, QuantisedRows
from celora.kernels.plain import IntegersBothWays
from celora.kernels.triton.product import TiledBothWays

_LAYOUTS = {layout.__name__: layout for layout in (IntegersBothWays, TiledBothWays)}


class Recorded(NamedTuple):
    """A copy of a weight, as the operators take it.

    Attributes:
        q: (out, in) int8.
        scale: of its rows, (out,) float32.
        input_scale: u, (in,) float32; None for 1.
        layout: the name of the class that multiplies with it.
    """

    q: Tensor
    scale: Tensor
    input_scale: Tensor | None
    layout: str


def recorded(packed: BothWays) -> Recorded | None:
    """This copy, for CUDA graphs, or None if the operators cannot multiply with it.

    They read its tensors where they are, as they read parameters. Other tensors they would copy at each replay.
    """
    layout = type(packed).__name__
    if _LAYOUTS.get(layout) is not type(packed):
        return None
    mark = borrow("torch._dynamo:mark_static_address")
    for tensor in (packed.stored, packed.scale, packed.input_scale):
        if tensor is not None and mark is not None:
            mark(tensor)
    return Recorded(packed.stored, packed.scale, packed.input_scale, layout)


def product_in_graph(x: Tensor, weight: Recorded, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x W^T + b` of `x: (..., in)` in a graph: (..., out). Layers with one x and one u share its 8-bit form there."""
    flat = x.reshape(-1, x.shape[-1])
    rows, row_scale = rounded_rows(flat if weight.input_scale is None else flat.float() * weight.input_scale)
    y: Tensor = product_of_rows(rows, row_scale, weight.q, weight.scale, bias, dtype, weight.layout)
    return y.view(*x.shape[:-1], -1)


@torch.library.custom_op("celora::rounded_rows", mutates_args=())
def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x: (T, n)` in 8 bits and the scales of its rows."""
    return quantise_rows(x)


@rounded_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32)


@torch.library.custom_op("celora::product_of_rows", mutates_args=())
def product_of_rows(
    rows: Tensor, row_scale: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, layout: str
) -> Tensor:
    """`x W^T + b`, (T, out), of x in 8 bits: `rows: (T, in)` and their scales, (T,)."""
    out = torch.empty(len(rows), len(q), dtype=dtype, device=rows.device)
    return _LAYOUTS[layout](q, scale).multiply(QuantisedRows(rows, row_scale), bias, out)


@product_of_rows.register_fake
def _(
    rows: Tensor, row_scale: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, layout: str
) -> Tensor:
    return rows.new_empty(len(rows), len(q), dtype=dtype)


@torch.library.custom_op("celora::product_of_gradients", mutates_args=())
def product_of_gradients(
    gradients: Tensor, q: Tensor, scale: Tensor, input_scale: Tensor | None, layout: str
) -> Tensor:
    """`G W`, (T, in), of `gradients: (T, out)`."""
    return _LAYOUTS[layout](q, scale, input_scale).rows(gradients, None, position=None, onto=None)


@product_of_gradients.register_fake
def _(gradients: Tensor, q: Tensor, scale: Tensor, input_scale: Tensor | None, layout: str) -> Tensor:
    return gradients.new_empty(len(gradients), q.shape[1])
