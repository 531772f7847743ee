"""oneDNN's float32 products: what they give, and which tensors they take. Its 8-bit ones are in test_products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from celora.borrowed import borrow
from celora.kernels import onednn
from patching import patch_all

pytestmark = pytest.mark.skipif(borrow(onednn._LINEAR) is None, reason="torch has no float32 linear of oneDNN here")


def close(found: Tensor, expected: Tensor, terms: int) -> None:
    """A sum of so many float32 terms, against the one in float64."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6 * terms**0.5)


@pytest.mark.parametrize("lead", [(1,), (7,), (3, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer(lead: tuple[int, ...], bias: bool) -> None:
    x, w, b = torch.randn(*lead, 33), torch.randn(20, 33), torch.randn(20) if bias else None
    expected = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    close(onednn.linear(x, w, b), expected, 33)
    close(onednn.linear(x, w.t().contiguous().t(), b), expected, 33)
    out = torch.empty(*lead, 20)
    assert onednn.linear(x, w, b, out=out) is out
    close(out, expected, 33)


def test_layouts_that_are_not_contiguous() -> None:
    w = torch.randn(20, 33)
    for x in (torch.randn(33, 8).t(), torch.randn(1, 33).expand(8, 33), torch.randn(16, 40)[::2, 3:36]):
        close(onednn.linear(x, w), x.double() @ w.double().t(), 33)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_products_of_an_adapter(alpha: float) -> None:
    x, A, p = torch.randn(9, 33), torch.randn(4, 33), torch.randn(9, 4)
    close(onednn.skinny_product(x, A.t(), alpha=alpha, onto=None), alpha * x.double() @ A.double().t(), 33)
    onto = torch.randn(9, 33)
    expected = onto.double() + alpha * p.double() @ A.double()
    assert onednn.skinny_product(p, A, alpha=alpha, onto=onto) is onto
    close(onto, expected, 4)
    close(onednn.transposed_product(p, x), p.double().t() @ x.double(), 9)
    q = torch.randint(-127, 128, (9, 33), dtype=torch.int8)
    close(onednn.transposed_product(p, q), p.double().t() @ q.double(), 9 * 127**2)


def calls(patch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The operands of each product from now on."""
    before, multiply, seen = borrow, borrow(onednn._LINEAR), []

    def multiplied(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        seen.append((x, weight))
        return multiply(x, weight, *rest)

    patch_all(patch, "celora.borrowed:borrow", lambda name: multiplied if name == onednn._LINEAR else before(name))
    return seen


def test_second_operands_that_are_not_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's reference kernel takes a thousand times as long with them."""
    seen = calls(monkeypatch)
    p, wide, row = torch.randn(9, 4), torch.randn(9, 50), torch.randn(1, 33)
    for x in (wide[:, 3:36], row.expand(9, 33)):
        close(onednn.transposed_product(p, x), p.double().t() @ x.double(), 9)
    close(onednn.linear(p, wide[:, :4]), p.double() @ wide[:, :4].double().t(), 4)
    assert len(seen) == 3
    assert all(weight.is_contiguous() or weight.t().is_contiguous() for _, weight in seen)


def test_many_rows_are_added_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    p, A, onto = torch.randn(2 * onednn._ROWS + 5, 4), torch.randn(4, 6), torch.randn(2 * onednn._ROWS + 5, 6)
    expected = onto.double() + p.double() @ A.double()
    close(onednn.skinny_product(p, A, alpha=1.0, onto=onto), expected, 4)
    assert [len(x) for x, _ in seen] == [onednn._ROWS, onednn._ROWS, 5]


def test_something_is_added_onto_a_result_with_a_gradient() -> None:
    onto = torch.zeros(5, 6) + torch.ones(6, requires_grad=True)
    p, A = torch.randn(5, 4), torch.randn(4, 6)
    close(onednn.skinny_product(p, A, alpha=2.0, onto=onto).detach(), 1 + 2 * p.double() @ A.double(), 4)


def test_numbers_that_are_not_finite_stay_so() -> None:
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 1.0], [1.0, 1.0]])
    y = onednn.linear(x, torch.ones(3, 2))
    assert y.isnan().any(1).tolist() == [True, False, False]
    assert y.isinf().any(1).tolist() == [False, True, False]


def test_only_float32_on_such_a_cpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3)
    for there in (True, False):
        patch_all(monkeypatch, "celora.machine.cpu:wider_than_mkl", lambda there=there: there)
        assert onednn.takes_floats(x) is there
        assert onednn.takes_floats(torch.nn.Parameter(x)) is there
        for other in (x.bfloat16(), x.double(), x[:0], x.to("meta")):
            assert not onednn.takes_floats(other)
