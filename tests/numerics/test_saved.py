"""Activations that are saved for backward in 8 bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from celora.kernels.c import library as kernels
from celora.numerics.passes import gated, rms_norm
from celora.numerics.saved import Saving, quantise, rounded_input
from without import without

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("backend", ["any", "torch"])
def test_rows_are_off_by_half_a_step(dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "torch":
        without(monkeypatch, "c")
    whole = torch.randn(2, 9, 4, 8).to(dtype)
    for x in (whole[0, 0], whole, whole.transpose(1, 2)[:, :, 2:5]):
        saving = Saving(dtype, in_8_bits=True)
        q, scale = saving.save(x)
        assert (q.dtype, q.shape, scale.shape) == (torch.int8, x.shape, (*x.shape[:-1], 1))
        (restored,) = saving.restore(q, scale)
        assert (restored.dtype, restored.shape) == (dtype, x.shape)
        step = x.float().abs().amax(-1, keepdim=True) / 127
        rounding = 2 * torch.finfo(dtype).eps * x.float().abs()  # of the scale and of the product
        assert ((restored.float() - x.float()).abs() <= 0.5001 * step + rounding).all()


def test_without_8_bits_the_tensors_themselves_are_saved() -> None:
    x, y = torch.randn(2, 3, 4)
    saving = Saving(x.dtype, in_8_bits=False)
    assert saving.save(x, y)[1] is y
    assert saving.restore(x, y)[0] is x


def test_zeros_stay_and_what_is_not_finite_is_not_hidden() -> None:
    x = torch.randn(4, 6)
    x[0], x[1, 2], x[2, 3] = 0, float("nan"), float("inf")
    q, scale = quantise(x)
    (restored,) = Saving(x.dtype, in_8_bits=True).restore(q, scale)
    assert (restored[0] == 0).all()
    assert restored.isfinite().all(1).tolist() == [True, False, False, True]


def gradients(function: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, ...]:
    """The function's result for these arguments, and their gradients for a fixed random gradient of the result."""
    given = tuple(t.detach().requires_grad_() for t in given)
    y = function(*given)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, given, grad)


@pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_compute_the_same_and_their_gradients_from_what_was_saved(dtype: torch.dtype) -> None:
    x, up, weight = (torch.randn(shape).to(dtype) for shape in ((5, 7, 48), (5, 7, 48), (48,)))

    def in_8_bits(t: Tensor) -> Tensor:
        saving = Saving(dtype, in_8_bits=True)
        return saving.restore(*saving.save(t))[0]

    result, *found = gradients(lambda x, up: gated(x, up, in_8_bits=True), x, up)
    assert result.equal(gated(x, up))
    _, *expected = gradients(gated, in_8_bits(x), in_8_bits(up))
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))

    result, found_x = gradients(lambda x: rms_norm(x, weight, 1e-6, in_8_bits=True), x)
    exactly, of_x = gradients(lambda x: rms_norm(x, weight, 1e-6), x)
    assert result.equal(exactly)
    assert 0 < (found_x - of_x).norm() < 0.01 * of_x.norm()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_an_input_is_rounded_once_for_the_gradients_of_all_that_read_it(dtype: torch.dtype) -> None:
    x, p = torch.randn(3, 40, 16).to(dtype), torch.randn(120, 4).to(dtype)
    rows = rounded_input(x)
    assert rounded_input(x) is rows
    assert rounded_input(x.clone()) is not rows
    (restored,) = Saving(torch.float64, in_8_bits=True).restore(rows.q, rows.scale[:, None])
    step = x.double().abs().amax(-1, keepdim=True).view(-1, 1) / 127
    assert ((restored - x.double().view(120, 16)).abs() <= 0.5001 * step).all()
    found, expected = rows.transposed_product(p, None), p.double().t() @ restored
    precision = max(torch.finfo(dtype).eps, 1e-6)
    assert (found.double() - expected).norm() < precision * expected.norm()
