"""8-bit products with scales of rows and columns, bias and scatter in one launch; weights packed for them.

The same bytes multiply in both directions: `x W^T` reads W's rows, `g W` its columns. A program finds both by their
strides. Where only the second is needed, the weight is laid out so that the depth is contiguous, which is what int8
matrix instructions want.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from celora.kernels import floats, plain
from celora.kernels.packed import PackedWeight, QuantisedRows
from celora.kernels.plain import Integers, IntegersBothWays, column_major
from celora.kernels.triton.judged import cannot_run, verdict
from celora.kernels.triton.launches import launch, quantise_rows


@dataclass(frozen=True)
class Tiles:
    """How much of a product a program computes, and how.

    Attributes:
        rows, columns: of the result; depth: summed over at once; group: blocks of rows that share columns of W.
        warps, stages: of 32 threads; loads under way.
    """

    rows: int
    columns: int
    depth: int
    group: int = 8
    warps: int = 4
    stages: int = 3


# The first is for few rows; `judge` times the others on the user's device.
TILES = (
    Tiles(16, 64, 128, stages=4),
    Tiles(64, 64, 128),
    Tiles(64, 128, 64, stages=4),
    Tiles(128, 128, 64, warps=8),
    Tiles(128, 128, 128, warps=8),
)
FEW_ROWS = 32  # up to here, the first tiles
UNTIMED = 3  # where nothing was timed


def kind(dtype: torch.dtype, *, depth_first: bool) -> str:
    """What the fastest tiles depend on, beside the device: the dtype, and whether the depth is contiguous."""
    return f"{str(dtype).removeprefix('torch.')}, {'depth' if depth_first else 'columns'} first"


def tiles_for(rows: int, b: Tensor) -> Tiles:
    """The tiles for a product of so many rows with b: the fastest that `judge` found there, or a guess."""
    known = verdict(b.device)
    number = UNTIMED if known is None else known.tiles.get(kind(b.dtype, depth_first=b.stride(0) == 1), UNTIMED)
    return TILES[0] if rows <= FEW_ROWS else TILES[number]


def scaled_product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """`out[t] = a_scale[k] (a[k] b) b_scale + bias` with `t = index[k]`, or k itself without: `out`.

    Args:
        a: (K, n) int8 or e4m3, contiguous; b: (n, m) of the same dtype, of any strides.
        a_scale: (K,) float32; b_scale: (m,) float32; bias: (m,).
        out: (T, m), float32, bfloat16 or float16, rows contiguous; its other rows are left as they are.
    """
    from celora.kernels.triton import jitted

    (rows, depth), columns = a.shape, b.shape[1]
    tiles = tiles or tiles_for(rows, b)
    if rows and columns:
        blocks = -(-rows // tiles.rows) * -(-columns // tiles.columns)
        launch(
            jitted.scaled_product, (blocks,),
            a, b, a_scale, b_scale, bias, index, out, rows, columns, depth, b.stride(0), b.stride(1), out.stride(0),
            SCATTERED=index is not None, BIASED=bias is not None, ROWS=tiles.rows, COLUMNS=tiles.columns,
            DEPTH=tiles.depth, GROUP=tiles.group, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


def _padded(q: Tensor, dim: int) -> Tensor:
    """`plain.padded`, also of 8-bit floats: their zero has the same bits."""
    return plain.padded(q.view(torch.int8), dim).view(q.dtype)


def _aligned(*sides: int) -> bool:
    return not any(side % 16 for side in sides)


class _Rows(PackedWeight):
    """`rows` of a weight `q: (out, in)`: one launch quantises what is gathered, one multiplies and scatters."""

    q: Tensor
    column_scale: Tensor | None
    fold: Tensor | None = None

    def rows(
        self,
        x: Tensor,
        index: Tensor | None,
        *,
        position: Tensor | None,
        onto: Tensor | None,
    ) -> Tensor:
        q, row_scale = quantise_rows(x, index, fold=self.fold, dtype=self.q.dtype)
        if q.shape[1] < len(self.q):
            q = _padded(q, 1)
        if index is None:
            out = x.new_empty(len(x), self.q.shape[1])
        else:
            out = x.new_zeros(len(x), self.q.shape[1]) if onto is None else onto
        assert self.column_scale is not None
        return scaled_product(q, self.q, row_scale, self.column_scale, out, index=index)


class TiledWeight(_Rows, Integers):
    """A weight for `g W` alone, int8, its depth contiguous.

    The depth has zeros at its end up to a multiple of 16. With another one, Triton's loads are of single bytes, and the
    product spills registers.
    """

    @classmethod
    def pack(cls, weight: Tensor, scale: Tensor) -> TiledWeight:
        return cls(column_major(_padded(plain.quantise_columns(weight, scale), 0)), scale)


class TiledFloats(_Rows):
    """The same in 8-bit floats (e4m3)."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        self.q, self.scale, self.column_scale = q, scale, scale

    @classmethod
    def pack(cls, weight: Tensor, scale: Tensor) -> TiledFloats:
        return cls(column_major(_padded(floats.quantise_columns(weight, scale), 0)), scale)


class TiledBothWays(_Rows, IntegersBothWays):
    """A weight for both directions: W's own layout, its scales folded into g before that is quantised.

    It is torch's layout, too, and torch multiplies with one whose sides are no multiples of 16. Over such a depth,
    Triton's product spills registers.
    """

    def __init__(self, q: Tensor, scale: Tensor, input_scale: Tensor | None = None) -> None:
        super().__init__(q, scale, input_scale)
        self.fold = scale

    @classmethod
    def pack(cls, weight: Tensor, scale: Tensor, input_scale: Tensor | None = None) -> IntegersBothWays:
        own = super().pack if _aligned(*weight.shape) else IntegersBothWays.pack
        return own(weight, scale, input_scale)

    @classmethod
    def holding(cls, stored: Tensor, scale: Tensor, in_features: int) -> IntegersBothWays:
        own = super().holding if _aligned(*stored.shape) else IntegersBothWays.holding
        return own(stored, scale, in_features)

    @classmethod
    def fits(cls, stored: Tensor, out_features: int, in_features: int) -> bool:
        return not cannot_run(stored.device)

    @classmethod
    def rounded(cls, x: Tensor, input_scale: Tensor | None) -> QuantisedRows:
        return QuantisedRows(*quantise_rows(x, None, fold=input_scale), input_scale)

    def multiply(self, x: QuantisedRows, bias: Tensor | None, out: Tensor) -> Tensor:
        return scaled_product(x.q, self.q.t(), x.scale, self.scale, out, bias=bias)
