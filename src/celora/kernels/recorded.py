"""8-bit products as operators of a compiled graph, which a CUDA graph may record: they read nothing but their tensors.

In: the tensors of a copy of a weight, `W ~= diag(scale) q diag(u)`, `q: (out, in)` row by row, as copies on
accelerators are laid out (`BothWays`). Out: `x W^T + b` and `G W`, bit for bit what the copy itself computes.

A graph does not look whether the weight has changed. `Forwards.keep_up` looks after each optimizer step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from celora.borrowed import borrow
from celora.kernels.packed import BothWays, QuantisedRows
from celora.kernels.plain import IntegersBothWays
from celora.kernels.triton.product import TiledBothWays

_LAYOUTS: dict[str, type[IntegersBothWays]] = {layout.__name__: layout for layout in (IntegersBothWays, TiledBothWays)}


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
    """This copy for graphs, or None if the operators cannot multiply with it.

    CUDA graphs read its tensors where they are, as they read parameters. Other tensors they copy at each replay.
    """
    layout = type(packed).__name__
    if _LAYOUTS.get(layout) is not type(packed):
        return None
    mark = borrow("torch._dynamo:mark_static_address")
    for tensor in (packed.stored, packed.scale, packed.input_scale):
        if tensor is not None and mark is not None:
            mark(tensor, guard=False)  # another copy needs no other graph
    return Recorded(packed.stored, packed.scale, packed.input_scale, layout)


def product_in_graph(x: Tensor, weight: Recorded, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x W^T + b` of `x: (..., in)` in a graph: (..., out). Layers with one x and one u share its 8-bit form there."""
    rows, row_scale = input_in_graph(x.reshape(-1, x.shape[-1]), weight.input_scale, weight.layout)
    y: Tensor = product_of_rows(rows, row_scale, bias, dtype, *weight)
    return y.view(*x.shape[:-1], -1)


@torch.library.custom_op("celora::input_in_graph", mutates_args=())
def input_in_graph(x: Tensor, input_scale: Tensor | None, layout: str) -> tuple[Tensor, Tensor]:
    """`x diag(u)` of `x: (T, in)` in 8 bits, (T, in), and the scales of its rows, (T,)."""
    rows = _LAYOUTS[layout].rounded(x, input_scale)
    return rows.q, rows.scale


@input_in_graph.register_fake
def _(x: Tensor, input_scale: Tensor | None, layout: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("celora::product_of_rows", mutates_args=())
def product_of_rows(
    rows: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    q: Tensor,
    scale: Tensor,
    input_scale: Tensor | None,
    layout: str,
) -> Tensor:
    """`x W^T + b`, (T, out), of x in 8 bits: `rows: (T, in)` and their scales, (T,)."""
    out = rows.new_empty(rows.shape[0], q.shape[0], dtype=dtype)
    return _LAYOUTS[layout](q, scale, input_scale).multiply_into(QuantisedRows(rows, row_scale), bias, out)


@product_of_rows.register_fake
def _(rows: Tensor, row_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, q: Tensor, *_: object) -> Tensor:
    return rows.new_empty(rows.shape[0], q.shape[0], dtype=dtype)


@torch.library.custom_op("celora::product_of_gradients", mutates_args=())
def product_of_gradients(
    gradients: Tensor, q: Tensor, scale: Tensor, input_scale: Tensor | None, layout: str
) -> Tensor:
    """`G W`, (T, in), of `gradients: (T, out)`."""
    return _LAYOUTS[layout](q, scale, input_scale).rows(gradients, None, position=None, onto=None)


@product_of_gradients.register_fake
def _(gradients: Tensor, q: Tensor, scale: Tensor, input_scale: Tensor | None, layout: str) -> Tensor:
    return gradients.new_empty(gradients.shape[0], q.shape[1])
