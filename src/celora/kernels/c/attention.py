"""Causal attention in C (attention.c). In and out: as the operations of `kernels.operations`, whose names they have."""

from __future__ import annotations

import torch
from torch import Tensor

from celora.kernels.c.library import ask_kernel, call_kernel, library


def takes(device: torch.device) -> bool:
    """Whether there is `attention` on this device."""
    return device.type == "cpu" and library() is not None


def attention(query: Tensor, key: Tensor, value: Tensor, sequences: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, size = query.shape
    out = query.new_empty(batch, tokens, heads, size)
    logs = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    strides, work = _strides(query, key, value), _attention_work(sequences, size, backward=False)
    call_kernel("attention", query, query.data_ptr(), key.data_ptr(), value.data_ptr(), strides.data_ptr(),
          sequences.data_ptr(), len(sequences), tokens, heads, heads // key.shape[1], size, scale, work.data_ptr(),
          work.shape[1], out.data_ptr(), logs.data_ptr())  # fmt: skip
    return out, logs


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logs: Tensor,
    sequences: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, size = query.shape
    found = tuple(t.new_empty(batch, tokens, t.shape[1], size) for t in (query, key, value))
    strides, work = _strides(query, key, value, grad.transpose(1, 2)), _attention_work(sequences, size, backward=True)
    call_kernel("attention_backward", query, query.data_ptr(), key.data_ptr(), value.data_ptr(), grad.data_ptr(),
          strides.data_ptr(), sequences.data_ptr(), len(sequences), tokens, heads, heads // key.shape[1], size, scale,
          work.data_ptr(), work.shape[1], out.data_ptr(), logs.data_ptr(), *(t.data_ptr() for t in found))  # fmt: skip
    of_query, of_key, of_value = (t.transpose(1, 2) for t in found)
    return of_query, of_key, of_value


def _strides(*tensors: Tensor) -> Tensor:
    """How far batches, heads and tokens are apart in each of `tensors: (B, H, T, d)`: (n, 3)."""
    return torch.tensor([t.stride()[:3] for t in tensors], device="cpu")


def _attention_work(sequences: Tensor, size: int, *, backward: bool) -> Tensor:
    """Memory for each thread to work in: (threads, bytes)."""
    each = ask_kernel("attention_work", int(sequences[:, 2].max()), size, backward)
    return torch.empty(torch.get_num_threads(), each, dtype=torch.uint8, device="cpu")
