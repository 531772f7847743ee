"""The reference itself: closed forms are compared with sums over single elements."""

from __future__ import annotations

import torch

from celora.numerics import reference


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_columns_is_the_sum_over_kept_outer_products() -> None:
    G, W = _random(5, 7), _random(7, 4)
    index = torch.tensor([1, 4, 6])
    expected = sum(torch.outer(G[:, i], W[i]) for i in index)
    torch.testing.assert_close(reference.columns(G, W, index), expected)


def test_double_lora_keeping_everything_is_dense() -> None:
    G, W = _random(5, 7), _random(7, 4)
    U, V = reference.truncated_svd(W, 2)
    torch.testing.assert_close(reference.double_lora(G, W, U, V, torch.arange(7)), reference.dense(G, W))


def test_truncated_svd_leaves_the_smallest_possible_residual() -> None:
    W = _random(7, 4)
    singular = torch.linalg.svdvals(W)
    for rank in range(5):
        U, V = reference.truncated_svd(W, rank)
        error = reference.residual(W, U, V).square().sum()
        torch.testing.assert_close(error, singular[rank:].square().sum())
        torch.testing.assert_close(U.T @ U, (V @ V.T))  # sqrt(S) on each side


def test_scores_need_both_the_gradient_and_the_weight() -> None:
    G, W = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    G[1, 1], W[2, 2] = 5.0, 7.0
    assert reference.column_scores(G, W).tolist() == [1.0, 5.0, 7.0]
    assert reference.top_k(reference.column_scores(G, W), 2).tolist() == [1, 2]
