"""Randomly drawn columns and tokens: unbiased, resumed exactly, and independent of the global random state."""

from __future__ import annotations

import pytest
import torch

from celora.errors import CELoraError
from celora.numerics.estimators import Tokens, make_estimator
from celora.numerics.estimators.more.sampled import SampledColumns, SampledTokens
from machine import refuses
from without import without


def _columns(W: torch.Tensor, **settings: object) -> SampledColumns:
    estimator = make_estimator("columns", *W.shape, {"selection": "sampled", **settings})
    assert isinstance(estimator, SampledColumns)
    return estimator


def _settled(G: torch.Tensor, W: torch.Tensor, **settings: object) -> SampledColumns:
    estimator = _columns(W, **settings)
    estimator.observe(G, W, G @ W)
    estimator.select()
    return estimator


@pytest.mark.parametrize("rank", [0, 2])
def test_sampled_columns_are_unbiased(rank: int) -> None:
    W, G = torch.randn(16, 8, dtype=torch.float64), torch.randn(12, 16, dtype=torch.float64)
    estimator = _settled(G, W, keep_ratio=0.4, rank=rank)
    draws = 4000
    mean = sum(estimator.estimate(G, W) for _ in range(draws)) / draws
    one = (estimator.estimate(G, W) - G @ W).norm()
    assert one > 0.1 * (G @ W).norm()
    assert (mean - G @ W).norm() < 4 * one / draws**0.5
    resumed = _columns(W, keep_ratio=0.4, rank=rank)
    resumed.load_state_dict(estimator.state_dict())
    assert resumed.estimate(G, W).allclose(estimator.estimate(G, W), atol=1e-12)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_no_draw_is_multiplied_with_the_rows_of_another(precision: str) -> None:
    """The rows of one draw mostly lie at the addresses of the draw before, and they look just as new."""
    if refuses(precision):
        return
    W, G = torch.randn(64, 48), torch.randn(32, 64)
    estimator = _settled(G, W, keep_ratio=0.5, precision=precision)
    for _ in range(20):
        estimate = estimator.estimate(G, W)
        fresh = _columns(W, keep_ratio=0.5, precision=precision)
        fresh.load_state_dict(estimator.state_dict())
        fresh._draws -= 1
        torch.testing.assert_close(estimate, fresh.estimate(G, W))
        del fresh


def test_scores_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CELoraError, match="saved scores of 9 columns for a layer of 20"):
        _columns(torch.ones(20, 9), keep_ratio=0.5).load_state_dict({"scores": torch.ones(9)})


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("factor", ["svd", "gradient"])
def test_sampled_tokens_are_unbiased(rank: int, factor: str) -> None:
    W, G = torch.randn(16, 8, dtype=torch.float64), torch.randn(12, 16, dtype=torch.float64) * torch.rand(12, 1)
    estimator = SampledTokens(16, 8, keep_ratio=0.4, rank=rank, factor=factor, selection="sampled")
    estimator.observe(G, W, G @ W)
    estimator.select()
    draws = 4000
    mean = sum(estimator.estimate(G, W) for _ in range(draws)) / draws
    one = (estimator.estimate(G, W) - G @ W).norm()
    assert one > 0.1 * (G @ W).norm()
    assert (mean - G @ W).norm() < 4 * one / draws**0.5


@pytest.mark.parametrize("precision", ["native", "int8"])
def test_a_weight_of_a_draw_may_be_beyond_float16(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if precision == "int8" and refuses(copy=False):
        return
    drawn = torch.tensor([1]), torch.tensor([1e5], dtype=torch.float64), None
    monkeypatch.setattr("celora.numerics.estimators.more.sampled.drawn", lambda *args, **settings: drawn)
    more = {"precision": precision, "weight_copy": False}
    estimator = SampledTokens(8, 8, keep_ratio=0.4, rank=0, selection="sampled", **more)
    G = torch.full((3, 8), 1e-6, dtype=torch.float16)
    found = estimator.estimate(G, torch.eye(8, dtype=torch.float16))
    torch.testing.assert_close(found[1], torch.full((8,), 0.1, dtype=torch.float16), rtol=0.06, atol=0)
    assert not found[[0, 2]].any()


def test_draws_leave_the_global_random_state_alone_and_resume() -> None:
    W, G = torch.randn(16, 8), torch.randn(12, 16)
    first, second = (SampledTokens(16, 8, keep_ratio=0.4, selection="sampled", seed=5) for _ in range(2))
    state = torch.get_rng_state()
    first.estimate(G, W)
    assert torch.get_rng_state().equal(state)
    second.load_state_dict(first.state_dict())
    assert first.estimate(G, W).equal(second.estimate(G, W))
    other = SampledTokens(16, 8, keep_ratio=0.4, selection="sampled", seed=6)
    assert not first.estimate(G, W).equal(other.estimate(G, W))


def test_keeping_everything_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onednn")
    W, G = torch.randn(16, 8), torch.randn(12, 16)
    assert _columns(W, keep_ratio=1.0).estimate(G, W).equal(G @ W)
    assert SampledTokens(16, 8, keep_ratio=1.0, selection="sampled").estimate(G, W).equal(G @ W)
    with pytest.raises(CELoraError, match="Tokens has no selection='sampled'; make_estimator finds the class"):
        Tokens(16, 8, keep_ratio=0.5, selection="sampled")
