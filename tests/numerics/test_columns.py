"""The paper's estimator, compared with its closed form."""

from __future__ import annotations

import pytest
import torch

from celora.errors import CELoraError
from celora.numerics import reference
from celora.numerics.estimators import Columns, Dense
from machine import refuses
from tiers import paired
from without import without

SHAPES = [(12, 8), (13, 7), (31, 64), (96, 33)]


def _observed(G: torch.Tensor, W: torch.Tensor, *, keep_ratio: float, rank: int) -> Columns:
    estimator = Columns(*W.shape, keep_ratio=keep_ratio, rank=rank)
    estimator.observe(G, W, G @ W.to(G.dtype))
    estimator.select()
    return estimator


def _closed_form(estimator: Columns, G: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    assert estimator.index is not None
    if estimator.factor.U is None or estimator.factor.V is None:
        return reference.columns(G.double(), W.double(), estimator.index)
    U, V = estimator.factor.U.double(), estimator.factor.V.double()
    return reference.double_lora(G.double(), W.double(), U, V, estimator.index)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("keep_ratio", [0.01, 0.5, 0.9])
def test_equals_the_closed_form_in_float64(shape: tuple[int, int], rank: int, keep_ratio: float) -> None:
    W, G = torch.randn(*shape, dtype=torch.float64), torch.randn(10, shape[0], dtype=torch.float64)
    estimator = _observed(G, W, keep_ratio=keep_ratio, rank=rank)
    fresh = torch.randn(17, shape[0], dtype=torch.float64)
    torch.testing.assert_close(estimator.estimate(fresh, W), _closed_form(estimator, fresh, W), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [0, 4])
def test_selects_by_gradient_and_residual_as_the_reference_does(rank: int) -> None:
    W, G = torch.randn(20, 9, dtype=torch.float64), torch.randn(6, 20, dtype=torch.float64)
    estimator = _observed(G, W, keep_ratio=0.4, rank=rank)
    rows = W if rank == 0 else reference.residual(W, *reference.truncated_svd(W, rank))
    assert estimator.index is not None
    assert estimator.index.equal(reference.top_k(reference.column_scores(G, rows), 8))


def test_scores_accumulate_over_the_micro_batches_of_a_refresh_step() -> None:
    W, G = torch.randn(20, 9, dtype=torch.float64), torch.randn(60, 20, dtype=torch.float64)
    whole = _observed(G, W, keep_ratio=0.4, rank=2)
    parts = Columns(20, 9, keep_ratio=0.4, rank=2)
    for micro in G.split(20):
        parts.observe(micro, W, micro @ W)
    parts.select()
    assert parts.index is not None
    assert parts.index.equal(whole.index)


def test_a_refresh_forgets_the_one_before() -> None:
    W = torch.ones(4, 3)
    estimator = _observed(torch.tensor([[9.0, 8.0, 1.0, 1.0]]), W, keep_ratio=0.5, rank=0)
    estimator.observe(torch.tensor([[1.0, 1.0, 2.0, 3.0]]), W, torch.tensor([[1.0, 1.0, 2.0, 3.0]]) @ W)
    estimator.select()
    assert estimator.index is not None
    assert estimator.index.tolist() == [2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeping_everything_is_dense_bit_for_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onednn", "float32")
    W, G = torch.randn(33, 20).to(dtype), torch.randn(9, 33).to(dtype)
    estimator = Columns(33, 20, keep_ratio=1.0, rank=4)
    assert estimator.ready
    assert estimator.cost == 1.0
    assert estimator.estimate(G, W).equal(Dense(33, 20).estimate(G, W))
    assert estimator.estimate(G, W).equal(G @ W)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536)])
@pytest.mark.parametrize("rank", [0, 14])
def test_low_precision_is_no_worse_than_the_naive_product(
    dtype: torch.dtype, shape: tuple[int, int], rank: int
) -> None:
    """The estimate and the naive low-precision product use the same gradient. The float64 closed form is the judge."""
    W, G = (torch.randn(*shape) / shape[1] ** 0.5).to(dtype), torch.randn(256, shape[0]).to(dtype)
    estimator = _observed(G, W, keep_ratio=0.5, rank=rank)

    def error(result: torch.Tensor, exact: torch.Tensor) -> float:
        return ((result.double() - exact).norm() / exact.norm()).item()

    naive = error(G @ W, G.double() @ W.double())
    assert error(estimator.estimate(G, W), _closed_form(estimator, G, W)) <= naive + 1e-3


def test_the_gradients_dtype_rules_under_autocast() -> None:
    W, G = torch.randn(20, 9), torch.randn(6, 20).bfloat16()
    estimator = _observed(G, W, keep_ratio=0.5, rank=3)
    assert estimator.estimate(G, W).dtype == torch.bfloat16


def test_non_contiguous_gradient() -> None:
    W, G = torch.randn(20, 9, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64).T
    estimator = _observed(G, W, keep_ratio=0.5, rank=3)
    torch.testing.assert_close(estimator.estimate(G, W), _closed_form(estimator, G, W))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_poisoned_or_empty_gradient_changes_no_selection(bad: float) -> None:
    W, G = torch.randn(20, 9), torch.randn(6, 20)
    estimator = _observed(G, W, keep_ratio=0.5, rank=3)
    assert estimator.index is not None
    before = estimator.index.clone()
    estimator.observe(torch.full_like(G, bad), W, torch.full_like(G, bad) @ W)
    estimator.select()
    assert estimator.index.equal(before)
    # A step that overflowed is repeated. What it left behind must not spoil the repetition.
    estimator.observe(torch.full_like(G, bad), W, torch.full_like(G, bad) @ W)
    estimator.observe(-G.flip(1), W, -G.flip(1) @ W)
    estimator.select()
    assert estimator.index.equal(_observed(-G.flip(1), W, keep_ratio=0.5, rank=3).index)
    first = Columns(20, 9, keep_ratio=0.5)
    first.observe(torch.full_like(G, bad), W, torch.full_like(G, bad) @ W)
    first.select()
    assert not first.ready


