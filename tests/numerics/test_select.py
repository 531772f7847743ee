from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("k", [1, 7, 50, 99, 100])
def test_inclusion_probabilities_add_up_and_equal_the_reference(k: int) -> None:
    scores = torch.rand(100, dtype=torch.float64).pow(5)
    p = sampling_module.inclusion_probabilities(scores, k)
    assert float(p.sum()) == pytest.approx(k)
    assert 0 <= float(p.min()) <= float(p.max()) <= 1
    torch.testing.assert_close(p, reference.inclusion_probabilities(scores, k))


def test_inclusion_probabilities_without_scores_are_uniform_and_finite() -> None:
    assert sampling_module.inclusion_probabilities(torch.zeros(8), 2).equal(torch.full((8,), 0.25, dtype=torch.float64))
    p = sampling_module.inclusion_probabilities(torch.tensor([0.0, 1.0, 0.0, 0.0]), 3)
    assert torch.isfinite(p).all()


def test_nothing_waits_for_a_number_in_drawing() -> None:
    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default, "an accelerator would be waited for"
            return func(*args, **(kwargs or {}))

    scores, offset = torch.rand(50), sampling_module.uniform(0, 0, torch.device("cpu"))
    with Reads():
        sampling_module.sample(sampling_module.inclusion_probabilities(scores, 6), 6, offset)


def test_sampling_is_unbiased_and_draws_exactly_k() -> None:
    """The share of offsets that draw i is p_i, to within the two ends of its interval, and each draw weighs 1 / p_i."""
    scores = torch.rand(23, dtype=torch.float64).pow(3)
    p = sampling_module.inclusion_probabilities(scores, 6)
    total = torch.zeros(23, dtype=torch.float64)
    offsets = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for offset in offsets:
        index, factors = sampling_module.sample(p, 6, offset)
        assert len(set(index.tolist())) == 6
        total[index] += factors / len(offsets)
    assert ((total - 1) * p).abs().max() <= 2 / 4000


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


@pytest.mark.parametrize("alive", [1, 2, 5])
def test_fewer_scores_than_draws(alive: int) -> None:
    """Softmaxes that underflow, dead columns: nothing may be drawn twice, and what is not zero is certain."""
    scores = torch.zeros(12)
    scores[:alive] = torch.rand(alive) + 0.1
    p = sampling_module.inclusion_probabilities(scores, 6)
    assert p.sum().item() == pytest.approx(6)
    assert p[:alive].tolist() == [1] * alive
    index, factors = sampling_module.sample(p, 6, torch.tensor(0.3, dtype=torch.float64))
    assert len(index.unique()) == 6
    assert index[:alive].tolist() == list(range(alive))
    assert factors[:alive].tolist() == [1] * alive
