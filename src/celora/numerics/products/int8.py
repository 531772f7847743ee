"""The arithmetic of `grad_output @ W`: in the gradient's own dtype, or in 8 bits with one scale per row and column.

Every estimator that computes such a product does it through a `Product`, so 8 bits compose with all of them:

    G ~= s_G q_G,   W ~= q_W s_W,      G W ~= s_G (q_G q_W) s_W,

`s_G: (T, 1)` one scale per token, `s_W: (1, in)` one per input column, both outside the sum over `out`.
Source: symmetric absmax quantisation as in LLM.int8 (arXiv 2208.07339), here for the backward's only frozen operand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from celora.borrowed import borrow
from celora.kernels.c import build as build_kernels
from celora.kernels.c import dot as dot_kernels
from celora.kernels.c import library as library_kernels
from celora.kernels.c import rows as rows_kernels
from celora.kernels.onednn import OFFSET, PREPACK, onednn, packed_product
from celora.kernels.operations import quantise_columns
from celora.kernels.plain import (
    INT_MM,
    column_major,
    integer_product,
    one_by_one,
    padded,
    quantise_rows,
    sums_are_exact,
)
from celora.machine import cpu
from celora.machine.cpu import features
from celora.numerics.products.eight_bit import EightBit


class Int8(EightBit):
    """8-bit integers: `round(x / scale)` in [-127, 127].

    On x86 CPUs with 8-bit dot products, of vectors (VNNI) or matrices (AMX), the copy of the weight takes one byte a
    number, packed for a kernel of ours that gathers, quantises, multiplies, scales and scatters in one call; or, where
    it could not be built, or not for the AMX that is there, for oneDNN's quantised linear. Elsewhere, and with
    `copy=False`, which quantises the weight anew for each product, through `torch._int_mm`. The passes around those are
    compiled C where `celora.kernels.c` could be built, else torch operators; float16 on CPU always takes the latter.
    """

    name = "int8"
    _largest = 127.0

    def unavailable(self, out_features: int, in_features: int, device: torch.device) -> str:
        if device.type not in ("cpu", "cuda"):
            return f"there are no int8 products on {device.type}"
        if device.type == "cuda" and in_features % 8:
            return f"int8 products on CUDA need in_features that are a multiple of 8, not {in_features}"
        if self._gathers(device):
            return ""
        if borrow(INT_MM) is None:
            return "this version of torch has no int8 products"
        if device.type == "cpu" and not sums_are_exact():
            return "oneDNN's 8-bit sums overflow as it is limited here (ONEDNN_MAX_CPU_ISA)"
        return ""

    def slow(self, device: torch.device) -> str:
        if device.type != "cpu" or (self.copy and (_gathered_products() or onednn(device))) or not one_by_one():
            return ""
        return "torch has no fast 8-bit products for this CPU, and multiplies number by number"

    def rows(
        self,
        grad_output: Tensor,
        weight: Tensor,
        index: Tensor | None,
        *,
        position: Tensor | None = None,
        factors: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        if self._gathers(weight.device):
            return self._gathered(grad_output, weight, index, position, factors, onto)
        if not library_kernels.supported(grad_output):
            return super().rows(grad_output, weight, index, factors=factors, onto=onto)
        column_scale, unsigned = self._follow(weight), self._unsigned(weight)
        q, scale = rows_kernels.quantise_rows(grad_output, index, offset=OFFSET if unsigned else 0)
        if factors is not None:
            scale = scale * factors.to(scale.dtype)
        y = self._product(q, weight, grad_output.dtype)
        fill = onto is None
        if unsigned and index is None:
            onto = y  # in place: each number is read before it is written
        out = grad_output.new_empty(grad_output.shape[0], weight.shape[1]) if onto is None else onto
        if index is not None and position is None:
            position = _positions(index, len(grad_output))
        if unsigned:
            rows_kernels.scatter_rows(y, position, scale, out, fill=fill)
        else:
            rows_kernels.scatter_sums(y, position, scale, column_scale, out, fill=fill)
        return out

    def critical_rows(
        self,
        grad_output: Tensor,
        weight: Tensor,
        *,
        kept: int | None,
        share: float,
        onto: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        if onto is not None or not (self._gathers(weight.device) and library_kernels.supported(grad_output)):
            return super().critical_rows(grad_output, weight, kept=kept, share=share, onto=onto)
        scale, columns = self._follow(weight), weight.shape[1]
        return dot_kernels.critical_product(grad_output, self._packed, scale, columns=columns, kept=kept, share=share)

    def grain(self, rows: int, device: torch.device) -> int:
        return 1 if self._gathers(device) else super().grain(rows, device)

    def _gathers(self, device: torch.device) -> bool:
        return self.copy and device.type == "cpu" and _gathered_products()

    def _gathered(
        self,
        grad_output: Tensor,
        weight: Tensor,
        index: Tensor | None,
        position: Tensor | None,
        factors: Tensor | None,
        onto: Tensor | None,
    ) -> Tensor:
        column_scale = self._follow(weight)
        g = grad_output if library_kernels.supported(grad_output) else grad_output.float().contiguous()
        if index is not None and position is None:
            position = _positions(index, len(g))
        fill = onto is None
        out = g.new_empty(g.shape[0], weight.shape[1]) if onto is None else onto.to(g.dtype)
        factors = None if factors is None else factors.float()
        dot_kernels.gathered_product(
            g, self._packed, column_scale, out, index=index, position=position, factors=factors, fill=fill
        )
        return out.to(grad_output.dtype)

    def _multiply(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """In torch operators."""
        column_scale, unsigned = self._follow(weight), self._unsigned(weight)
        q, scale = quantise_rows(grad_output, OFFSET if unsigned else 0)
        y = self._product(q, weight, grad_output.dtype).float() * scale[:, None]
        return (y if unsigned else y * column_scale).to(grad_output.dtype)

    def _unsigned(self, weight: Tensor) -> bool:
        return self.copy and onednn(weight.device)

    def _product(self, q: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`q q_W`: with the column scales applied, in bf16 or fp32, if q is unsigned; else the bare int32 sums."""
        assert self._scale is not None
        if self._unsigned(weight):
            half = dtype == torch.bfloat16
            return packed_product(q, self._packed, self._scale, torch.bfloat16 if half else torch.float32)
        return integer_product(q.view(torch.int8), self._quantised(weight, self._scale))

    def _pack(self, weight: Tensor) -> Tensor:
        assert self._scale is not None
        if self._gathers(weight.device):
            weight = weight if library_kernels.supported(weight) else weight.float().contiguous()
            return dot_kernels.pack_columns(weight, 1 / self._scale)
        if onednn(weight.device):
            transposed = quantise_columns(weight, self._scale).t().contiguous()
            packed: Tensor = borrow(PREPACK)(transposed, None)
            return packed
        return column_major(padded(quantise_columns(weight, self._scale), 0))

    def _quantised(self, weight: Tensor, scale: Tensor) -> Tensor:
        if self.copy:
            packed: Tensor = self._packed
            return packed
        q = quantise_columns(weight.detach(), scale)
        return q if q.device.type == "cpu" else column_major(padded(q, 0))


