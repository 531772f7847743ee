from __future__ import annotations

import pytest
import torch

from celora.kernels import operations as operations_module
from celora.numerics import reference, select
from celora.numerics import sampling as sampling_module


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
    torch.testing.assert_close(
        operations_module.squared_row_norms(G).double(), G.double().square().sum(1), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.9999, 1.0])
def test_the_energy_count_is_the_smallest_that_holds_the_share(share: float) -> None:
    squared = torch.rand(200, dtype=torch.float64).pow(6)
    squared[torch.randperm(200)[:50]] = 0
    assert int(select.energy_count(squared, share)) == len(reference.energy(squared, share))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_critical_rows_are_the_reference_set(dtype: torch.dtype) -> None:
    squared = torch.rand(300).pow(6).to(dtype)
    assert select.critical_rows(squared, kept=7)[0].equal(reference.top_k(squared, 7))
    assert select.critical_rows(squared, kept=None, share=0.9)[0].equal(reference.energy(squared.double(), 0.9))
    assert len(select.critical_rows(squared, kept=None, share=0.9, step=64)[0]) % 64 == 0
    assert len(select.critical_rows(torch.zeros(5, dtype=dtype), kept=None, share=0.9)[0]) == 5  # zero, or underflown


def test_draws_depend_on_seed_and_number_alone() -> None:
    cpu, state = torch.device("cpu"), torch.get_rng_state()
    draws = {float(sampling_module.uniform(seed, draw, cpu)) for seed in (0, 1) for draw in range(50)}
    assert len(draws) == 100
    assert 0 <= min(draws) <= max(draws) < 1
    assert sampling_module.uniform(3, 4, cpu) == sampling_module.uniform(3, 4, cpu)
    assert torch.get_rng_state().equal(state)


def test_grain_leaves_few_shapes_and_little_waste() -> None:
    rounded = [-(-rows // select.grain(rows)) * select.grain(rows) for rows in range(1, 4096)]
    assert len(set(rounded[1023:2047])) <= 17
    assert all(rows <= up < rows * 17 / 16 for rows, up in enumerate(rounded, 1))
