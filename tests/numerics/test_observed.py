"""Errors that celora computes from an observed gradient equal the errors of the candidates' own estimates."""

from __future__ import annotations

import pytest
import torch

from celora.numerics import reference
from celora.numerics.estimators import Columns, Dense, Int8, Observed, Tokens, make_estimator
from celora.numerics.products.int8 import Int8Product
from machine import refuses


@pytest.fixture
def observed() -> Observed:
    W, G = torch.randn(32, 24) / 6, torch.randn(200, 32) * torch.rand(200, 1).pow(4)
    return Observed(G, W, G @ W)


def _error(estimate: torch.Tensor, observed: Observed) -> float:
    return float((estimate - observed.grad_input).norm() / observed.grad_input.norm())


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_tokens_are_judged_without_an_estimate(observed: Observed, share: float) -> None:
    tokens = Tokens(32, 24, keep_ratio=share, selection="energy")
    estimate = tokens.estimate(observed.grad_output, observed.weight)
    found = tokens.judge(observed)
    assert found.error == pytest.approx(_error(estimate, observed), abs=1e-6)
    assert found.kept == int((estimate != 0).any(1).sum()) / 200
    assert observed.needed(share) == len(reference.energy(observed.grad_output.double().square().sum(1), share))


def test_what_is_lost_without_all_but_some_tokens(observed: Observed) -> None:
    for kept in (0, 1, 120, 200, 300):
        whole = torch.zeros_like(observed.grad_input)
        index = observed.grad_output.norm(dim=1).argsort(descending=True)[:kept]
        whole[index] = observed.grad_input[index]
        assert observed.lost(kept) == pytest.approx(_error(whole, observed), abs=1e-6)
    nothing = Observed(torch.zeros(3, 32), torch.ones(32, 24), torch.zeros(3, 24))
    assert nothing.lost(1) == 0


def test_rounding_is_measured_once_and_keeps_no_copy(observed: Observed) -> None:
    assert Dense(32, 24).judge(observed).error == 0
    if refuses():
        return
    estimator = Int8(32, 24)
    error = estimator.judge(observed).error
    assert error == pytest.approx(_error(estimator.estimate(observed.grad_output, observed.weight), observed))
    product = Int8Product()
    assert observed.rounding(product) == error
    assert not product.holds_copy


def test_the_rounding_of_an_estimate_in_8_bits_adds_to_what_it_leaves_out(observed: Observed) -> None:
    if refuses():
        return
    rounding = observed.rounding(Int8Product())
    for name, settings in (
        ("tokens", {"keep_ratio": 0.5}), ("columns", {"keep_ratio": 0.5}), ("columns", {"keep_ratio": 1.0})
    ):  # fmt: skip
        errors = []
        for precision in ("native", "int8"):
            estimator = make_estimator(name, 32, 24, {**settings, "precision": precision})
            estimator.observe(observed.grad_output, observed.weight, observed.grad_input)
            estimator.select()
            errors.append(estimator.judge(observed).error)
        assert errors[1] == pytest.approx((errors[0] ** 2 + rounding**2) ** 0.5)


def test_tokens_and_columns_beside_a_factor_are_judged_by_their_estimates(observed: Observed) -> None:
    for estimator in (Tokens(32, 24, keep_ratio=0.5, rank=3), Columns(32, 24, keep_ratio=0.5, rank=3)):
        estimator.observe(observed.grad_output, observed.weight, observed.grad_input)
        estimator.select()
        estimate = estimator.estimate(observed.grad_output, observed.weight)
        assert estimator.judge(observed).error == pytest.approx(_error(estimate, observed), abs=1e-6)


def test_memory_is_that_of_copies_and_factors() -> None:
    assert Dense(32, 24).memory(torch.float32) == 0
    assert Int8(32, 24).memory(torch.float32) == 32 * 24
    assert Int8(32, 24, weight_copy=False).memory(torch.float32) == 0
    assert Tokens(32, 24, keep_ratio=0.5, rank=2, precision="int8").memory(torch.bfloat16) == 32 * 24 + 2 * 2 * 56
    assert Columns(32, 24, keep_ratio=0.5, precision="int8").memory(torch.bfloat16) == 32 * 24 // 2
    assert Columns(32, 24, keep_ratio=0.5, rank=2).memory(torch.float32) == 4 * 2 * (2 * 32 + 24)
