"""8-bit products in C: gathered rows, a packed weight, scales and scatter in one call (dot.c).

In: rows `x: (T, out)`, which of them to multiply, a weight `(out, in)` packed in bytes with its column scales. Out:
`x W` at these rows, (T, in). Tensors become pointers and sizes here, and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from celora.kernels.c import tier
from celora.kernels.c.library import ask_kernel, call_kernel, known, library, pointer, supported, up_to
from celora.kernels.packed import PackedWeight, positions
from celora.machine import cpu

_INSTRUCTIONS = {
    "avx2": "AVX2",
    "avxvnni": "AVX-VNNI",
    "avx512vnni": "AVX-512 VNNI",
    "avx512": "AVX-512 VNNI",
    "amx": "AMX",
    "dotprod": "ARM's dot products",
    "i8mm": "ARM's I8MM",
}


def panel_columns() -> int:
    """How many columns of a packed weight lie together; 0 where there is no `gathered_product`."""
    return 0 if library() is None else ask_kernel("panel_columns")


def panel_shape(depth: int) -> tuple[int, int, int]:
    """Of a panel whose columns have `depth` numbers: parts of the depth, columns, numbers of a column and part."""
    step, together = ask_kernel("depth_step"), ask_kernel("together")
    return up_to(depth, step) // together, panel_columns(), together


def takes(device: torch.device) -> bool:
    """Whether this kernel packs the weights on this device: the kernel is there, and nothing is faster.

    oneDNN may know matrix instructions where the compiler or the system keeps this kernel from them.
    """
    return device.type == "cpu" and panel_columns() > 0 and (used_tier() == "amx") == cpu.matrix_instructions()


def why_not(device: torch.device) -> str:
    """Why it is not, on CPU; '' elsewhere, where nobody expects it."""
    if device.type != "cpu":
        return ""
    if reason := tier.why_not():
        return reason
    if panel_columns():
        return "celora's kernel has no AMX here"
    return f"tier {used_tier()} of celora's kernels has no 8-bit products"


def describe(device: torch.device) -> str:
    return f"celora's own kernel, with {_INSTRUCTIONS[used_tier()]}"


def used_tier() -> str:
    """The tier of the kernels; '' without."""
    loaded = library()
    return "" if loaded is None else loaded.tier


class Panels(PackedWeight):
    """A weight in panels of columns. One call gathers, quantises, multiplies, scales and scatters.

    Attributes:
        packed: the panels.
        column_scale: what each column of the product is multiplied with, (in,) float32.
        fold: what each number of the rows is multiplied with before they are quantised, (out,) float32, or None.
    """

    packed: Tensor
    column_scale: Tensor
    fold: Tensor | None = None

    def __init__(self, packed: Tensor, scale: Tensor) -> None:
        self.packed, self.scale, self.column_scale = packed, scale, scale

    @classmethod
    def pack(cls, weight: Tensor, scale: Tensor) -> Panels:
        return cls(pack_columns(known(weight), 1 / scale), scale)

    def rows(
        self,
        x: Tensor,
        index: Tensor | None,
        *,
        position: Tensor | None,
        onto: Tensor | None,
    ) -> Tensor:
        g = known(x)
        if index is not None and position is None:
            position = positions(index, len(g))
        out = g.new_empty(g.shape[0], len(self.column_scale)) if onto is None else onto.to(g.dtype)
        gathered_product(
            g,
            self.packed,
            self.column_scale,
            out,
            index=index,
            position=position,
            fill=onto is None,
            fold=self.fold,
        )
        return out.to(x.dtype)

    def critical_rows(self, x: Tensor, *, kept: int | None, share: float) -> Tensor | None:
        if not supported(x):
            return None
        return critical_product(x, self.packed, self.column_scale, kept=kept, share=share, fold=self.fold)


def pack_columns(w: Tensor, inverse_scale: Tensor) -> Tensor:
    """`round(w[i, j] inverse_scale[j])` of `w: (out, in)`, laid out for `gathered_product`: uint8."""
    rows, columns = w.shape
    panel = panel_columns()
    packed = torch.empty(-(-columns // panel), *panel_shape(rows), dtype=torch.uint8, device="cpu")
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
    fill: bool,
    fold: Tensor | None = None,
) -> None:
    """`out[t] = x[t] W` in 8 bits at each row t of `index` of `x: (T, out)`; 0 at the others if `fill`.

    All rows if `index` is None. `position` is the inverse of `index`. With `fold`, float32 (out,), W is one that
    `pack_rows` has packed, and x is multiplied with `fold` first.
    """
    rows, depth = x.shape
    kept, columns = rows if index is None else index.shape[0], out.shape[1]
    scratch = torch.empty(scratch_bytes(kept, depth, turned=fold is not None), dtype=torch.uint8, device="cpu")
    scales = torch.empty(kept, dtype=torch.float32, device="cpu")
    starts = torch.empty(kept, dtype=torch.int32, device="cpu")
    turned = 0 if fold is None else columns
    call_kernel("gathered_product", x, x.data_ptr(), rows, depth, x.stride(0), pointer(index), pointer(position), kept,
          pointer(fold), packed.data_ptr(), turned, column_scale.data_ptr(), columns,
          scratch.data_ptr(), scales.data_ptr(), starts.data_ptr(), out.data_ptr(), fill)  # fmt: skip


def critical_product(
    x: Tensor,
    packed: Tensor,
    column_scale: Tensor,
    *,
    kept: int | None,
    share: float,
    fold: Tensor | None = None,
) -> Tensor:
    """`gathered_product` of the rows that `choose_rows` chooses by their norms, in one call: (T, in)."""
    (rows, depth), columns = x.shape, len(column_scale)
    out = x.new_empty(rows, columns)
    turned = 0 if fold is None else columns
    scratch = scratch_bytes(rows, depth, turned=fold is not None)
    work = torch.empty(8 + rows * (8 + 4 * 4) + scratch, dtype=torch.uint8, device="cpu")
    call_kernel("critical_product", x, x.data_ptr(), rows, depth, x.stride(0), -1 if kept is None else kept, share,
          pointer(fold), packed.data_ptr(), turned, column_scale.data_ptr(), columns, work.data_ptr(),
          out.data_ptr())  # fmt: skip
    return out


def scratch_bytes(rows: int, depth: int, *, turned: bool) -> int:
    """Bytes that a product of `dot.c` needs for the rows it quantises, and for turned panels."""
    return ask_kernel("scratch_bytes", rows, depth, torch.get_num_threads(), turned)
