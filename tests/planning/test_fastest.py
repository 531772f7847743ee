"""What preset fast gives each kind of layer, by what was faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import celora
from celora.modeling.survey import survey
from celora.planning.fastest import gate
from celora.settings.presets import PRESETS
from machine import refuses
from patching import patch_all
from small import make_model, train

FAST = PRESETS["fast"]


def times(monkeypatch: pytest.MonkeyPatch, *of: float) -> list[int]:
    """What is timed takes so long, in the order in which it is: exact, both ways, backward, native tokens."""
    seen: list[int] = []

    def interleaved(
        contenders: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device
    ) -> dict[str, dict[str, float]]:
        for call in contenders.values():
            call()
        seen.append(len(contenders))
        return {name: {"time_ms": time} for name, time in zip(contenders, of, strict=False)}

    patch_all(monkeypatch, "celora.machine.timing:interleaved", interleaved)
    return seen


@pytest.mark.skipif(refuses(), reason="no 8-bit products here")
@pytest.mark.parametrize(
    ("took", "setting"),
    [
        ((10.0, 3.0, 6.0, 9.0), ("tokens", "int8", "int8")),
        ((10.0, 7.0, 6.0, 9.0), ("tokens", "int8", "exact")),
        ((10.0, 12.0, 11.0, 9.0), ("tokens", "native", "exact")),
        ((10.0, 12.0, 11.0, 9.9), ("dense",)),
    ],
)
def test_the_fastest_wins(took: tuple[float, ...], setting: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    seen = times(monkeypatch, *took)
    config = gate(survey(model), FAST)
    assert seen == [4] * 4  # the kinds: q and o, k and v, gate and up, down
    for name in survey(model).layers:
        layer = config.for_layer(name)
        assert (layer.estimator, layer.precision, layer.forward)[: len(setting)] == setting


def test_what_the_user_says_of_a_layer_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, 10.0, 30.0, 30.0, 30.0)
    asked = dataclasses.replace(FAST, overrides={"up_proj": {"keep_ratio": 0.9}})
    config = gate(survey(make_model()), asked)
    for name in survey(make_model()).layers:
        expected = ("tokens", 0.9) if name.endswith("up_proj") else ("dense", 0.9997)
        layer = config.for_layer(name)
        assert (layer.estimator, layer.keep_ratio) == expected


def test_random_numbers_stay_what_they_are() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    gate(survey(make_model()), FAST)
    torch.manual_seed(3)
    model = make_model()
    torch.manual_seed(3)
    gate(survey(model), FAST)
    assert torch.rand(1).equal(expected)


@pytest.mark.filterwarnings("ignore:celora. (no layer can be estimated|at step|from step)")
def test_attach_measures_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, 10.0, 3.0, 6.0, 9.0)
    model = make_model()
    report: Any = celora.attach(model, "fast")
    if not refuses():
        assert {layer.forward for layer in report.layers} == {"int8"}
    train(model, 2)
