"""Products of bfloat16 and float16 in float32: against float64, to one rounding of the result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from celora.kernels import plain, widened
from celora.kernels.backends import choose
from patching import patch_all

HALVES = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.parametrize("dtype", HALVES)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU multiplies neither dtype. Weights and tokens come in several parts."""
    patch_all(monkeypatch, "celora.machine.cpu:multiplies", lambda dtype: False)
    monkeypatch.setattr(widened, "_ROWS", 7)
    monkeypatch.setattr(widened, "_NUMBERS", 5 * 13)
    monkeypatch.setattr(widened, "_MANY", 1)


def once_rounded(found: Tensor, exact: Tensor, terms: Tensor, count: int) -> None:
    """`found` is `exact`, rounded to its dtype; float32 has summed `count` numbers with `terms` as their magnitudes."""
    ulp = torch.finfo(found.dtype).eps * exact.abs() + torch.finfo(found.dtype).smallest_normal
    assert bool(((found.double() - exact).abs() <= ulp / 2 + 2 * count * torch.finfo(torch.float32).eps * terms).all())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(19, 13), (2, 3, 13), (1, 13)])
@pytest.mark.parametrize("turned", [False, True])
def test_linear(dtype: torch.dtype, bias: bool, shape: tuple[int, ...], turned: bool) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn((13, 11) if turned else (11, 13)).to(dtype)
    weight, b = weight.t() if turned else weight, torch.randn(11).to(dtype) if bias else None
    added = torch.zeros(11).double() if b is None else b.double()
    expected = x.double() @ weight.double().t() + added
    terms = x.double().abs() @ weight.double().abs().t() + added.abs()
    y = widened.linear(x, weight, b)
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    once_rounded(y, expected, terms, 14)
    if len(shape) == 2:
        into = torch.full((shape[0], 14), 7.0).to(dtype)
        part = into[:, 2:13]
        assert widened.linear(x, weight, b, out=part) is part
        assert part.equal(y)
        assert bool((into[:, [0, 1, 13]] == 7).all())


@pytest.mark.parametrize("alpha", [1.0, -0.37])
@pytest.mark.parametrize("added", [False, True])
def test_skinny_products(dtype: torch.dtype, alpha: float, added: bool) -> None:
    for depth, columns in ((17, 3), (3, 17)):
        x, m = torch.randn(15, depth).to(dtype), torch.randn(depth, columns).to(dtype)
        onto = torch.randn(15, columns).to(dtype) if added else None
        before = torch.zeros(15, columns).double() if onto is None else onto.double()
        expected, terms = before + alpha * x.double() @ m.double(), before.abs() + x.double().abs() @ m.double().abs()
        y = widened.skinny_product(x, m, alpha=alpha, onto=onto)
        assert y.dtype == dtype
        assert onto is None or y is onto
        once_rounded(y, expected, terms, depth + 2)


def test_something_is_added_onto_a_result_with_a_gradient(dtype: torch.dtype) -> None:
    onto = torch.zeros(15, 6, dtype=dtype) + torch.ones(6, dtype=dtype, requires_grad=True)
    p, A = torch.ones(15, 4, dtype=dtype), torch.ones(4, 6, dtype=dtype)
    assert bool((widened.skinny_product(p, A, alpha=2.0, onto=onto) == 9).all())


def test_transposed_products_stay_in_float32(dtype: torch.dtype) -> None:
    p = torch.randn(23, 3).to(dtype)
    for x in (torch.randn(23, 17).to(dtype), torch.randint(-128, 128, (23, 17), dtype=torch.int8)):
        y = widened.transposed_product(p, x)
        assert y.dtype == torch.float32
        once_rounded(y, p.double().t() @ x.double(), p.double().abs().t() @ x.double().abs(), 23)


def test_numbers_that_are_not_finite_stay_so(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 1.0], [1.0, 1.0]]).to(dtype)
    for y in (widened.linear(x, torch.ones(3, 2).to(dtype)), widened.skinny_product(x, x.t(), alpha=1, onto=None)):
        assert y.isfinite().all(1).tolist()[:2] == [False, False]
    assert widened.linear(x, torch.ones(3, 2).to(dtype))[2].tolist() == [2, 2, 2]
    # What the memory of a new result holds must not be added to it.
    y = widened.skinny_product(torch.zeros(64, 2).to(dtype), torch.ones(2, 64).to(dtype), alpha=1, onto=None)
    assert bool((y == 0).all())


def test_only_such_tensors_on_such_a_cpu_are_taken(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3).to(dtype)
    for there in (True, False):
        patch_all(monkeypatch, "celora.machine.cpu:multiplies", lambda dtype, there=there: there)
        assert widened.takes(x) is not there
        assert widened.takes(torch.nn.Parameter(x)) is not there
        assert (choose("linear", x).name == "float32") is not there
        for other in (x.float(), x.double(), x.to("meta"), x.view(torch.int16)):
            assert not widened.takes(other)


def test_the_same_as_torch_s_operators_but_for_the_order_of_sums(dtype: torch.dtype) -> None:
    x, weight = torch.randn(9, 33).to(dtype), torch.randn(20, 33).to(dtype)
    expected = plain.linear(x, weight, None, out=None)
    torch.testing.assert_close(widened.linear(x, weight), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)
