"""The tall and skinny products of a LoRA adapter in bfloat16, by AVX-512 with BF16 (low_rank.c).

In and out: as `skinny_product` and `transposed_product` of `kernels.operations`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from celora.kernels import plain
from celora.kernels.c.library import call_kernel, library, supported, up_to

_VECTOR = 16  # columns
_ROWS = 64  # of x and of p that are interleaved at a time


def takes(tensor: Tensor) -> bool:
    """Whether the kernels multiply with this tensor: plain bfloat16 on a CPU whose tier has them."""
    if tensor.dtype != torch.bfloat16 or type(tensor) is not Tensor or not supported(tensor):
        return False
    loaded = library()
    return loaded is not None and loaded.has("skinny_product_bf16")


def skinny_product(x: Tensor, m: Tensor, *, alpha: float, onto: Tensor | None) -> Tensor:
    (rows, depth), columns = x.shape, m.shape[1]
    out = x.new_empty(rows, columns) if onto is None else onto
    if out.stride(1) != 1 or (out.dtype, *out.shape, m.dtype, len(m)) != (x.dtype, rows, columns, x.dtype, depth):
        return plain.skinny_product(x, m, alpha=alpha, onto=onto)  # it takes any layout, and says what does not match
    m = m if 1 in m.stride() else m.contiguous()
    pairs = torch.empty(up_to(columns, _VECTOR) * up_to(depth, 2), dtype=torch.bfloat16, device="cpu")
    call_kernel("skinny_product", x, x.data_ptr(), rows, depth, x.stride(0), m.data_ptr(), *m.stride(), columns, alpha,
          onto is not None, out.data_ptr(), out.stride(0), pairs.data_ptr())  # fmt: skip
    if onto is not None:
        torch.autograd.graph.increment_version(onto)
    return out


def transposed_product(p: Tensor, x: Tensor) -> Tensor:
    (tokens, rank), columns = p.shape, x.shape[1]
    if len(x) != tokens or x.dtype not in (p.dtype, torch.int8):
        return plain.transposed_product(p, x)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.zeros(rank, columns, dtype=torch.float32, device="cpu")
    numbers = _ROWS * (up_to(columns, 2 * _VECTOR) + torch.get_num_threads() * up_to(rank, _VECTOR))
    pairs = torch.empty(numbers, dtype=torch.bfloat16, device="cpu")
    call_kernel("transposed_product", p, p.data_ptr(), tokens, rank, p.stride(0), x.data_ptr(), x.dtype == torch.int8,
          columns, x.stride(0), out.data_ptr(), pairs.data_ptr())  # fmt: skip
    return out
