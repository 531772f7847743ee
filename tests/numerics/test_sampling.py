"""Probabilities equal their reference. Draws have the right mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from celora.numerics import reference
from celora.numerics import sampling as sampling_module


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
    """i is drawn for a share p_i of all offsets, to within the two ends of its interval, and weighs 1 / p_i."""
    scores = torch.rand(23, dtype=torch.float64).pow(3)
    p = sampling_module.inclusion_probabilities(scores, 6)
    total = torch.zeros(23, dtype=torch.float64)
    offsets = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for offset in offsets:
        index, factors = sampling_module.sample(p, 6, offset)
        assert len(set(index.tolist())) == 6
        total[index] += factors / len(offsets)
    assert ((total - 1) * p).abs().max() <= 2 / 4000


@pytest.mark.parametrize("alive", [1, 2, 5])
def test_fewer_scores_than_draws(alive: int) -> None:
    """Softmaxes underflow, and columns may be dead. Nothing is drawn twice, and everything above zero is certain."""
    scores = torch.zeros(12)
    scores[:alive] = torch.rand(alive) + 0.1
    p = sampling_module.inclusion_probabilities(scores, 6)
    assert p.sum().item() == pytest.approx(6)
    assert p[:alive].tolist() == [1] * alive
    index, factors = sampling_module.sample(p, 6, torch.tensor(0.3, dtype=torch.float64))
    assert len(index.unique()) == 6
    assert index[:alive].tolist() == list(range(alive))
    assert factors[:alive].tolist() == [1] * alive
