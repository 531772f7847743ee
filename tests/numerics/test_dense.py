"""The whole product: exact, and in 8 bits."""

from __future__ import annotations

import pytest
import torch

from celora.errors import CELoraError
from celora.numerics import reference
from celora.numerics.estimators import Dense, Fp8, Int8
from machine import refuses
from tiers import paired
from without import without


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_is_the_product_bit_for_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onednn")
    W, G = torch.randn(20, 9).to(dtype), torch.randn(6, 20).to(dtype)
    assert Dense(20, 9).estimate(G, W).equal(G @ W)
    assert Dense(20, 9).cost == 1


@pytest.mark.parametrize("kind", [Int8, Fp8])
@pytest.mark.parametrize("weight_copy", [True, False])
def test_eight_bits_cost_half_and_lose_little(kind: type, weight_copy: bool) -> None:
    if refuses(kind.name, copy=weight_copy):
        return
    W, G = torch.randn(32, 48), torch.randn(3, 7, 32).flatten(0, 1)
    estimator = kind(32, 48, weight_copy=weight_copy)
    assert estimator.ready
    assert estimator.cost == 0.5
    exact = G.double() @ W.double()
    assert (estimator.estimate(G, W).double() - exact).norm() / exact.norm() < (0.02 if kind is Int8 else 0.06)
    assert estimator.clone().settings == estimator.settings


def test_int8_equals_its_reference_and_follows_the_weight_at_a_refresh() -> None:
    if refuses():
        return
    W, G = torch.randn(32, 48), torch.randn(9, 32)
    estimator = Int8(32, 48)
    torch.testing.assert_close(
        estimator.estimate(G, W).double(),
        reference.int8(G.double(), W.double(), paired=paired()),
        rtol=0,
        atol=0.02 * float(G.abs().max()),
    )
    W.data.mul_(-2)
    estimator.observe(G, W, G @ W)
    assert (estimator.estimate(G, W) - G @ W).norm() / (G @ W).norm() < 0.02


def test_a_setting_that_means_nothing_is_refused() -> None:
    with pytest.raises(CELoraError, match="rank=4 means nothing to the estimator 'int8'"):
        Int8(32, 48, rank=4)
    with pytest.raises(CELoraError, match="precision='int8' means nothing to the estimator 'dense'"):
        Dense(32, 48, precision="int8")
