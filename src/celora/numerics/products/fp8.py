"""8-bit floats, on GPUs that multiply them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from celora.borrowed import borrow
from celora.kernels.plain import column_major, divisor, padded
from celora.numerics.products.eight_bit import EightBit

_SCALED_MM = "torch:_scaled_mm"


class Fp8(EightBit):
    """8-bit floats (e4m3, largest 448) through `torch._scaled_mm`: fast on GPUs of compute capability 8.9 and above.

    It also works on a CPU, slowly.
    """

    name = "fp8"
    _largest = 448.0

    def unavailable(self, out_features: int, in_features: int, device: torch.device) -> str:
        if device.type not in ("cpu", "cuda"):
            return f"there are no fp8 products on {device.type}"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            return "fp8 products need a GPU of compute capability 8.9 or above; use int8"
        if borrow(_SCALED_MM) is None:
            return "this version of torch has no fp8 products"
        if in_features % 16:
            return f"fp8 products need in_features that are a multiple of 16, not {in_features}"
        if device.type == "cpu" and not _cpu_takes_scales():
            return "this version of torch has no fp8 products with scales of rows and columns on cpu"
        return ""

    def slow(self, device: torch.device) -> str:
        return "fp8 is emulated on a CPU" if device.type == "cpu" else ""

    def _multiply(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        column_scale = self._follow(weight)
        scale = divisor(torch.linalg.vector_norm(grad_output, float("inf"), dim=1).float() / self._largest)
        y: Tensor = borrow(_SCALED_MM)(
            padded(grad_output.float() / scale[:, None], 1).to(torch.float8_e4m3fn),
            self._packed if self.copy else self._pack(weight.detach()),
            scale_a=scale[:, None],
            scale_b=column_scale[None],
            out_dtype=torch.bfloat16,
        )
        return y.to(grad_output.dtype)

    def _pack(self, weight: Tensor) -> Tensor:
        assert self._scale is not None
        return column_major(padded(weight.float() / self._scale, 0).to(torch.float8_e4m3fn))


@functools.cache
def _cpu_takes_scales() -> bool:
    """Whether the CPU's product takes a scale for each row and column. With torch 2.11 it takes one for all."""
    ones, scale = torch.ones(16, 16, device="cpu").to(torch.float8_e4m3fn), torch.ones(16, device="cpu")
    multiply = functools.partial(borrow(_SCALED_MM), out_dtype=torch.bfloat16)
    try:
        multiply(ones, column_major(ones), scale_a=scale[:, None], scale_b=scale[None])
    except RuntimeError:
        return False
    return True
