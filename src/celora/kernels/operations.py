"""The operations that estimators and passes ask for, each by the fastest backend that supports its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from celora.kernels.c import library as library_kernels
from celora.kernels.c import rows as rows_kernels


def quantise_columns(weight: Tensor, scale: Tensor) -> Tensor:
    inverse = 1 / scale
    if library_kernels.supported(weight):
        return rows_kernels.quantise_columns(weight, inverse)
    return (weight.float() * inverse).round().to(torch.int8)


def column_maxima(x: Tensor) -> Tensor:
    """`max_t |x[t, i]|` of `x: (T, n)`: (n,) float32. The cheapest measure of a column there is."""
    return rows_kernels.column_maxima(x) if library_kernels.supported(x) else x.abs().amax(0).float()


def squared_row_norms(grad_output: Tensor) -> Tensor:
    """`||G[t, :]||^2` for `G: (T, out)`, in fp32 at least: (T,)."""
    if library_kernels.supported(grad_output):
        return rows_kernels.squared_row_norms(grad_output)
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(grad_output, dim=1, dtype=dtype)
    return norms.square()
