"""How near an estimated gradient is to the exact one, summed over all parameters."""

from __future__ import annotations

import math

import pytest
import torch

from celora import CELoraError
from celora.runtime.fidelity import Fidelity


def test_fidelity_of_zero_gradients() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert Fidelity.of([(zero, zero)]) == Fidelity(1.0, 0.0, 1.0)
    assert Fidelity.of([(zero, one)]) == Fidelity(0.0, 1.0, 0.0)
    assert Fidelity.of([(one, zero)]).relative_error == float("inf")


def test_pairs_count_as_one_long_vector() -> None:
    pairs = [(torch.randn(3, 4), torch.randn(3, 4)), (torch.randn(5), torch.randn(5))]
    estimate, exact = (torch.cat([pair[i].flatten() for pair in pairs]).double() for i in (0, 1))
    found = Fidelity.of(pairs)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(estimate, exact, dim=0)))
    assert found.relative_error == pytest.approx(float((estimate - exact).norm() / exact.norm()))
    assert found.norm_ratio == pytest.approx(float(estimate.norm() / exact.norm()))


def test_an_infinite_estimate_is_far_and_an_infinite_exact_gradient_is_refused() -> None:
    finite, infinite = torch.ones(2), torch.tensor([1.0, torch.inf])
    assert Fidelity.of([(infinite, finite)]) == Fidelity(0.0, math.inf, math.inf)
    with pytest.raises(CELoraError, match="the exact gradient of this batch is not finite"):
        Fidelity.of([(finite, infinite)])
