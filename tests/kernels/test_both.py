"""One 8-bit copy of a weight for forward and backward, compared with the closed form of both products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from celora.kernels import operations
from celora.kernels.backends import available, choose
from celora.kernels.packed import BothWays
from celora.kernels.plain import row_scales
from celora.numerics import reference
from largest import Largest
from tiers import WITH_DOTS, paired, use_tier
from without import without

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (5, 31), (16, 32), (67, 100), (128, 257), (33, 64), (200, 36)]  # (out, in)
CPU = torch.device("cpu")


@pytest.fixture(params=["plain", *WITH_DOTS], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        without(monkeypatch, "c")
    else:
        use_tier(monkeypatch, request.param)
    return str(request.param)


def packed_of(weight: Tensor) -> BothWays | None:
    """The weight packed, or None if this machine refuses all 8-bit products."""
    if not available("pack_both_ways", CPU):
        return None
    return operations.pack_both_ways(weight, weight.float().abs().amax(1).clamp(min=1e-20) / 127)


def forward(packed: BothWays, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias`, in bfloat16 if x is, or float32."""
    out = torch.empty(len(x), len(packed.scale), dtype=torch.promote_types(x.dtype, torch.bfloat16))
    return packed.multiply(packed.quantise(x), bias, out)


def tolerance(dtype: torch.dtype) -> float:
    """A value half-way between two steps may round up or down. In half precision the result is rounded once more."""
    return 3e-3 if dtype == torch.float32 else 6e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_weight_is_rounded_to_its_rows_scales(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    w = torch.randn(shape).to(dtype)
    packed = packed_of(w)
    if packed is None:
        return
    found, scale = packed.dense(), packed.scale[:, None]
    assert found.shape == w.shape
    assert ((found - w.float()).abs() <= 0.5001 * scale).all()
    steps = found / scale
    torch.testing.assert_close(steps, steps.round())
    some = torch.tensor([shape[1] - 1, 0, shape[1] // 2])
    assert torch.equal(packed.columns(some), packed.integers()[:, some])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_a_large_weight_is_packed_without_a_copy_of_it(dtype: torch.dtype, scaled: bool, backend: str) -> None:
    w, u = torch.randn(2500, 48).to(dtype), torch.rand(48) + 0.5 if scaled else None
    scale = row_scales(w if u is None else w / u)
    if not available("pack_both_ways", CPU):
        return
    with Largest() as seen:
        packed = operations.pack_both_ways(w, scale, u)
    steps = packed.dense() / scale[:, None] / (1 if u is None else u)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert ((packed.dense() - w.float()).abs() <= 0.5001 * scale[:, None] * (1 if u is None else u)).all()
    if backend != "plain":  # a block is larger there
        assert seen.nbytes < 4 * w.numel()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_forward(dtype: torch.dtype, shape: tuple[int, int], bias: bool) -> None:
    w, x = torch.randn(shape).to(dtype), torch.randn(25, shape[1]).to(dtype)
    b = torch.randn(shape[0]).to(dtype) if bias else None
    packed = packed_of(w)
    if packed is None:
        return
    found = forward(packed, x, b)
    q, scale = reference.quantise(x.double(), 1, paired=paired())
    expected = q * scale @ packed.dense().double().T + (0 if b is None else b.double())
    assert found.shape == (25, shape[0])
    assert (found.double() - expected).norm() <= tolerance(dtype) * expected.norm()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", [None, 1, 9, 12, 25])
def test_backward(dtype: torch.dtype, shape: tuple[int, int], kept: int | None) -> None:
    w, g = torch.randn(shape).to(dtype), torch.randn(25, shape[0]).to(dtype)
    index = None if kept is None else torch.randperm(25)[:kept].sort().values
    packed = packed_of(w)
    if packed is None:
        return
    rows = g if index is None else g[index]
    q, scale = reference.quantise(rows.double() * packed.scale.double(), 1, paired=paired())
    steps = (packed.dense() / packed.scale[:, None]).round().double()
    expected = q * scale @ steps
    there = torch.full((25, shape[1]), 7.0).to(dtype)
    for onto in (None, there.clone()):
        found = packed.rows(g, index, position=None, onto=onto)
        others = torch.ones(25, dtype=torch.bool)
        others[slice(None) if index is None else index] = False
        assert (found[others] == (0 if onto is None else 7)).all()
        assert (found[~others].double() - expected).norm() <= tolerance(dtype) * expected.norm()


@pytest.mark.parametrize("threads", [1, 3])
def test_more_rows_and_depth_than_kernels_take_at_a_time(threads: int, use_threads: Callable[[int], None]) -> None:
    """In both directions: several groups of rows, the last one short, and stretches of the depth."""
    w, x, g = torch.randn(1100, 1300), torch.randn(301, 1300), torch.randn(301, 1100)
    packed = packed_of(w)
    if packed is None:
        return
    use_threads(threads)
    forwards = forward(packed, x)
    backward = packed.rows(g, None, position=None, onto=None)
    q, scale = reference.quantise(x.double(), 1, paired=paired())
    expected = q * scale @ packed.dense().double().T
    assert (forwards.double() - expected).norm() <= tolerance(torch.float32) * expected.norm()
    q, scale = reference.quantise(g.double() * packed.scale.double(), 1, paired=paired())
    expected = q * scale @ (packed.dense() / packed.scale[:, None]).round().double()
    assert (backward.double() - expected).norm() <= tolerance(torch.float32) * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kept", "share"), [(1, 1.0), (9, 1.0), (25, 1.0), (None, 0.5), (None, 0.99)])
def test_critical_rows(dtype: torch.dtype, kept: int | None, share: float) -> None:
    w = torch.randn(67, 100).to(dtype)
    g = torch.randn(25, 67).to(dtype) * (torch.rand(25, 1) * 4).exp().to(dtype)
    g[3] = 0
    packed = packed_of(w)
    found = None if packed is None else packed.critical_rows(g, kept=kept, share=share)
    if packed is None or found is None:  # without kernels, choosing and multiplying are two steps
        return
    index, _ = operations.choose_rows(operations.squared_row_norms(g), kept=kept, share=share, step=1)
    assert found.equal(packed.rows(g, index, position=None, onto=None))


def test_one_input_serves_several_weights() -> None:
    x = torch.randn(20, 48)
    first, second = packed_of(torch.randn(32, 48)), packed_of(torch.randn(80, 48))
    if first is None or second is None:
        return
    rows = first.quantise(x)
    for packed in (first, second):
        assert packed.multiply(rows, None, torch.empty(20, len(packed.scale))).equal(forward(packed, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_of_very_different_size(dtype: torch.dtype) -> None:
    """With a scale for each input feature, both products use the same weight, and come nearer to the exact products."""
    size = torch.ones(100)
    size[[3, 50]] = 80.0
    w, x, g = torch.randn(67, 100).to(dtype), (torch.randn(25, 100) * size).to(dtype), torch.randn(25, 67).to(dtype)
    plain, scale = packed_of(w), size**-0.5
    if plain is None:
        return
    packed = operations.pack_both_ways(w, (w.float() / scale).abs().amax(1) / 127, scale)
    exact = x.double() @ w.double().T
    losses = [float((forward(weight, x).double() - exact).norm() / exact.norm()) for weight in (plain, packed)]
    assert losses[1] < 0.6 * losses[0]
    q, row = reference.quantise(x.double() * scale.double(), 1, paired=paired())
    dense = packed.dense().double()
    expected = q * row @ (dense / scale.double()).T
    found = forward(packed, x)
    assert (found.double() - expected).norm() <= tolerance(dtype) * expected.norm()
    index = torch.tensor([1, 7, 20])
    q, row = reference.quantise(g[index].double() * packed.scale.double(), 1, paired=paired())
    expected = q * row @ (dense / packed.scale.double()[:, None])
    found = packed.rows(g, index, position=None, onto=None)[index]
    assert (found.double() - expected).norm() <= tolerance(dtype) * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_input_in_8_bits_can_be_multiplied_from_the_left(dtype: torch.dtype, masked: bool, scaled: bool) -> None:
    """The gradient of LoRA's A needs this product: `p^T x`."""
    w, x, p = torch.randn(67, 100), torch.randn(25, 100).to(dtype), torch.randn(25, 3).to(dtype)
    mask, scale = (torch.rand(25, 100) < 0.7 if masked else None), (torch.rand(100) + 0.1 if scaled else None)
    if packed_of(w) is None:
        return
    rows = operations.pack_both_ways(w, torch.ones(67), scale).quantise(x)
    u = torch.ones(100, dtype=torch.float64) if scale is None else scale.double()
    q, row = reference.quantise(x.double() * u, 1, paired=paired())
    expected = p.double().T @ (q * row / u * (1 if mask is None else mask))
    found = rows.transposed_product(p, mask)
    sums = dtype if choose("transposed_product", p).name == "torch" else torch.float32
    assert (rows.q.shape, rows.q.dtype, found.dtype) == (x.shape, torch.int8, sums)
    assert (found.double() - expected).norm() <= tolerance(dtype) * expected.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_zeros_stay_zeros(bad: float) -> None:
    w, x = torch.randn(32, 16), torch.randn(6, 16)
    w[5], x[2], x[4, 7] = 0, 0, bad
    packed = packed_of(w)
    if packed is None:
        return
    y = forward(packed, x)
    assert (y[2] == 0).all()
    assert (y[:4, 5] == 0).all()
    assert torch.isfinite(y).all(1).tolist() == [True, True, True, True, False, True]
    g = torch.randn(6, 32)
    g[2], g[4, 7] = 0, bad
    back = packed.rows(g, None, position=None, onto=None)
    assert (back[2] == 0).all()
    assert torch.isfinite(back).all(1).tolist() == [True, True, True, True, False, True]


@pytest.mark.parametrize("threads", [2, 3])
def test_the_bits_are_the_same_for_any_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x, g = torch.randn(200, 300), torch.randn(70, 300), torch.randn(70, 200)
    packed = packed_of(w)
    if packed is None:
        return

    def both() -> tuple[Tensor, Tensor]:
        back = packed.rows(g, None, position=None, onto=None)
        return forward(packed, x), back

    alone = both()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for found, expected in zip(both(), alone, strict=True):
        assert found.equal(expected)
