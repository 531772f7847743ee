"""8-bit products in C, compared with their reference. Matrix and vector instructions give the same results."""

from __future__ import annotations

import pytest
import torch

from celora.kernels.c import dot as dot_module
from celora.kernels.c import rows as kernels
from celora.numerics import reference
from tiers import PAIRED, WITH_DOTS, each_tier_with_dots, use_tier

DTYPES = [torch.float32, torch.bfloat16]


@each_tier_with_dots
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (16, 32), (67, 100), (128, 257)])
@pytest.mark.parametrize("kept", [None, 1, 5, 9, 11, 12, 25])
def test_gathered_products(dtype: torch.dtype, shape: tuple[int, int], kept: int | None, tier: str) -> None:
    """Any number of rows and columns may be left over at the end of a block. Nothing outside the output is written."""
    x, w = torch.randn(25, shape[0] + 3).to(dtype)[:, : shape[0]], torch.randn(shape).to(dtype)
    index = None if kept is None else torch.randperm(25)[:kept].sort().values
    position = None if index is None else torch.full((25,), -1, dtype=torch.int32)
    if index is not None and position is not None:
        position[index] = torch.arange(len(index), dtype=torch.int32)
    scale = w.float().abs().amax(0).clamp(min=1e-20) / 127
    packed = dot_module.pack_columns(w, 1 / scale)
    rows = x if index is None else x[index]
    expected = reference.int8(rows.double(), w.double(), paired=PAIRED[tier])
    for fill in (True, False):
        around = torch.full((27, shape[1]), 7.0).to(dtype)
        out = around[1:26]
        dot_module.gathered_product(x, packed, scale, out, index=index, position=position, fill=fill)
        others = torch.ones(25, dtype=torch.bool)
        others[slice(None) if index is None else index] = False
        assert (out[others] == (0 if fill else 7)).all()
        assert (around[[0, 26]] == 7).all()
        assert (out[~others].double() - expected).norm() <= (3e-3 if dtype == torch.float32 else 6e-3) * expected.norm()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        (1, (1, 1)),
        (70, (64, 32)),
        (200, (700, 33)),
        (300, (1300, 64)),
        (1100, (65, 31)),
        (70, (20000, 32)),
        (40, (40000, 5)),
    ],
)
def test_tiers_have_the_same_bits(
    rows: int, shape: tuple[int, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they quantise rows alike, however rows are divided by the size of a cache or among threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, w = torch.randn(rows, shape[0]), torch.randn(shape)
    scale = w.abs().amax(0) / 127
    for kept in sorted({0, 1, rows // 2, rows}):
        index = torch.randperm(rows)[:kept].sort().values
        found: dict[bool, torch.Tensor] = {}
        for tier in WITH_DOTS:
            use_tier(monkeypatch, tier)
            out, packed = torch.full((rows, shape[1]), 7.0), dot_module.pack_columns(w, 1 / scale)
            dot_module.gathered_product(x, packed, scale, out, index=index, position=None, fill=False)
            assert (out != 7).any(1).sum() == kept
            assert out.equal(found.setdefault(PAIRED[tier], out))


@each_tier_with_dots
@pytest.mark.parametrize("shape", [(2, 1), (64, 40), (515, 70), (1000, 33)])
def test_integers_are_multiplied_exactly(shape: tuple[int, int], tier: str) -> None:
    """Also where every number is the largest there is, of one sign or of both: sums of products never saturate."""
    depth, columns = shape
    first, w = torch.randint(-127, 128, (32, (depth + 1) // 2)), torch.randint(-127, 128, shape)
    first[:8] = 63 * first[:8].sign()
    first[8] = 63
    x = torch.stack([first, (127 - first.abs()) * (1 - 2 * torch.randint(2, first.shape))], 2).flatten(1)[:, :depth]
    x[0] = x[0].abs()
    if not PAIRED[tier]:  # else neighbours are at most 127 together
        x[:16] = 127 * x[:16].sign()
    x[:, 0], x[:, 1], w[:, ::2] = 127, 0, 127 * w[:, ::2].sign()
    w[0], w[:, 0] = 127, 127  # all scales are 1
    x, w = x.float(), w.float()
    ones = torch.ones(columns)
    out = torch.empty(len(x), columns)
    packed = dot_module.pack_columns(w, ones)
    dot_module.gathered_product(x, packed, ones, out, index=None, position=None, fill=False)
    assert out.equal((x.double() @ w.double()).float())


@each_tier_with_dots
def test_neighbours_whose_sum_is_no_number_are_multiplied(tier: str) -> None:
    x, w = torch.zeros(2, 6), 1e-3 * torch.eye(6)
    x[0, :2], x[1, 4] = 2e38, -3e38
    scale, out = torch.full((6,), 1e-3 / 127), torch.empty(2, 6)
    packed = dot_module.pack_columns(w, 1 / scale)
    dot_module.gathered_product(x, packed, scale, out, index=None, position=None, fill=False)
    torch.testing.assert_close(out, 1e-3 * x, rtol=0.01, atol=0)


@each_tier_with_dots
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (67, 100)])
@pytest.mark.parametrize(("kept", "share"), [(1, 1.0), (9, 1.0), (25, 1.0), (None, 0.5), (None, 0.99), (None, 1.0)])
def test_critical_products(dtype: torch.dtype, shape: tuple[int, int], kept: int | None, share: float) -> None:
    """One call gives the same as three calls that choose, gather and multiply."""
    x = torch.randn(25, shape[0] + 3).to(dtype)[:, : shape[0]] * (torch.rand(25, 1) * 4).exp().to(dtype)
    x[3] = 0
    w = torch.randn(shape).to(dtype)
    scale = w.float().abs().amax(0).clamp(min=1e-20) / 127
    packed = dot_module.pack_columns(w, 1 / scale)
    found = dot_module.critical_product(x, packed, scale, kept=kept, share=share)
    index, position = kernels.choose_rows(kernels.squared_row_norms(x), kept=kept, share=share, step=1)
    expected = torch.full((25, shape[1]), 7.0).to(dtype)
    dot_module.gathered_product(x, packed, scale, expected, index=index, position=position, fill=True)
    assert found.equal(expected)
    assert (found != 0).any(1).sum() <= len(index) < 26
