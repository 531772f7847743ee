"""Passes over the rows and columns of a matrix, each a launch of one kernel.

In and out: as the operations of `kernels.operations`, whose names they have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from celora.kernels import floats

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: floats.LARGEST}
_MOST_BLOCK = 4096  # numbers of a row that a program has in registers at once
_SOFTMAX_BLOCK = 2048
_PART, _ROWS, _COLUMNS = 256, 16, 128  # rows that a program reduces, and the block that it does so with


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *arguments: object, **constants: object) -> None:
    """Start a kernel on the device of its first tensor. Triton would start it on the current device."""
    with torch.cuda.device_of(x):  # does nothing for the interpreter's tensors, which are the CPU's
        kernel[grid](x, *arguments, **constants)


def quantise_rows(
    x: Tensor,
    index: Tensor | None,
    *,
    offset: int = 0,
    fold: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor]:
    """Rows `index` of `x: (T, n)`, all of them if None, times `fold: (n,)` float32, as `round(x / scale)`: (K, n).

    And the scales, `max |row| / 127` (448 for e4m3), at least the smallest normal number: (K,) float32. `offset` is 0.
    """
    from celora.kernels.triton import jitted

    assert offset == 0
    x = by_rows(x)
    rows, columns = len(x) if index is None else len(index), x.shape[1]
    q = torch.empty(rows, columns, dtype=dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        launch(
            jitted.quantise_row, (rows,),
            x, index, fold, q, scale, columns, x.stride(0), LARGEST=LARGEST[dtype], GATHERED=index is not None,
            FOLDED=fold is not None, **row_block(columns, _MOST_BLOCK),
        )  # fmt: skip
    return q, scale


def squared_row_norms(x: Tensor) -> Tensor:
    from celora.kernels.triton import jitted

    x = by_rows(x)
    rows, columns = x.shape
    squared = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        launch(jitted.square_row, (rows,), x, squared, columns, x.stride(0), **row_block(columns, _MOST_BLOCK))
    return squared


def column_maxima(x: Tensor) -> Tensor:
    return _reduced(x, torch.int32).amax(0).view(torch.float32)


def squared_column_norms(x: Tensor) -> Tensor:
    return _reduced(x, torch.float32).sum(0)


def _reduced(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What each part of the rows gives for each column."""
    from celora.kernels.triton import jitted

    x = by_rows(x)
    rows, columns = x.shape
    parts = max(1, -(-rows // _PART))
    partial = torch.empty(parts, columns, dtype=dtype, device=x.device)
    if columns:
        launch(
            jitted.reduce_columns, (-(-columns // _COLUMNS), parts),
            x, partial, rows, columns, x.stride(0), SQUARED=dtype == torch.float32, PART=_PART, ROWS=_ROWS,
            COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
    return partial


def softmax_rows(
    z: Tensor,
    targets: Tensor,
    *,
    scale: float,
    cap: float | None,
    smoothing: float,
    log_probs: Tensor,
    entropy: Tensor | None,
    top1: Tensor | None,
    write: bool,
) -> None:
    """In place: no memory beside `z`, whose rows are contiguous."""
    from celora.kernels.triton import jitted

    if len(z):
        launch(
            jitted.softmax_row, (len(z),),
            z, targets.contiguous(), log_probs, entropy, None if top1 is None else top1.view(torch.int8), z.shape[1],
            z.stride(0), float(scale), float(cap or 1.0), float(smoothing), CAPPED=cap is not None,
            ENTROPY=entropy is not None, TOP1=top1 is not None, WRITE=write, **row_block(z.shape[1], _SOFTMAX_BLOCK),
        )  # fmt: skip


def by_rows(x: Tensor) -> Tensor:
    """`x` with its rows contiguous, wherever they are."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def row_block(columns: int, most: int) -> dict[str, int]:
    """How many numbers of a row of `columns` a program works on at once, and with how many warps."""
    block = min(most, max(128, 1 << (columns - 1).bit_length()))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256))}
