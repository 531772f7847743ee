"""The gradient factor, compared with its reference, alone and with columns and tokens."""

from __future__ import annotations

import pytest
import torch

from celora.errors import CELoraError
from celora.numerics import reference
from celora.numerics.estimators import Columns, Tokens
from celora.numerics.estimators.more.gradient_factor import make_factor


def _low_rank_gradients(W: torch.Tensor, rank: int) -> torch.Tensor:
    """Gradients whose product with W lies in few directions, as in most trained layers."""
    return torch.randn(30, rank, dtype=W.dtype) @ torch.randn(rank, len(W), dtype=W.dtype)


def test_the_gradient_factor_is_the_reference_projection() -> None:
    W = torch.randn(20, 12, dtype=torch.float64)
    G = torch.randn(30, 20, dtype=torch.float64)
    made = make_factor("gradient", 4, 0)
    made.observe(W, G @ W)
    assert made.V is None  # V is made only when the refresh ends
    made.settle()
    assert made.U is not None
    assert made.V is not None
    torch.testing.assert_close(made.U @ made.V, torch.matmul(*reference.gradient_factor(G @ W, W, 4)))
    torch.testing.assert_close(made.residual_norms, (W - made.U @ made.V).norm(dim=1))


def test_the_gradient_factor_is_exact_where_the_gradients_are_of_low_rank_and_svd_is_not() -> None:
    W = torch.randn(40, 24, dtype=torch.float64)
    G = _low_rank_gradients(W, 3)
    errors = {}
    for kind in ("svd", "gradient"):
        made = make_factor(kind, 3, 0)
        made.observe(W, G @ W)
        made.settle()
        assert made.U is not None
        assert made.V is not None
        errors[kind] = float((G @ made.U @ made.V - G @ W).norm() / (G @ W).norm())
    assert errors["gradient"] < 1e-10
    assert errors["svd"] > 0.3


def test_micro_batches_are_merged() -> None:
    W = torch.randn(40, 24, dtype=torch.float64)
    G = _low_rank_gradients(W, 3)
    parts, whole = make_factor("gradient", 3, 0), make_factor("gradient", 3, 0)
    for micro in G.split(10):
        parts.observe(W, micro @ W)
    whole.observe(W, G @ W)
    for made in (parts, whole):
        made.settle()
    assert parts.V is not None
    assert whole.V is not None
    torch.testing.assert_close(parts.V.T @ parts.V, whole.V.T @ whole.V)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_poisoned_or_empty_gradient_leaves_the_factor_as_it_was(bad: float) -> None:
    W, G = torch.randn(20, 12), torch.randn(30, 20)
    made = make_factor("gradient", 4, 0)
    made.observe(W, torch.full((30, 12), bad))
    made.settle()
    assert made.V is None
    made.observe(W, G @ W)
    made.settle()
    before = made.V.clone()
    made.observe(W, torch.full((30, 12), bad))
    made.settle()
    assert made.V.equal(before)


def test_the_weight_is_not_needed_when_the_refresh_ends() -> None:
    """By then FSDP2 has freed the memory of the gathered weight."""
    W, G = torch.randn(20, 12), torch.randn(30, 20)
    kept, freed = make_factor("gradient", 4, 0), make_factor("gradient", 4, 0)
    gathered = W.clone()
    kept.observe(W, G @ W)
    freed.observe(gathered, G @ W)
    gathered.zero_()
    for made in (kept, freed):
        made.settle()
    assert freed.U.equal(kept.U)
    assert freed.residual_norms.equal(kept.residual_norms)


def test_fewer_tokens_than_the_rank() -> None:
    W = torch.randn(20, 12, dtype=torch.float64)
    G = torch.randn(2, 20, dtype=torch.float64)
    made = make_factor("gradient", 4, 0)
    made.observe(W, G @ W)
    made.settle()
    torch.testing.assert_close(G @ made.U @ made.V, G @ W)


def test_a_loaded_gradient_factor_is_projected_when_the_weight_is_at_hand() -> None:
    W, G = torch.randn(20, 12), torch.randn(30, 20)
    made, resumed = make_factor("gradient", 4, 0), make_factor("gradient", 4, 0)
    made.observe(W, G @ W)
    made.settle()
    resumed.load_state_dict(made.state_dict(), 12)
    resumed.prepare(W)
    assert resumed.U.allclose(made.U, atol=1e-6)
    for rank, in_features in ((5, 12), (4, 11)):
        with pytest.raises(CELoraError, match=rf"shape \(4, 12\), not \({rank}, {in_features}\)"):
            make_factor("gradient", rank, 0).load_state_dict(made.state_dict(), in_features)


def test_the_gradient_factor_catches_what_the_left_out_tokens_carry() -> None:
    W = torch.randn(40, 24, dtype=torch.float64)
    G = torch.randn(60, 3, dtype=torch.float64) @ torch.randn(3, 40, dtype=torch.float64)
    bare = Tokens(40, 24, keep_ratio=0.3)
    factored = Tokens(40, 24, keep_ratio=0.3, rank=3, factor="gradient")
    assert not factored.ready
    for estimator in (bare, factored):
        estimator.observe(G, W, G @ W)
        estimator.select()
    assert factored.ready
    assert (bare.estimate(G, W) - G @ W).norm() > 0.1 * (G @ W).norm()
    assert (factored.estimate(G, W) - G @ W).norm() < 1e-9 * (G @ W).norm()


def test_beside_columns_it_equals_the_closed_form_and_resumes() -> None:
    W, G = torch.randn(20, 12, dtype=torch.float64), torch.randn(30, 20, dtype=torch.float64)
    estimator = Columns(20, 12, keep_ratio=0.4, rank=3, factor="gradient")
    estimator.observe(G, W, G @ W)
    estimator.select()
    closed = reference.double_lora(G, W, estimator.factor.U, estimator.factor.V, estimator.index)
    torch.testing.assert_close(estimator.estimate(G, W), closed)
    resumed = Columns(20, 12, keep_ratio=0.4, rank=3, factor="gradient")
    resumed.load_state_dict(estimator.state_dict())
    torch.testing.assert_close(resumed.estimate(G, W), estimator.estimate(G, W))
