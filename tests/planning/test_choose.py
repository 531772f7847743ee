"""Finds the fastest choice within an error limit and a memory limit, and tries several error allowances for it."""

from __future__ import annotations

import itertools
import types
from typing import Any

import pytest

from celora.planning import choose as choose_module
from celora.planning.plan import Candidate, PlannedLayer
from celora.settings.config import LayerConfig


def test_the_cheapest_choice_is_found_within_both_limits() -> None:
    """Of all choices of three layers with three candidates each, none has both less time and less error."""
    settings = LayerConfig("dense"), LayerConfig("int8", rank=0), LayerConfig("tokens", rank=0)
    times = [(4.0, 2.0, 1.0), (6.0, 3.0, 1.0), (2.0, 1.5, 1.4)]
    errors = [(0.0, 0.1, 0.5), (0.0, 0.1, 0.4), (0.0, 0.1, 0.9)]
    layers = [
        PlannedLayer(str(i), 1, 1, 1.0, tuple(map(Candidate, settings, t, e, (0, 5, 0))), 0)
        for i, (t, e) in enumerate(zip(times, errors, strict=True))
    ]
    table = choose_module.Table(layers)
    every = [list(choice) for choice in itertools.product(range(3), repeat=3)]
    for error in (0.0, 0.02, 0.17, 0.3, 2.0):
        choice = table.cheapest(error, 100)
        assert table.error(choice) <= error + 1e-12
        assert not any(table.time(c) < table.time(choice) and table.error(c) < table.error(choice) for c in every)
        for moved in every:  # the allowance is used up: no single layer can become cheaper within it
            if sum(a != b for a, b in zip(moved, choice, strict=True)) == 1:
                assert table.time(moved) >= table.time(choice) or table.error(moved) > error
    assert table.cheapest(0.0, 100) == [0, 0, 0]
    assert table.cheapest(2.0, 0) == [2, 2, 2]
    assert table.cheapest(0.05, 5).count(1) <= 1


@pytest.mark.parametrize("power", [0.4, 0.5, 1.0, 1.6])
@pytest.mark.parametrize("factor", [0.05, 1.0, 8.0])
def test_a_choice_is_found_however_wrong_the_prediction(power: float, factor: float) -> None:
    """Here an audit finds a power of the predicted error: errors of layers add up, or hide one another."""
    settings = [LayerConfig("tokens", keep_ratio=1 - i / 40, rank=0) for i in range(1, 40)]
    candidates = [Candidate(LayerConfig("dense"), 1.0, 0.0)]
    candidates += [Candidate(setting, setting.keep_ratio, (1 - setting.keep_ratio) ** 1.5) for setting in settings]
    layers = [PlannedLayer(str(i), 1, 1, 0.1 * (1 + i % 3), tuple(candidates), 0) for i in range(30)]
    audits: list[float] = []

    class Bench:
        def audit(self, by_name: Any, chosen: dict[str, LayerConfig]) -> Any:
            expected = sum(
                layers[int(name)].influence * (1 - setting.keep_ratio) ** 3 for name, setting in chosen.items()
            )
            audits.append(factor * expected**power)
            return types.SimpleNamespace(cosine=(1 - min(1.0, audits[-1])) ** 0.5)

    _, found = choose_module.choose_plan(Bench(), {}, layers, 0.1, 10**9, [])  # type: ignore[arg-type]
    assert found == pytest.approx(audits[-1])
    assert 0.08 < found <= 0.1
    assert len(audits) <= 6


@pytest.mark.parametrize("expected", [0.05, 0.005, 1e-4])
def test_a_choice_is_found_where_there_are_few(expected: float) -> None:
    """Most allowances give the same choice. The next choice is another one all the same."""
    candidates = Candidate(LayerConfig("dense"), 1.0, 0.0), Candidate(LayerConfig("int8", rank=0), 0.5, expected**0.5)
    layers = [PlannedLayer(str(i), 1, 1, 1.0, candidates, 0) for i in range(2)]

    class Bench:
        def audit(self, by_name: Any, chosen: dict[str, LayerConfig]) -> Any:
            return types.SimpleNamespace(cosine=(1 - 0.06 * len(chosen)) ** 0.5)

    chosen, found = choose_module.choose_plan(Bench(), {}, layers, 0.1, 10**9, [])  # type: ignore[arg-type]
    assert sum(layer.chosen for layer in chosen) == 1
    assert found == pytest.approx(0.06)
