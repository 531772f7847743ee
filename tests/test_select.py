from __future__ import annotations

import pytest
import torch

from celora import reference, select


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 7, 1024, 2500])
def test_squared_column_norms(dtype: torch.dtype, tokens: int) -> None:
    G = torch.randn(tokens, 13).to(dtype)
    norms = select.squared_column_norms(G)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(norms.double(), G.double().square().sum(0), rtol=1e-5, atol=1e-9)


def test_norms_of_a_non_contiguous_gradient() -> None:
    G = torch.randn(13, 9).T
    torch.testing.assert_close(select.squared_column_norms(G), G.contiguous().square().sum(0))


def test_half_precision_norms_do_not_overflow() -> None:
    G = torch.full((64, 3), 6e4, dtype=torch.float16)
    assert torch.isfinite(select.squared_column_norms(G)).all()


def test_scores_and_choice_equal_the_reference() -> None:
    G, R = torch.randn(6, 20, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    scores = select.column_scores(select.squared_column_norms(G), R.norm(dim=1))
    torch.testing.assert_close(scores, reference.column_scores(G, R))
    assert select.top_k(scores, 8).equal(reference.top_k(scores, 8))


def test_permuting_the_gradient_permutes_the_choice() -> None:
    G, norms = torch.randn(6, 20), torch.ones(20)
    permutation = torch.randperm(20)
    before = select.top_k(select.column_scores(select.squared_column_norms(G), norms), 7)
    after = select.top_k(select.column_scores(select.squared_column_norms(G[:, permutation]), norms), 7)
    assert set(permutation[after].tolist()) == set(before.tolist())
    assert not after.equal(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_squared_row_norms(dtype: torch.dtype) -> None:
    G = torch.randn(17, 13).to(dtype)
    torch.testing.assert_close(select.squared_row_norms(G).double(), G.double().square().sum(1), rtol=1e-5, atol=1e-9)
