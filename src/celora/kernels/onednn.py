"""8-bit products by oneDNN, which torch carries."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from celora.borrowed import borrow
from celora.machine.cpu import features

PREPACK = "torch:ops.onednn.qlinear_prepack"
_QLINEAR = "torch:ops.onednn.qlinear_pointwise"
OFFSET = 128  # the zero point of unsigned activations


def onednn(device: torch.device) -> bool:
    """Whether oneDNN has a fast quantised linear here. Unsigned activations: signed ones can meet a reference kernel
    that takes a hundred times as long."""
    return device.type == "cpu" and _dot_products() and None not in (borrow(PREPACK), borrow(_QLINEAR))


def _dot_products() -> bool:
    return features()["vnni"]


def packed_product(q: Tensor, packed: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    zero_points = _zero_points(column_scale.shape[0])
    y: Tensor = borrow(_QLINEAR)(q, 1.0, OFFSET, packed, column_scale, zero_points, None, 1.0, 0, dtype, "none", [], "")
    return y


@functools.lru_cache(maxsize=64)
def _zero_points(columns: int) -> Tensor:
    return torch.zeros(columns, dtype=torch.int32)
