"""The controller behind `target_error` comes to rest at its target, stays in range, and resumes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celora.numerics.estimators import Columns, Int8, make_estimator
from celora.runtime.target_error import aim, load_state_dict, state_dict


def test_the_controller_moves_towards_the_target_and_stays_in_range() -> None:
    by_number, by_energy = (
        make_estimator("columns", 20, 9, {"keep_ratio": keep, "selection": selection})
        for keep, selection in ((0.5, "topk"), (0.99, "energy"))
    )
    for estimator in (by_number, by_energy):
        before = estimator.keep_ratio
        aim(estimator, 0.4, 0.1)
        assert estimator.keep_ratio > before
        for _ in range(40):
            aim(estimator, 1e-9, 0.5)
        assert 0 < estimator.keep_ratio < 0.05
        for _ in range(60):
            aim(estimator, 1.0, 1e-9)
        assert 0.98 < estimator.keep_ratio < 1
    by_energy.keep_ratio = 0.99
    aim(by_energy, 0.2, 0.1)
    assert by_energy.keep_ratio == pytest.approx(0.9975)


def test_only_a_ratio_that_has_moved_is_saved() -> None:
    estimator, resumed = Columns(20, 9, keep_ratio=0.5), Columns(20, 9, keep_ratio=0.5)
    assert state_dict(estimator) == {}
    aim(estimator, 0.4, 0.1)
    assert state_dict(estimator).keys() == {"keep_ratio"}  # states of earlier versions look like this
    load_state_dict(resumed, state_dict(estimator))
    assert resumed.keep_ratio == estimator.keep_ratio != 0.5
    load_state_dict(resumed, {})
    assert resumed.keep_ratio == 0.5


def test_what_keeps_everything_is_left_alone() -> None:
    estimator = Int8(32, 48)
    aim(estimator, 0.9, 0.1)
    assert estimator.keep_ratio == 1
    columns = Columns(20, 9, keep_ratio=0.5)
    aim(columns, float("nan"), 0.1)
    assert columns.keep_ratio == 0.5


@given(
    st.sampled_from(["topk", "energy"]),
    st.floats(1e-3, 1.0),
    st.floats(1e-3, 0.999),
    st.lists(st.floats(), min_size=1, max_size=50),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_controller_stays_in_range_whatever_it_is_told(
    selection: str, keep_ratio: float, target: float, errors: list[float]
) -> None:
    estimator = make_estimator("tokens", 32, 16, {"keep_ratio": keep_ratio, "selection": selection})
    for error in errors:
        aim(estimator, error, target)
        assert 0 < estimator.keep_ratio <= 1


@given(st.floats(0.02, 0.9), st.floats(0.05, 0.999), st.floats(0.5, 3.0))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_controller_comes_to_rest_at_its_target(target: float, start: float, power: float) -> None:
    """For errors that grow with the square root of the energy left out, and with other powers near that.

    With a power p, each step leaves |1 - p| of the distance. From p = 2 on, the controller does not come to rest.
    """
    estimator = make_estimator("tokens", 32, 16, {"keep_ratio": start, "selection": "energy"})
    for _ in range(60):
        aim(estimator, (1 - estimator.keep_ratio) ** (power / 2), target)
    reached = (1 - estimator.keep_ratio) ** (power / 2)
    assert abs(reached - target) < 0.02 or (power > 1.9 and reached < 1)
