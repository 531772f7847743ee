"""The picture of a run's losses."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from celora.train.output.picture import loss_picture

NS = "{http://www.w3.org/2000/svg}"


def test_losses_become_lines() -> None:
    history = [
        {"step": 1, "loss": 4.0},
        {"step": 3, "eval_loss": 2.0},
        {"step": 5, "loss": 1.0},
        {"step": 5, "grad": 9},
    ]
    root = ElementTree.fromstring(loss_picture(history))
    training, evaluation = (line.get("points").split() for line in root.iter(f"{NS}polyline"))
    assert (len(training), len(evaluation)) == (2, 1)
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in training)
    assert x0 < x1
    assert y0 < y1  # SVG counts downwards
    middle = tuple(map(float, evaluation[0].split(",")))
    assert middle == pytest.approx(((x0 + x1) / 2, y0 + (y1 - y0) * 2 / 3), abs=0.1)
    other = [{"step": 3, "eval_base_loss": 2.5}]
    assert len([*ElementTree.fromstring(loss_picture([*history, *other])).iter(f"{NS}polyline")]) == 3
    texts = [text.text for text in root.iter(f"{NS}text")]
    assert {"4", "1", "step 1", "5", "training loss", "evaluation loss"} <= set(texts)


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 2.0}], [{"step": 1}, {"step": 2}]])
def test_one_loss_is_no_picture(history: list[dict[str, float]]) -> None:
    assert loss_picture(history) == ""


def test_losses_that_do_not_change() -> None:
    picture = loss_picture([{"step": step, "loss": 2.0} for step in (1, 2)])
    assert not re.search("nan|inf", picture)
    ElementTree.fromstring(picture)


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_left_out(lost: float) -> None:
    losses = [{"step": step, "loss": 4.0 - step} for step in (1, 2)]
    assert loss_picture([losses[0], {"step": 3, "loss": lost}, losses[1]]) == loss_picture(losses)
    assert loss_picture([losses[0], {"step": 3, "loss": lost}]) == ""
