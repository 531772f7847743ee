"""8-bit floats. Every estimator that computes such a product does it through this class, as with `int8`."""

from __future__ import annotations

import torch
from torch import Tensor

from celora.kernels.floats import LARGEST
from celora.kernels.operations import pack_floats
from celora.kernels.packed import PackedWeight
from celora.numerics.products.eight_bit import EightBit


class Fp8Product(EightBit):
    """8-bit floats (e4m3, largest 448): fast on GPUs of compute capability 8.9 and above. On CPU it works, and is slow.

    Which backend packs the weight and multiplies is the table's choice (`celora.kernels.operations`).
    """

    name = "fp8"
    _largest = LARGEST
    operation = "pack_floats"

    def unavailable(self, out_features: int, in_features: int, device: torch.device) -> str:
        if in_features % 16:
            return f"fp8 products need in_features that are a multiple of 16, not {in_features}"
        return super().unavailable(out_features, in_features, device)

    def _pack(self, weight: Tensor, scale: Tensor) -> PackedWeight:
        return pack_floats(weight, scale)
