"""8-bit floats (e4m3, largest 448) by `torch._scaled_mm`, on GPUs that multiply them; a CPU emulates them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from celora.borrowed import borrow
from celora.kernels.packed import PackedWeight
from celora.kernels.plain import blocks, column_major, divisor, padded, wrong_product

SCALED_MM = "torch:_scaled_mm"
LARGEST = 448.0
LEAST = (8, 9)  # compute capability


class ScaledFloats(PackedWeight):
    """A weight for `torch._scaled_mm`, with scales of its columns."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        self.q, self.scale = q, scale

    @classmethod
    def pack(cls, weight: Tensor, scale: Tensor) -> ScaledFloats:
        q = padded(quantise_columns(weight, scale).view(torch.int8), 0)  # a zero has the same bits
        return cls(column_major(q).view(torch.float8_e4m3fn), scale)

    def rows(
        self,
        x: Tensor,
        index: Tensor | None,
        *,
        position: Tensor | None,
        onto: Tensor | None,
    ) -> Tensor:
        kept = x if index is None else x.index_select(0, index)
        scale = divisor(torch.linalg.vector_norm(kept, float("inf"), dim=1).float() / LARGEST)
        q = padded(kept.float() / scale[:, None], 1)
        y: Tensor = borrow(SCALED_MM)(
            q.to(torch.float8_e4m3fn, memory_format=torch.contiguous_format),  # row by row, whatever the order of x
            self.q,
            scale_a=scale[:, None],
            scale_b=self.scale[None],
            out_dtype=torch.bfloat16,
        )
        y = y.to(x.dtype)
        if index is None:
            return y
        out = x.new_zeros(len(x), y.shape[1]) if onto is None else onto
        return out.index_copy_(0, index, y)


def quantise_columns(weight: Tensor, scale: Tensor) -> Tensor:
    """`weight / scale` of `weight: (out, in)`, `scale: (in,)`, in e4m3."""
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for part in blocks(weight):  # no float32 copy of a large weight
        q[part] = (weight[part].float() / scale).to(q.dtype)
    return q


def has_floats(device: torch.device) -> bool:
    """Whether the device has them: of GPUs, NVIDIA's of compute capability `LEAST` and above."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= LEAST


def why_not(device: torch.device) -> str:
    """Why torch's product of 8-bit floats cannot be used on this device, or ''."""
    if device.type not in ("cpu", "cuda"):
        return f"there are no fp8 products on {device.type}"
    if not has_floats(device):
        return "fp8 products need an NVIDIA GPU of compute capability 8.9 or above; use int8"
    if borrow(SCALED_MM) is None:
        return "this version of torch has no fp8 products"
    if not _takes_scales(device):
        return f"this version of torch has no fp8 products with scales of rows and columns on {device.type}"
    return ""


def takes(device: torch.device) -> bool:
    return not why_not(device)


def slow(device: torch.device) -> str:
    """Why they cannot pay on this device, or ''."""
    return "fp8 is emulated on a CPU" if device.type == "cpu" else ""


@functools.cache
def _takes_scales(device: torch.device) -> bool:
    """Whether the device multiplies with a scale for each row and column: a CPU of torch 2.11 takes one for all."""

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        scale_a, scale_b = torch.ones(len(a), 1, device=device), torch.ones(1, b.shape[1], device=device)
        y: Tensor = borrow(SCALED_MM)(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)
        return y

    return not wrong_product(multiply, torch.float8_e4m3fn, device, 7)
