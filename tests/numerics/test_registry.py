"""Estimators by name: found, refused, and added from outside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from celora import CELoraError
from celora.numerics.estimators import (
    ESTIMATORS,
    Columns,
    Dense,
    Estimator,
    estimator_class,
    make_estimator,
    register_estimator,
)
from celora.numerics.estimators.more.columns_by_energy import ColumnsByEnergy
from celora.numerics.estimators.more.sampled import SampledColumns, SampledTokens


@pytest.fixture(autouse=True)
def _registry_as_before() -> Iterator[None]:
    before = dict(ESTIMATORS)
    yield
    ESTIMATORS.clear()
    ESTIMATORS.update(before)


def test_a_registered_class_is_found_by_its_name() -> None:
    @register_estimator
    class Mine(Dense):
        name = "mine"

    assert estimator_class("mine") is Mine
    # an estimator takes the settings that it uses
    assert type(make_estimator("mine", 4, 3, {"keep_ratio": 0.5})) is Mine
    with pytest.raises(CELoraError, match="unknown estimator 'min'; did you mean 'mine'"):
        estimator_class("min")


def test_a_cell_that_runs_again_replaces_its_class() -> None:
    def cell() -> type[Estimator]:
        class Mine(Dense):
            name = "mine"

        return register_estimator(Mine)

    cell()
    again = cell()
    assert estimator_class("mine") is again


class Nameless(Dense):
    name = ""


class Taken(Dense):
    name = "columns"


class Abstract(Estimator):
    name = "abstract"


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (torch.nn.Linear, "is not a subclass of celora.numerics.estimators.Estimator"),
        (Dense(4, 3), "is not a subclass of celora.numerics.estimators.Estimator"),
        (Nameless, "Nameless.name=''; expected the name of the estimator"),
        (Abstract, "Abstract does not implement cost, estimate"),
        (Taken, "the name 'columns' is taken by celora.numerics.estimators.columns.Columns; choose another"),
    ],
)
def test_what_is_no_estimator_is_refused(cls: Any, message: str) -> None:
    before = dict(ESTIMATORS)
    with pytest.raises(CELoraError, match=message):
        register_estimator(cls)
    assert before == ESTIMATORS


def test_settings_pick_the_class_that_knows_them() -> None:
    chosen = {
        (name, selection): type(make_estimator(name, 8, 4, {"keep_ratio": 0.5, "selection": selection}))
        for name in ("columns", "tokens")
        for selection in ("topk", "energy", "sampled")
    }
    assert chosen["columns", "topk"] is Columns
    assert chosen["columns", "energy"] is ColumnsByEnergy
    assert chosen["columns", "sampled"] is SampledColumns
    assert chosen["tokens", "sampled"] is SampledTokens
    assert chosen["tokens", "topk"] is chosen["tokens", "energy"] is estimator_class("tokens")
