"""Columns by energy, compared with their reference."""

from __future__ import annotations

import pytest
import torch

from celora.errors import CELoraError
from celora.numerics import reference
from celora.numerics.estimators import Columns, make_estimator
from celora.numerics.estimators.more.columns_by_energy import ColumnsByEnergy


def _settled(G: torch.Tensor, W: torch.Tensor, **settings: object) -> ColumnsByEnergy:
    estimator = make_estimator("columns", *W.shape, {"selection": "energy", **settings})
    assert isinstance(estimator, ColumnsByEnergy)
    estimator.observe(G, W, G @ W)
    estimator.select()
    return estimator


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_energy_keeps_the_columns_that_hold_the_share(share: float) -> None:
    W, G = torch.randn(30, 9, dtype=torch.float64), torch.randn(12, 30, dtype=torch.float64)
    estimator = _settled(G, W, keep_ratio=share)
    scores = reference.column_scores(G, W)
    assert estimator.index.equal(reference.energy(scores.square(), share))
    torch.testing.assert_close(estimator.estimate(G, W), reference.columns(G, W, estimator.index))
    assert estimator.cost == pytest.approx(len(estimator.index) / 30)


def test_energy_may_keep_another_number_at_every_refresh() -> None:
    W, G = torch.randn(30, 9, dtype=torch.float64), torch.randn(12, 30, dtype=torch.float64)
    estimator = _settled(G, W, keep_ratio=0.9, rank=2)
    before = len(estimator.index)
    G[:, :20] = 0
    estimator.observe(G, W, G @ W)
    estimator.select()
    assert len(estimator.index) < min(before, 11)
    closed = reference.double_lora(G, W, estimator.factor.U, estimator.factor.V, estimator.index)
    torch.testing.assert_close(estimator.estimate(G, W), closed)


def test_any_number_of_saved_columns_fits_and_other_positions_do_not() -> None:
    W, G = torch.randn(30, 9), torch.randn(12, 30)
    estimator = _settled(G, W, keep_ratio=0.9)
    resumed = estimator.clone()
    resumed.load_state_dict(estimator.state_dict())
    assert resumed.estimate(G, W).equal(estimator.estimate(G, W))
    with pytest.raises(CELoraError, match="does not fit a layer"):
        resumed.load_state_dict({"index": torch.arange(3) + 29})


def test_the_plain_class_has_no_such_selection() -> None:
    with pytest.raises(CELoraError, match="Columns has no selection='energy'; make_estimator finds the class"):
        Columns(20, 9, keep_ratio=0.5, selection="energy")
