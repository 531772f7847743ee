"""torch's operators: which of its products can be used on a device, and what they need for a moment."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from celora.kernels import plain
from celora.kernels.backends import explain
from patching import patch_all

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def in_whole_numbers(a: Tensor, b: Tensor) -> Tensor:
    """What `torch._int_mm` gives where it is right."""
    assert b.stride() == (1, 64)  # as GPUs want their second operand
    return (a.long() @ b.long()).int()


def fails(a: Tensor, b: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED\nCUDA kernel errors might be reported later")


@pytest.mark.parametrize(
    ("multiply", "said"),
    [
        (in_whole_numbers, ""),
        (lambda a, b: in_whole_numbers(a, b).clamp(max=2**15 - 1), "is wrong on this device"),
        (fails, "fails on this device: CUDA error: CUBLAS_STATUS_NOT_SUPPORTED"),
    ],
)
def test_a_product_is_tried_before_it_is_used(multiply: Callable[[Tensor, Tensor], Tensor], said: str) -> None:
    assert plain.wrong_product(multiply, torch.int8, CPU, 127) == said


def test_no_memory_for_a_trial_says_nothing_about_a_product() -> None:
    def full(a: Tensor, b: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        plain.wrong_product(full, torch.int8, CPU, 127)


def test_a_gpu_that_fails_the_trial_has_no_products_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.kernels.plain:wrong_integers", lambda device: "is wrong on this device")
    assert not plain.takes_integers(GPU)
    assert explain("pack_weight", GPU) == "none: torch's int8 product is wrong on this device"
