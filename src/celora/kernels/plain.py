"""8-bit arithmetic by torch's own operators, on any device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from celora.borrowed import borrow
from celora.machine.timing import interleaved

INT_MM = "torch:_int_mm"


@functools.cache
def sums_are_exact() -> bool:
    """Whether 8-bit products on CPU are summed without overflow: kept below VNNI, oneDNN sums pairs in 16 bits."""
    most = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
    return bool((borrow(INT_MM)(most, most.t().contiguous()) == 64 * 127**2).all())


@functools.cache
def one_by_one() -> bool:
    """Whether `torch._int_mm` on CPU is a loop over single numbers, as without fast instructions: 20 times as slow as
    float32's product and more, where it would be twice as fast or, at worst, about as fast."""
    integers = borrow(INT_MM)
    if integers is None:
        return True
    whole = torch.ones(64, 512, device="cpu"), torch.ones(512, 512, device="cpu")
    bits = tuple(x.to(torch.int8) for x in whole)
    times = interleaved({"bits": lambda: integers(*bits), "whole": lambda: torch.mm(*whole)}, repeats=3)
    return times["bits"]["time_ms"] > 4 * times["whole"]["time_ms"]


def integer_product(q: Tensor, weight: Tensor) -> Tensor:
    rows = len(q)
    if q.shape[1] < len(weight):
        q = padded(q, 1)
    if q.device.type == "cuda" and rows <= 16:  # what its kernels refuse
        q = torch.cat([q, q.new_zeros(32 - rows, q.shape[1])])
    y: Tensor = borrow(INT_MM)(q, weight)
    return y[:rows]


def quantise_rows(x: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """`kernels.quantise_rows` in torch operators."""
    scale = divisor(torch.linalg.vector_norm(x, float("inf"), dim=1).float() / 127)
    q = (x.float() / scale[:, None]).round() + offset
    return q.to(torch.uint8 if offset else torch.int8), scale


def padded(x: Tensor, dim: int) -> Tensor:
    """`x` with zeros at the end of dimension `dim`, the one that a product sums over.

    Kernels of GPUs want a multiple of 16, and `columns` keeps any number.
    """
    missing = -x.shape[dim] % 16
    return nn.functional.pad(x, (0, 0, 0, missing) if dim == 0 else (0, missing)) if missing else x


def column_major(q: Tensor) -> Tensor:
    """`(out, in)` laid out as GPUs want their second operand."""
    return q.t().contiguous().t()


def divisor(scale: Tensor) -> Tensor:
    """At least the smallest normal number: smaller ones are too coarse to divide by. A NaN stays one."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)
