"""Huge, tiny, zero or empty gradients and weights: estimates stay finite, and as good as at any other scale."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import celora
from celora import CELoraConfig
from celora.kernels.operations import squared_row_norms
from celora.modeling.switch import Mode
from celora.numerics.products.base import Product
from celora.numerics.products.fp8 import Fp8Product
from celora.numerics.products.int8 import Int8Product
from celora.numerics.select import critical_rows
from celora.runtime.attachment import require
from every_estimator import TOKENS, attach_ready, ordinary, plain_layer, possible, run_through
from machine import IN, OUT, refuses

# Half of such a small layer is a poor estimate. celora warns about that.
pytestmark = pytest.mark.filterwarnings("ignore:celora. at step . the relative error")

sizes = st.tuples(st.integers(1, 70), st.integers(1, 40))
exponents = st.integers(-148, 120)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:celora. (a gradient of|by step)")
def test_no_scale_invents_or_loses(path: str, dtype: torch.dtype) -> None:
    """Finite if the exact product is. The error is at most the exact result's norm, except for drawn estimates."""
    scales = [0.0, 1e-43, 1e-39, 1e-30, 1e-25, 1e-18, 1.0, 1e18, 1e30]
    scaled = {scale: (ordinary(torch.float32) * scale).to(dtype) for scale in scales}
    plain = plain_layer(dtype)
    expected = {scale: run_through(plain, G)["x"].double() for scale, G in scaled.items()}
    for member in possible():
        model = plain_layer(dtype)
        attach_ready(member, model, ordinary(dtype), fused=False)
        for scale, exact in expected.items():
            found = run_through(model, scaled[scale])["x"].double()
            assert found.isfinite().all(), (member, scale)
            if "sampled" not in member:
                assert (found - exact).norm() <= exact.norm() + 1e-36, (member, scale)


@given(sizes, exponents, st.integers(-20, 20), st.sampled_from([0.3, 0.9, 0.999, 1.0]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_rows_kept_hold_their_share_at_any_scale(
    shape: tuple[int, int], exponent: int, spread: int, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    G = torch.randn(shape).mul(torch.rand(shape[0], 1).pow(abs(spread))).double().mul(2.0**exponent).float()
    index, _ = critical_rows(squared_row_norms(G), kept=None, share=share)
    assert len(index) >= 1
    energies = G.double().square().sum(1)
    # Sums are in float32. At most a share of 1e-14 of them may underflow.
    assert energies[index].sum() >= share * energies.sum() * (1 - 1e-5)


@given(sizes, exponents, exponents, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_eight_bits_are_as_good_as_they_are_at_any_scale(
    shape: tuple[int, int], g: int, w: int, dtype: torch.dtype, seed: int
) -> None:
    if g + w > 100:
        g = 100 - w
    torch.manual_seed(seed)
    tokens, inner = shape
    G = torch.randn(tokens, 16 * (1 + inner // 16)).double().mul(2.0**g).to(dtype)
    W = torch.randn(G.shape[1], 16).double().mul(2.0**w).to(dtype)
    exact = G.double() @ W.double()
    product: Product
    for product, error in ((Int8Product(), 0.04), (Int8Product(copy=False), 0.04), (Fp8Product(), 0.12)):
        if refuses(product.name, copy=product.copy):
            continue
        found = product(G, W).double()
        assert found.isfinite().all()
        # Numbers below the smallest normal one may be lost, in either factor and in the result.
        tiny = torch.finfo(torch.float32).tiny
        lost = tiny * (G.double().abs().sum() + W.double().abs().sum() + len(G) * W.numel() * (tiny + 1))
        assert (found - exact).norm() <= error * exact.norm() + lost


@pytest.mark.parametrize("how", ["zero", "of rank 1", "tiny", "huge"])
@pytest.mark.filterwarnings("ignore:celora. by step")
def test_weights_that_are_degenerate(path: str, how: str) -> None:
    W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5))
    W = {"zero": W * 0, "of rank 1": W[:, :1] @ W[:1], "tiny": W * 1e-39, "huge": W * 1e30}[how]
    G = ordinary(torch.float32) * (1e-3 if how == "huge" else 1)
    exact = run_through(plain_layer(torch.float32, W), G)["x"]
    for member in possible():
        model = plain_layer(torch.float32, W)
        graft = attach_ready(member, model, G, fused=True)
        found = run_through(model, G)["x"]
        assert found.isfinite().all(), member
        assert (found - exact).norm() <= (4 if "sampled" in member else 1) * exact.norm() + 1e-30, member
        assert all(value.isfinite().all() for value in graft.estimator.state_dict().values()), member


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tokens", [0, 1])
def test_one_token_and_none(path: str, tokens: int, fused: bool) -> None:
    """A layer may get no tokens at all, for example an expert that no token chose."""
    G = ordinary(torch.float32)[:tokens]
    exact = run_through(plain_layer(torch.float32), G)
    for member in possible():
        model = plain_layer(torch.float32)
        graft = attach_ready(member, model, G, fused=fused)
        run_through(model, ordinary(torch.float32))
        found = run_through(model, G)
        assert found["x"].shape == exact["x"].shape
        assert found["x"].isfinite().all()
        if tokens == 1 and member.startswith("tokens") and "native" in member:
            torch.testing.assert_close(found["x"], exact["x"])
        if tokens == 0:
            assert not graft.observed or not graft.estimator.ready


def test_gradients_that_say_nothing_are_said_once() -> None:
    """Nothing can be selected from zeros: the layer stays exact, and celora says so.

    It selects once there is something.
    """
    model = plain_layer(torch.float32)
    celora.attach(model, CELoraConfig(rank=0, keep_ratio=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    (graft,) = require(model).grafts.values()
    for warned in (1, 0, 0):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run_through(model, torch.zeros(TOKENS, OUT))
            optimizer.step()
        assert len(said) == warned
        assert all(
            "by step 1, base_model.model.0 has seen no gradient to select" in str(warning.message) for warning in said
        )
    assert graft.mode is Mode.OBSERVE
    run_through(model, ordinary(torch.float32))
    optimizer.step()
    assert graft.mode is Mode.ESTIMATE
