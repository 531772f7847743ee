"""Passes that torch has no fast operator for, in C (rows.c).

In and out: as the operations of `kernels.operations`. Those without a docstring have one there.

At these sizes the passes decide: scaling, rounding and scattering with torch's operators costs more than the product,
and a softmax over a vocabulary more than the projection onto it. Where there is no library (`build`), everything works
through torch's operators, slower; the gate times what it gets, so it assumes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from celora.kernels.c.library import ask_kernel, call_kernel, pointer
from celora.kernels.packed import positions


def squared_row_norms(x: Tensor) -> Tensor:
    """`sum_i x[t, i]^2` of `x: (T, n)`: (T,) float32."""
    rows, columns = x.shape
    squared = torch.empty(rows, dtype=torch.float32, device="cpu")
    call_kernel("squared_row_norms", x, x.data_ptr(), rows, columns, x.stride(0), squared.data_ptr())
    return squared


def choose_rows(squared: Tensor, *, kept: int | None, share: float, step: int) -> tuple[Tensor, Tensor]:
    """The `kept` rows with the largest `squared`: (T,) float32, ascending: (K,) int64; and the inverse: (T,) int32.

    With `kept=None`, as many as hold `share` of the sum, rounded up to a multiple of `step`: `select.energy_count`.
    """
    rows = squared.shape[0]
    index = torch.empty(rows, dtype=torch.int64, device="cpu")
    position = torch.empty(rows, dtype=torch.int32, device="cpu")
    chosen = ask_kernel("choose_rows", squared.data_ptr(), rows, -1 if kept is None else kept, share, step,
          index.data_ptr(), position.data_ptr())  # fmt: skip
    return index[:chosen], position


def quantise_rows(x: Tensor, index: Tensor | None, *, offset: int) -> tuple[Tensor, Tensor]:
    """Rows `index` (all of them if None) of `x: (T, n)` as `offset + round(x / scale)`, `scale = max |row| / 127`,
    or the smallest normal number.

    Returns the bytes, uint8 (K, n), to be read as int8 with `offset=0`, and the scales, float32 (K,).
    """
    rows, columns = x.shape
    rows = rows if index is None else index.shape[0]
    q = torch.empty(rows, columns, dtype=torch.uint8, device="cpu")
    scale = torch.empty(rows, dtype=torch.float32, device="cpu")
    call_kernel("quantise_rows", x, x.data_ptr(), pointer(index), rows, columns, x.stride(0), offset, q.data_ptr(),
          scale.data_ptr())  # fmt: skip
    return q, scale


def scatter(
    y: Tensor,
    like: Tensor,
    index: Tensor | None,
    *,
    position: Tensor | None,
    row_scale: Tensor,
    column_scale: Tensor | None,
    onto: Tensor | None,
) -> Tensor:
    """`row_scale[k] y[k]`, or `row_scale[k] column_scale[j] y[k, j]`, at each row t = index[k]: (T, n).

    T and the dtype are those of `like: (T, m)`.

    `onto[t]`, or 0 without, at the other rows; all rows if `index` is None. `y` is of the dtype of `like` or, with
    column scales, sums of 8-bit products, int32.
    """
    fill = onto is None
    if index is not None and position is None:
        position = positions(index, len(like))
    if onto is None:
        # In place where nothing moves: each number is read before it is written.
        in_place = index is None and column_scale is None
        onto = y if in_place else like.new_empty(len(like), y.shape[1])
    if column_scale is None:
        scatter_rows(y, position, row_scale, onto, fill=fill)
    else:
        scatter_sums(y, position, row_scale, column_scale, onto, fill=fill)
    return onto


def scatter_rows(y: Tensor, position: Tensor | None, row_scale: Tensor, out: Tensor, *, fill: bool) -> None:
    """`out[t] = row_scale[k] y[k]` with `k = position[t]`, int32, or t itself; rows with k < 0 become 0 if `fill`."""
    rows, columns = out.shape
    call_kernel(
        "scatter_rows", y, y.data_ptr(), pointer(position), rows, columns, row_scale.data_ptr(), out.data_ptr(), fill
    )


def scatter_sums(
    y: Tensor, position: Tensor | None, row_scale: Tensor, column_scale: Tensor, out: Tensor, *, fill: bool
) -> None:
    """The same for sums of 8-bit products, int32: `out[t, j] = row_scale[k] column_scale[j] y[k, j]`."""
    rows, columns = out.shape
    call_kernel("scatter_sums", out, y.data_ptr(), pointer(position), rows, columns, row_scale.data_ptr(),
          column_scale.data_ptr(), out.data_ptr(), fill)  # fmt: skip


def softmax_rows(
    z: Tensor,
    targets: Tensor,
    *,
    scale: float,
    cap: None,
    smoothing: float,
    log_probs: Tensor,
    entropy: Tensor | None,
    top1: Tensor | None,
    write: bool,
) -> None:
    rows, columns = z.shape
    call_kernel("softmax_rows", z, z.data_ptr(), rows, columns, targets.data_ptr(), scale, smoothing,
                log_probs.data_ptr(), pointer(entropy), pointer(top1), write)  # fmt: skip


def column_maxima(w: Tensor) -> Tensor:
    """`max_i |w[i, j]|` of `w: (out, in)`: (in,) float32."""
    rows, columns = w.shape
    largest = torch.empty(columns, dtype=torch.float32, device="cpu")
    call_kernel("column_maxima", w, w.data_ptr(), rows, columns, w.stride(0), largest.data_ptr())
    return largest


def quantise_columns(w: Tensor, scale: Tensor) -> Tensor:
    """`round(w[i, j] (1 / scale[j]))` of `w: (out, in)`: int8 (out, in)."""
    rows, columns = w.shape
    inverse_scale = 1 / scale
    q = torch.empty(rows, columns, dtype=torch.int8, device="cpu")
    call_kernel("quantise_columns", w, w.data_ptr(), rows, columns, w.stride(0), inverse_scale.data_ptr(), q.data_ptr())
    return q


def rms_norm(x: Tensor, weight: Tensor, *, offset: float, eps: float, rounds: bool) -> tuple[Tensor, Tensor]:
    y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    call_kernel("rms_norm", x, x.data_ptr(), *_rows(x), weight.data_ptr(), offset, eps, rounds, y.data_ptr(),
          inverse.data_ptr())  # fmt: skip
    return y, inverse


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, *, offset: float) -> Tensor:
    out = torch.empty_like(x)
    call_kernel("rms_norm_backward", x, grad.data_ptr(), x.data_ptr(), *_rows(x), weight.data_ptr(), offset,
          inverse.data_ptr(), out.data_ptr())  # fmt: skip
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    call_kernel("gated", gate, gate.data_ptr(), up.data_ptr(), *_rows(gate), out.data_ptr())
    return out


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    call_kernel("gated_backward", gate, grad.data_ptr(), gate.data_ptr(), up.data_ptr(), *_rows(gate),
                of_gate.data_ptr(), of_up.data_ptr())  # fmt: skip
    return of_gate, of_up


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, *, transposed: bool) -> Tensor:
    batch, tokens, heads, columns = x.shape
    out = torch.empty_like(x)
    call_kernel("rotate", x, x.data_ptr(), batch * tokens, heads, columns, cosine.data_ptr(), sine.data_ptr(),
          cosine.numel() // columns, transposed, out.data_ptr())  # fmt: skip
    return out


def _rows(tensor: Tensor) -> tuple[int, int]:
    """How many rows a contiguous tensor has, and of how many numbers."""
    columns = tensor.shape[-1]
    return tensor.numel() // columns, columns
