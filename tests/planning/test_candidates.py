"""The candidates of a plan for a layer, and what it leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel

import celora
from celora.numerics.estimators import ESTIMATORS, Dense
from celora.numerics.products.int8 import Int8Product
from celora.planning.candidates import EXACT, candidates
from celora.settings.config import LayerConfig
from machine import refuses


def test_exact_comes_first_and_every_setting_is_its_estimators() -> None:
    found = candidates((48, 80), torch.device("cpu"))
    assert next(iter(found)) == EXACT
    assert type(found[EXACT]) is Dense
    for setting, estimator in found.items():
        assert estimator.name == setting.estimator
        assert (estimator.out_features, estimator.in_features) == (48, 80)
    assert {setting.estimator for setting in found} >= {"dense", "tokens", "columns"}


def test_the_settings_are_those_of_earlier_plans() -> None:
    found = candidates((48, 80), torch.device("cpu"))
    assert LayerConfig("tokens", keep_ratio=0.97, rank=0, selection="energy") in found
    assert LayerConfig("columns", keep_ratio=0.5, rank=0) in found
    assert (LayerConfig("int8", rank=0) in found) is not refuses()


def test_an_estimator_says_which_layers_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(Dense):
        name = "wide"

        @classmethod
        def candidates(cls, out_features: int, in_features: int, device: torch.device) -> Any:
            return [{}] if out_features > in_features else []

    monkeypatch.setitem(ESTIMATORS, "wide", Wide)
    cpu = torch.device("cpu")
    assert [LayerConfig("wide", rank=0) in candidates(shape, cpu) for shape in ((80, 48), (48, 80))] == [True, False]


def test_products_that_a_layer_lacks_are_never_computed(
    model: PeftModel, batches: list[dict[str, torch.Tensor]], free_estimates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refuses():
        return
    follow, there = Int8Product._follow, Int8Product.unavailable

    def refuse(product: Int8Product, weight: torch.Tensor) -> torch.Tensor:
        assert weight.shape[1] != 80, "down_proj"
        return follow(product, weight)

    def lacking(product: Int8Product, out_features: int, in_features: int, device: torch.device) -> str:
        return "no" if in_features == 80 else there(product, out_features, in_features, device)

    monkeypatch.setattr(Int8Product, "unavailable", lacking)
    monkeypatch.setattr(Int8Product, "_follow", refuse)
    plan = celora.make_plan(model, batches, 0.9)
    for layer in plan.layers:
        bits = {setting.precision for c in layer.candidates if (setting := c.setting).estimator != "int8"}
        assert ("int8" in bits) == (layer.in_features != 80)
