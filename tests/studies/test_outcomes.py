"""Conclusions of a comparison: intervals agree with the textbook, and sentences claim only what the runs show."""

from __future__ import annotations

import pytest
import torch

from celora.studies.outcomes import Difference, Outcome, differences, findings, students_t, summary


def outcomes(**losses: list[float | None]) -> list[Outcome]:
    return [
        Outcome(arm, seed, 10, loss, 0.5, 100.0 if arm == "LoRA" else 80.0, 1.0)
        for arm, each in losses.items()
        for seed, loss in enumerate(each)
    ]


def test_paired_differences() -> None:
    """Textbook values: differences 1, 2, 3 have mean 2, deviation 1, and t(2) = 4.30265."""
    found = Difference.of([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert found.mean == 2
    assert found.low == pytest.approx(2 - 4.3026527 / 3**0.5)
    assert found.high == pytest.approx(2 + 4.3026527 / 3**0.5)
    assert not found.real
    assert Difference.of([1.0], [2.0]) == Difference(-1.0, None, None)
    assert Difference.of([1.0], [2.0]).real is None
    many = Difference.of([1.0 + 1e-3 * (i % 2) for i in range(40)], [0.0] * 40)
    assert many.real
    assert many.high is not None
    assert many.high - many.mean == pytest.approx(
        2.0227 * torch.tensor([0.0, 1e-3] * 20).std().item() / 40**0.5, rel=1e-4
    )


@pytest.mark.parametrize(
    ("confidence", "degrees", "expected"),
    [(0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 30, 2.0423), (0.99, 5, 4.0321), (0.975, 2, 6.2053)],
)
def test_students_t(confidence: float, degrees: int, expected: float) -> None:
    assert students_t(confidence, degrees) == pytest.approx(expected, abs=1e-4)


def test_several_comparisons_hold_together() -> None:
    one = Difference.of([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    two = Difference.of([11.0, 22.0, 33.0], [10.0, 20.0, 30.0], comparisons=2)
    assert one.high is not None
    assert two.high is not None
    assert (two.high - 2) / (one.high - 2) == pytest.approx(6.2053 / 4.3027, rel=1e-4)


def test_a_difference_that_rounding_makes_is_not_called_real() -> None:
    ran = outcomes(LoRA=[2.0, 2.1, 2.2], rounded=[2.00001, 2.10001, 2.20001])
    (line,) = findings(ran, ("LoRA", "rounded"))
    assert "the same to four decimals" in line
    assert "too small to matter" in line


def test_plain_sentences() -> None:
    ran = outcomes(LoRA=[2.0, 2.1, 2.2], same=[2.001, 2.099, 2.2], worse=[2.1, 2.2, 2.301])
    same, worse = findings(ran, ("LoRA", "same", "worse"))
    assert same.startswith("same: held-out loss the same to four decimals as LoRA's (simultaneous 95 % interval ")
    assert "not distinguishable from chance" in same
    assert "over 3 seeds" in same
    assert worse.startswith("worse: held-out loss 0.1003 higher than LoRA's")
    assert "the difference is real" in worse
    assert worse.endswith("Its step takes 0.80 of LoRA's.")
    (one,) = findings(outcomes(LoRA=[2.0], auto=[1.9]), ("LoRA", "auto"))
    assert "0.1000 lower than LoRA's with one seed, which cannot tell a difference from chance" in one
    assert differences(ran, ("LoRA", "same", "worse"))["worse"].mean == pytest.approx(0.10033, abs=1e-4)
    rows = summary(ran, ("LoRA", "same", "worse"))
    assert rows[0] == ("LoRA", "2.1000 ± 0.1000", "", "50.0% ± 0.0%", "100 ms", "1.00")
    assert rows[2][5] == "1.25"


def test_what_diverged_is_said_and_left_out() -> None:
    ran, arms = outcomes(LoRA=[2.0, 2.1, 2.2], some=[2.5, None, 2.6], all=[None, None, None]), ("LoRA", "some", "all")
    assert differences(ran, arms).keys() == {"some"}
    assert differences(ran, arms)["some"].mean == pytest.approx(0.45)
    first, second, third = findings(ran, arms)
    assert first == "some: diverged with 1 of 3 seeds, which the losses leave out."
    assert second == "all: diverged with 3 of 3 seeds, which the losses leave out."
    assert "over 2 seeds" in third
    assert [row[1] for row in summary(ran, arms)] == [
        "2.1000 ± 0.1000", "2.5500 ± 0.0707, diverged with 1 of 3 seeds", "diverged with 3 of 3 seeds",
    ]  # fmt: skip


def test_arms_that_are_the_same_are_called_identical() -> None:
    (line,) = findings(outcomes(LoRA=[2.0, 2.1], exact=[2.0, 2.1]), ("LoRA", "exact"))
    assert "(95 % interval +0.0000 to +0.0000 over 2 seeds): identical." in line
