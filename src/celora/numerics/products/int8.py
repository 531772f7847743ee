"""The arithmetic of `grad_output @ W` in 8-bit integers, with one scale per row and column.

In: `grad_output: (T, out)`, the weight `(out, in)`, and which rows are kept. Out: `grad_input: (T, in)`. A packed copy
of the weight multiplies; `celora.kernels.operations` decides which backend packs it.

Every estimator multiplies through a `Product`, so 8 bits compose with all of them:

    G ~= s_G q_G,   W ~= q_W s_W,      G W ~= s_G (q_G q_W) s_W,

`s_G: (T, 1)` has one scale per token, `s_W: (1, in)` one per input column; both are outside the sum over `out`.
Source: symmetric absmax quantisation as in LLM.int8 (arXiv 2208.07339), here for the backward's only frozen operand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from celora.kernels.backends import available, choose
from celora.kernels.operations import hold_both_ways, pack_weight, quantise_weight
from celora.kernels.packed import BothWays, PackedWeight
from celora.numerics.products.eight_bit import EightBit
from celora.weights.stored import StoredWeight

_LONGEST = (2**31 - 1) // 127**2  # the longest sum of products that 32 bits can never overflow in


def stored_bytes(weight: Tensor) -> BothWays | None:
    """The packed weight that multiplies with the stored bytes of a quantised weight; None if none can, or is fast."""
    if not isinstance(weight, StoredWeight):
        return None
    packed: BothWays | None = weight.packed
    if packed is None and available("hold_both_ways", weight.device) and (integers := weight.integers) is not None:
        return hold_both_ways(*integers)
    return packed


class Int8Product(EightBit):
    """8-bit integers: `round(x / scale)` in [-127, 127].

    The copy of the weight takes one byte a number. The table in `celora.kernels.operations` chooses the backend that
    packs it and multiplies. With `copy=False` the weight is quantised again for each product.
    """

    name = "int8"
    _largest = 127.0

    def unavailable(self, out_features: int, in_features: int, device: torch.device) -> str:
        if out_features > _LONGEST:
            return f"int8 sums of more than {_LONGEST:,} products overflow 32 bits"
        if device.type == "cuda" and in_features % 8:
            return f"int8 products on CUDA need in_features that are a multiple of 8, not {in_features}"
        return super().unavailable(out_features, in_features, device)

    def critical_rows(
        self,
        grad_output: Tensor,
        weight: Tensor,
        *,
        kept: int | None,
        share: float,
        onto: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        if onto is None and self.copy:
            found = self._multiplied_with(weight).critical_rows(grad_output, kept=kept, share=share)
            if found is not None:
                return found
        return super().critical_rows(grad_output, weight, kept=kept, share=share, onto=onto)

    def grain(self, rows: int, device: torch.device) -> int:
        any_rows = available(self.operation, device) and choose(self.operation, device).any_rows
        return 1 if any_rows else super().grain(rows, device)

    @property
    def operation(self) -> str:
        return "pack_weight" if self.copy else "quantise_weight"

    def _multiplied_with(self, weight: Tensor) -> PackedWeight:
        """The bytes of a base in 8 bits, or the weight in 8 bits."""
        own = stored_bytes(weight)
        return super()._multiplied_with(weight) if own is None else own

    def _pack(self, weight: Tensor, scale: Tensor) -> PackedWeight:
        return pack_weight(weight, scale) if self.copy else quantise_weight(weight, scale)
