"""8-bit products in C: a packed weight, gathered rows, scales and scatter in one call (dot.c)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from celora.kernels.c.library import call_kernel, library, loaded_library, pointer
from celora.machine.cpu import matrix_instructions


def panel_columns() -> int:
    """How many columns of a packed weight lie together; 0 where there is no `gathered_product`."""
    loaded = library()
    return 0 if loaded is None else int(loaded.panel_columns())


@functools.cache
def multiplies_matrices() -> bool:
    """Whether `gathered_product` uses `matrix_instructions`, which it does from then on.

    False too where the compiler did not know them or the system refuses them.
    """
    loaded = library()
    return loaded is not None and panel_columns() > 0 and bool(loaded.use_matrices(matrix_instructions()))


def pack_columns(w: Tensor, inverse_scale: Tensor) -> Tensor:
    """`round(w[i, j] inverse_scale[j])` of `w: (out, in)`, laid out for `gathered_product`: uint8."""
    rows, columns = w.shape
    panel, step = panel_columns(), int(loaded_library().depth_step())
    packed = torch.empty(-(-columns // panel), -(-rows // step) * step // 4, panel, 4, dtype=torch.uint8, device="cpu")
    call_kernel(
        "pack_columns", w, w.data_ptr(), rows, columns, w.stride(0), inverse_scale.data_ptr(), packed.data_ptr()
    )
    return packed


def gathered_product(
    x: Tensor,
    packed: Tensor,
    column_scale: Tensor,
    out: Tensor,
    *,
    index: Tensor | None,
    position: Tensor | None,
    factors: Tensor | None,
    fill: bool,
) -> None:
    """`out[t] = factors[k] x[t] W` in 8 bits at each row t = index[k] of `x: (T, out)`; 0 at the others if `fill`.

    All rows if `index` is None. `position` is the inverse of `index`; `factors`, float32 (K,), may be None for 1.
    """
    rows, depth = x.shape
    kept = rows if index is None else index.shape[0]
    scratch = torch.empty(_scratch_bytes(kept, depth), dtype=torch.uint8, device="cpu")
    scales = torch.empty(kept, dtype=torch.float32, device="cpu")
    starts = torch.empty(kept, dtype=torch.int32, device="cpu")
    call_kernel("gathered_product", x, x.data_ptr(), rows, depth, x.stride(0), pointer(index), pointer(position), kept,
          pointer(factors), packed.data_ptr(), column_scale.data_ptr(), out.shape[1], scratch.data_ptr(),
          scales.data_ptr(), starts.data_ptr(), out.data_ptr(), fill)  # fmt: skip


def critical_product(
    x: Tensor, packed: Tensor, column_scale: Tensor, *, columns: int, kept: int | None, share: float
) -> Tensor:
    """`gathered_product` of the rows that `choose_rows` chooses by their norms, in one call: (T, columns)."""
    rows, depth = x.shape
    out = x.new_empty(rows, columns)
    work = torch.empty(rows * (8 + 4 * 4) + _scratch_bytes(rows, depth), dtype=torch.uint8, device="cpu")
    call_kernel("critical_product", x, x.data_ptr(), rows, depth, x.stride(0), -1 if kept is None else kept, share,
          packed.data_ptr(), column_scale.data_ptr(), columns, work.data_ptr(), out.data_ptr())  # fmt: skip
    return out


def _scratch_bytes(rows: int, depth: int) -> int:
    """Bytes that the products of `dot.c` need for so many quantised rows."""
    return int(loaded_library().scratch_bytes(rows, depth))