def test_a_weight_changed_through_data_is_factored_anew() -> None:
    W, G = torch.randn(20, 9), torch.randn(6, 20)
    estimator = _observed(G, W, keep_ratio=0.5, rank=3)
    W.data.mul_(3)  # like a merge, this does not count up the weight's version
    estimator.observe(G, W, G @ W)
    estimator.select()
    torch.testing.assert_close(estimator.estimate(G, W).double(), _closed_form(estimator, G, W), rtol=1e-4, atol=1e-4)
    assert estimator.factor.U is not None
    assert estimator.factor.V is not None
    torch.testing.assert_close(
        estimator.factor.U @ estimator.factor.V, torch.matmul(*reference.truncated_svd(W, 3)), rtol=1e-3, atol=1e-3
    )


def test_selections_change_in_place_for_compiled_graphs() -> None:
    W = torch.randn(20, 9)
    estimator = _observed(torch.randn(6, 20), W, keep_ratio=0.5, rank=3)
    held, off = estimator.index, estimator.U_off
    assert held is not None
    before = held.clone()
    estimator.observe(torch.randn(6, 20), W, torch.randn(6, 20) @ W)
    estimator.select()
    assert estimator.index is held
    assert estimator.U_off is off
    assert not held.equal(before)


def test_state_restores_the_estimate_bit_for_bit() -> None:
    W, G = torch.randn(40, 30), torch.randn(6, 40)
    estimator = _observed(G, W, keep_ratio=0.5, rank=3)
    other = estimator.clone()
    assert not other.ready
    other.load_state_dict(estimator.state_dict())
    assert other.ready
    assert other.estimate(G, W).equal(estimator.estimate(G, W))


@pytest.mark.parametrize("index", [torch.arange(3), torch.arange(10) + 15])
def test_a_state_that_does_not_fit_is_refused(index: torch.Tensor) -> None:
    with pytest.raises(CELoraError, match="does not fit a layer that keeps 10 of 20"):
        Columns(20, 9, keep_ratio=0.5).load_state_dict({"index": index})


@pytest.mark.parametrize("copies", [True, False])
def test_8_bit_columns_hold_one_byte_a_number_or_nothing(copies: bool) -> None:
    if refuses(copy=copies):
        return
    W, G = torch.randn(64, 48).bfloat16(), torch.randn(32, 64).bfloat16()
    estimator = Columns(64, 48, keep_ratio=0.5, precision="int8", weight_copy=copies)
    estimator.observe(G, W, G @ W)
    estimator.select()
    found = estimator.estimate(G, W)
    large = [t for t in vars(estimator).values() if isinstance(t, torch.Tensor) and t.numel() >= 32 * 48]
    assert large == []
    assert estimator.product.holds_copy is copies
    assert (found - G[:, estimator.index] @ W[estimator.index]).norm() < 0.05 * found.norm()
    W *= 2  # like merging an adapter
    assert estimator.estimate(G, W).equal(2 * found)


def test_cost_counts_columns_and_factor() -> None:
    assert Columns(100, 50, keep_ratio=0.4, rank=2).cost == pytest.approx(0.4 + 2 * 150 / 5000)


@pytest.mark.parametrize("keep_ratio", [0.0, -0.5, 1.4, float("nan")])
def test_keep_ratio_out_of_range(keep_ratio: float) -> None:
    with pytest.raises(CELoraError, match="expected 0 < keep_ratio <= 1"):
        Columns(20, 9, keep_ratio=keep_ratio)


@pytest.mark.parametrize("rank", [-1, 10])
def test_rank_out_of_range(rank: int) -> None:
    with pytest.raises(CELoraError, match="expected 0 <= rank <= 9"):
        Columns(20, 9, keep_ratio=0.5, rank=rank)


def _settled(G: torch.Tensor, W: torch.Tensor, **settings: object) -> Columns:
    estimator = Columns(*W.shape, **settings)
    estimator.observe(G, W, G @ W)
    estimator.select()
    return estimator


@pytest.mark.parametrize("factor", ["svd", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_columns_are_the_kept_part_in_8_bits(factor: str, dtype: torch.dtype) -> None:
    if refuses():
        return
    W, G = (torch.randn(32, 24) / 6).to(dtype), torch.randn(40, 32).to(dtype)
    estimator = _settled(G, W, keep_ratio=0.5, rank=3, factor=factor, precision="int8")
    index, U, V = estimator.index, estimator.factor.U.double(), estimator.factor.V.double()
    G64, W64 = G.double(), W.double()
    closed = reference.int8(G64[:, index], W64[index], paired=paired()) + G64 @ U.index_fill(0, index, 0) @ V
    estimate = estimator.estimate(G, W).double()
    assert (estimate - closed).norm() / closed.norm() < (3e-3 if dtype == torch.float32 else 1e-2)
    estimator.observe(-G.flip(1), W, -G.flip(1) @ W)
    estimator.select()
    assert estimator.estimate(G, W).isfinite().all()  # the copy followed the new selection