def int8_path(device: torch.device) -> str:
    """What multiplies in 8 bits on this device, and why not something faster; or why nothing does."""
    if reason := Int8().unavailable(16, 16, device):
        return f"none: {reason}"
    if device.type != "cpu":
        return "torch's integer product"
    vectors = "AVX-512 VNNI" if features()["vnni"] else "AVX-VNNI"
    if _gathered_products():
        return f"celora's own kernel, with {'AMX' if dot_kernels.multiplies_matrices() else vectors}"
    lacking = build_kernels.why_not() or (
        "celora's kernel has no AMX here"
        if dot_kernels.panel_columns()
        else "this CPU has no VNNI, which celora's kernel needs"
    )
    if onednn(device):
        return f"oneDNN's quantised linear: {lacking}"
    return f"torch's integer product, {'number by number' if one_by_one() else 'through oneDNN'}: {lacking}"


def _gathered_products() -> bool:
    """Whether our kernel is there, and nothing faster: oneDNN may know matrix instructions where it does not."""
    return dot_kernels.panel_columns() > 0 and dot_kernels.multiplies_matrices() == cpu.matrix_instructions()


def _positions(index: Tensor, rows: int) -> Tensor:
    """The inverse of `index`: where row t went, or -1: (rows,) int32."""
    position = torch.full((rows,), -1, dtype=torch.int32)
    position[index] = torch.arange(len(index), dtype=torch.int32)
    return position
