from __future__ import annotations

import pytest
import torch

from celora.numerics import factor, reference


def _decaying(rows: int, columns: int) -> torch.Tensor:
    """A weight whose spectrum falls off like that of trained layers."""
    rank = min(rows, columns)
    left, right = torch.linalg.qr(torch.randn(rows, rank)).Q, torch.linalg.qr(torch.randn(columns, rank)).Q
    return (left * torch.arange(1, rank + 1).float().pow(-0.5)) @ right.T


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (257, 129)])
def test_the_randomised_factor_is_nearly_optimal(shape: tuple[int, int]) -> None:
    W = _decaying(*shape)
    U, V = factor.svd_factor(W, 14)
    best = reference.residual(W, *reference.truncated_svd(W, 14)).norm()
    assert U.shape == (shape[0], 14)
    assert V.shape == (14, shape[1])
    assert reference.residual(W, U, V).norm() <= 1.002 * best


def test_a_small_weight_gets_the_exact_factor() -> None:
    W = torch.randn(9, 6, dtype=torch.float64)
    U, V = factor.svd_factor(W, 4)
    torch.testing.assert_close(U @ V, torch.matmul(*reference.truncated_svd(W, 4)))


def test_sqrt_of_the_singular_values_on_each_side() -> None:
    U, V = factor.svd_factor(_decaying(300, 200), 5)
    torch.testing.assert_close(U.T @ U, V @ V.T, rtol=1e-3, atol=1e-5)


def test_depends_on_the_seed_alone_and_leaves_the_random_state() -> None:
    W = _decaying(300, 200)
    state = torch.get_rng_state()
    first = factor.svd_factor(W, 8, seed=3)
    assert torch.get_rng_state().equal(state)
    torch.rand(5)
    again = factor.svd_factor(W, 8, seed=3)
    assert first[0].equal(again[0])
    assert first[1].equal(again[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_factored_in_fp32(dtype: torch.dtype) -> None:
    U, V = factor.svd_factor(_decaying(120, 100).to(dtype), 6)
    assert U.dtype == V.dtype == torch.float32


def test_rank_beyond_the_weights_own_is_harmless() -> None:
    W = torch.outer(torch.randn(30), torch.randn(20))
    U, V = factor.svd_factor(W, 5)
    torch.testing.assert_close(U @ V, W, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", [0, 1, 9])
def test_a_sketched_weight_of_low_rank_is_found_whole(own: int) -> None:
    W = torch.randn(300, own) @ torch.randn(own, 200)
    U, V = factor.svd_factor(W, 14)
    assert (U @ V - W).norm() <= 1e-4 * W.norm()
    assert torch.isfinite(U).all()
    assert torch.isfinite(V).all()


def test_weights_of_any_size_are_factored() -> None:
    for scale in (1e-12, 1e12):
        W = _decaying(300, 200)
        U, V = factor.svd_factor(scale * W, 14)
        best = reference.residual(W, *reference.truncated_svd(W, 14)).norm()
        assert reference.residual(scale * W, U, V).norm() <= 1.002 * scale * best


def test_residual_row_norms_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(2050, 1024, dtype=torch.float64)
    U, V = torch.randn(2050, 3, dtype=torch.float64), torch.randn(3, 1024, dtype=torch.float64)
    norms = factor.residual_row_norms(W, U, V)
    torch.testing.assert_close(norms, reference.residual(W, U, V).norm(dim=1))


def test_the_factor_follows_the_weight_to_another_device() -> None:
    W = torch.randn(20, 12)
    made = factor.FrozenFactor(4)
    made.prepare(W)
    U = made.U
    made.U, made.V, made._weight_norms = (tensor.to("meta") for tensor in (made.U, made.V, made._weight_norms))
    made.prepare(W)
    assert made.U.equal(U)
    assert made.V.device == W.device
