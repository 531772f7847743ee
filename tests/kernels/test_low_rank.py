"""The skinny products of bfloat16 adapters, in each tier that has them, against double precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from celora.kernels import widened
from celora.kernels.backends import choose
from celora.kernels.c import low_rank as kernels
from celora.kernels.operations import skinny_product, transposed_product
from tiers import LIBRARY, TIERS, Kernels

WITH_PRODUCTS = [tier for tier in TIERS if Kernels(LIBRARY, tier).has("skinny_product_bf16")]  # type: ignore[arg-type]
each_tier = pytest.mark.parametrize("tier", WITH_PRODUCTS, indirect=True)
RANKS = [1, 3, 8, 16, 20, 64]
SHAPES = [(1, 1), (2, 15), (7, 16), (8, 31), (9, 32), (63, 33), (64, 100), (65, 577), (200, 192)]


def drawn(rows: int, columns: int, *, apart: int = 0) -> Tensor:
    """Normal numbers in bfloat16, with rows that are so many numbers apart."""
    return torch.randn(rows, columns + apart).bfloat16()[:, :columns]


def close(found: Tensor, terms: Tensor, before: Tensor | None = None) -> None:
    """Whether it is the sum of `terms` over their second dimension: but for float32 sums, and its own rounding."""
    right, size = terms.sum(1), terms.abs().sum(1)
    if before is not None:
        right, size = right + before, size + before.abs()
    step = torch.finfo(found.dtype).eps / 2 if found.dtype == torch.bfloat16 else 0.0
    sums = terms.shape[1] * torch.finfo(torch.float32).eps
    assert (found.double() - right).abs().le(step * right.abs() * (1 + sums) + sums * size).all()


@each_tier
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rank", RANKS)
def test_skinny_products(rank: int, threads: int, use_threads: Callable[[int], None]) -> None:
    use_threads(threads)
    for tokens, columns in SHAPES:
        x, p = drawn(tokens, columns, apart=3), drawn(tokens, rank)
        for m in (drawn(columns, rank), drawn(rank, columns).t(), drawn(columns, 2 * rank)[:, ::2]):
            found = kernels.skinny_product(x, m, alpha=0.5, onto=None)
            close(found, 0.5 * x.double()[:, :, None] * m.double())
            there = drawn(tokens, columns, apart=5)
            before = there.double()
            found = kernels.skinny_product(p, m.t(), alpha=2.0, onto=there)
            assert found is there
            close(found, 2 * p.double()[:, :, None] * m.t().double(), before)


@each_tier
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rank", RANKS)
def test_transposed_products(rank: int, threads: int, use_threads: Callable[[int], None]) -> None:
    use_threads(threads)
    for tokens, columns in SHAPES:
        p, x = drawn(tokens, rank), drawn(tokens, columns, apart=3)
        in_8_bits = torch.randint(-127, 128, (tokens, columns + 5), dtype=torch.int8)[:, :columns]
        for of_x in (x, in_8_bits, x.t().contiguous().t()):
            close(kernels.transposed_product(p, of_x), p.t().double()[:, :, None] * of_x.double())
    assert kernels.transposed_product(p[:0], x[:0]).equal(torch.zeros(rank, columns))


@each_tier
def test_the_bits_are_those_of_any_number_of_threads(use_threads: Callable[[int], None]) -> None:
    x, m, p = drawn(200, 577), drawn(577, 16), drawn(200, 16)
    found = []
    for threads in (1, 2, 3):
        use_threads(threads)
        found.append((kernels.skinny_product(x, m, alpha=2.0, onto=None), kernels.transposed_product(p, x)))
    assert all(torch.equal(one, first) for pair in found for one, first in zip(pair, found[0], strict=True))


@each_tier
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_belongs(bad: float) -> None:
    """Nothing that lies beside a row, a column or the last token comes into a sum."""
    x, m, p = drawn(9, 33, apart=3), drawn(33, 5), drawn(9, 5, apart=1)
    x._base[:, 33:] = p._base[:, 5:] = bad  # type: ignore[index]
    assert kernels.skinny_product(x, m, alpha=1.0, onto=None).isfinite().all()
    assert kernels.transposed_product(p, x).isfinite().all()
    x[4, 7] = bad
    assert kernels.skinny_product(x, m, alpha=1.0, onto=None).isfinite().all(1).tolist() == [t != 4 for t in range(9)]
    assert kernels.transposed_product(p, x).isfinite().all(0).tolist() == [i != 7 for i in range(33)]


@each_tier
def test_the_kernels_are_used_for_plain_bfloat16_alone() -> None:
    assert choose("skinny_product", drawn(4, 8)).name == "c"
    assert choose("skinny_product", drawn(4, 8).float()).name != "c"
    others = "float32" if widened.takes(drawn(4, 8)) else "torch"
    assert choose("skinny_product", drawn(8, 4).t()).name == others
    assert choose("transposed_product", torch.nn.Parameter(drawn(4, 8))).name == others


@each_tier
def test_other_layouts_and_dtypes_are_torchs() -> None:
    x, m, p = drawn(9, 33), drawn(33, 5), drawn(9, 5)
    there = drawn(33, 9).t()
    before = there.double()
    close(kernels.skinny_product(p, m.t(), alpha=1.0, onto=there), p.double()[:, :, None] * m.t().double(), before)
    for wrong in (m.float(), m[1:]):
        with pytest.raises(RuntimeError):
            kernels.skinny_product(x, wrong, alpha=1.0, onto=None)
    with pytest.raises(RuntimeError):
        kernels.skinny_product(p, m.t(), alpha=1.0, onto=there.float())
    with pytest.raises(RuntimeError):
        kernels.transposed_product(p, x[1:])
    assert kernels.transposed_product(p, x.float()).equal(p.t() @ x)


@each_tier
def test_autograd_sees_that_a_tensor_was_changed() -> None:
    there = drawn(4, 8)
    before = there._version
    kernels.skinny_product(drawn(4, 2), drawn(2, 8), alpha=1.0, onto=there)
    assert there._version == before + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_backend(dtype: torch.dtype) -> None:
    x, m, p, there = (drawn(*shape).to(dtype) for shape in ((9, 33), (33, 5), (9, 5), (9, 33)))
    tolerance = {"rtol": 1e-2, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    expected = 2 * x.double() @ m.double()
    torch.testing.assert_close(skinny_product(x, m, alpha=2.0).double(), expected, **tolerance)
    expected = there.double() + p.double() @ m.double().t()
    torch.testing.assert_close(skinny_product(p, m.t(), onto=there).double(), expected, **tolerance)
    q = torch.randint(-127, 128, (9, 33), dtype=torch.int8)
    for of_x in (x, q):
        found = transposed_product(p, of_x).double()
        torch.testing.assert_close(found, p.double().t() @ of_x.double(), rtol=1e-2, atol=2.0 if of_x is q else 0.1)
