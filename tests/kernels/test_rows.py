"""The compiled passes of each tier give the same results as torch's operators. Skipped without a compiler."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from celora.errors import CELoraError
from celora.kernels.c import library as library_module
from celora.kernels.c import rows as kernels
from celora.numerics import reference, select
from tiers import each_tier

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.skipif(library_module.library() is None, reason="no compiled kernels")
def test_only_tensors_in_memory_are_taken() -> None:
    """A view with other signs is copied. A tensor without numbers would end the process."""
    x = torch.randn(3, 4)
    assert library_module.supported(x)
    assert library_module.supported(torch.nn.Parameter(x))
    negative = torch._neg_view(x)
    assert not library_module.supported(negative)
    assert library_module.known(negative).equal(-x)
    own = x.as_subclass(type("Own", (torch.Tensor,), {}))
    assert type(library_module.known(own)) is torch.Tensor
    assert library_module.known(own).data_ptr() == x.data_ptr()
    with FakeTensorMode():
        shape_only = torch.empty(3, 4)
        assert not library_module.supported(shape_only)
        with pytest.raises(CELoraError, match="need numbers in memory, and got a FakeTensor"):
            library_module.known(shape_only)


@each_tier
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (17, 64), (33, 129)])
def test_row_norms(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    torch.testing.assert_close(kernels.squared_row_norms(x).double(), x.double().square().sum(1), rtol=1e-5, atol=1e-7)


@each_tier
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 128])
@pytest.mark.parametrize("subset", [False, True])
def test_quantised_rows(dtype: torch.dtype, offset: int, subset: bool) -> None:
    x = (torch.randn(20, 37) * torch.logspace(-12, 6, 20)[:, None]).to(dtype)
    x[4] = 0
    index = torch.tensor([0, 4, 7, 19]) if subset else None
    q, scale = kernels.quantise_rows(x, index, offset=offset)
    rows = x if index is None else x[index]
    signed = q.int() - 128 if offset else q.view(torch.int8).int()
    expected, scales = reference.quantise(rows.float(), 1)
    torch.testing.assert_close(scale, scales[:, 0])
    assert (signed - expected).abs().max() <= 1  # division and multiplication by the inverse round differently
    assert (signed == expected).float().mean() > 0.99


@each_tier
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(bad: float, dtype: torch.dtype) -> None:
    """Infinity and NaN must not become finite when they are quantised: a GradScaler must see the overflow."""
    x = torch.randn(3, 8).to(dtype)
    x[1, 5] = bad
    q, scale = kernels.quantise_rows(x, None, offset=128)
    assert torch.isfinite(scale).tolist() == [True, False, True]
    y, out = (q.float() - 128).to(dtype), torch.empty(3, 8, dtype=dtype)
    kernels.scatter_rows(y, None, scale, out, fill=True)
    assert torch.isfinite(out).all(1).tolist() == [True, False, True]


@each_tier
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [True, False])
def test_scattered_rows(dtype: torch.dtype, fill: bool) -> None:
    y, scale, column = torch.randn(3, 10).to(dtype), torch.rand(3), torch.rand(10)
    position = torch.tensor([-1, 0, -1, 1, 2], dtype=torch.int32)
    there = torch.randn(5, 10).to(dtype)
    expected = torch.zeros_like(there) if fill else there.clone()
    expected[[1, 3, 4]] = (y.float() * scale[:, None]).to(dtype)
    out = there.clone()
    kernels.scatter_rows(y, position, scale, out, fill=fill)
    assert out.equal(expected)

    sums = torch.randint(-1000, 1000, (3, 10), dtype=torch.int32)
    expected[[1, 3, 4]] = (sums.float() * (scale[:, None] * column)).to(dtype)
    out = there.clone()
    kernels.scatter_sums(sums, position, scale, column, out, fill=fill)
    assert out.equal(expected)


@each_tier
@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("kept", [1, 0.5, 1.0])
def test_the_largest_rows_are_chosen(rows: int, kept: float) -> None:
    squared = torch.rand(rows) * torch.logspace(-30, 30, rows)
    count = max(1, int(kept * rows)) if isinstance(kept, float) else kept
    index, position = kernels.choose_rows(squared, kept=count, share=1.0, step=1)
    assert index.equal(select.top_k(squared, count))
    inverse = torch.full((rows,), -1, dtype=torch.int32)
    inverse[index] = torch.arange(count, dtype=torch.int32)
    assert position.equal(inverse)


@each_tier
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
def test_as_many_rows_are_chosen_as_asked_for_whatever_they_are(bad: float) -> None:
    """NaN has a sign, too: inf - inf is negative on x86."""
    squared = torch.rand(20)
    squared[::2] = bad
    index, position = kernels.choose_rows(squared, kept=7, share=1.0, step=1)
    assert len(index) == 7
    assert set(index.tolist()) <= set(range(0, 20, 2))
    assert position[index].equal(torch.arange(7, dtype=torch.int32))
    assert int((position >= 0).sum()) == 7


@each_tier
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999, 1.0])
def test_the_rows_that_hold_a_share_are_chosen(share: float) -> None:
    squared = torch.rand(300).pow(8)
    squared[torch.randperm(300)[:100]] = 0
    index, _ = kernels.choose_rows(squared, kept=None, share=share, step=1)
    assert index.equal(reference.energy(squared.double(), share))
    rounded, _ = kernels.choose_rows(squared, kept=None, share=share, step=64)
    assert len(rounded) == min(300, -(-len(index) // 64) * 64)
    assert set(index.tolist()) <= set(rounded.tolist())


@each_tier
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_every_row_is_kept_if_one_is_not_finite(bad: float) -> None:
    squared = torch.rand(9)
    squared[3] = bad
    assert len(kernels.choose_rows(squared, kept=None, share=0.5, step=1)[0]) == 9
    assert int(select.energy_count(squared, 0.5)) == 9


@each_tier
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_columns(dtype: torch.dtype) -> None:
    w = torch.randn(19, 30).to(dtype)
    q, scale = reference.quantise(w.float(), 0)
    found = kernels.quantise_columns(w, scale[0])
    assert (found.float() - q).abs().max() <= 1
    assert (found == q).float().mean() > 0.99


@each_tier
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 2), (19, 33), (40, 200)])
def test_column_maxima(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = torch.randn(shape).to(dtype)
    assert kernels.column_maxima(w).equal(w.abs().amax(0).float())
    w[0, 0] = float("nan")
    assert kernels.column_maxima(w)[0].isnan()


@each_tier
def test_no_columns() -> None:
    assert kernels.column_maxima(torch.ones(3, 0)).shape == (0,)


@each_tier
def test_rows_may_be_apart() -> None:
    x = torch.randn(6, 40)[:, 3:17]
    assert kernels.squared_row_norms(x).allclose(x.square().sum(1))
    q, scale = kernels.quantise_rows(x, None, offset=128)
    q2, scale2 = kernels.quantise_rows(x.contiguous(), None, offset=128)
    assert q.equal(q2)
    assert scale.equal(scale2)


def test_only_what_the_kernels_know_is_given_to_them() -> None:
    assert not library_module.supported(torch.ones(2, 2, dtype=torch.float64))
    assert not library_module.supported(torch.ones(2, 2, dtype=torch.float16))
    assert not library_module.supported(torch.ones(2, 3).T)
    assert library_module.supported(torch.ones(2, 2)) == (library_module.library() is not None)
