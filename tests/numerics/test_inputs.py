"""The latest input in 8 bits is made once, and made again after a change."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from celora.kernels.packed import QuantisedRows
from celora.numerics.inputs import LatestInput


class Rounding:
    """Counts what it rounds."""

    def __init__(self, input_scale: Tensor | None = None) -> None:
        self.input_scale, self.made = input_scale, 0

    def quantise(self, x: Tensor) -> QuantisedRows:
        self.made += 1
        return QuantisedRows(x.round().to(torch.int8), torch.ones(len(x)), self.input_scale)


def test_the_same_input_is_rounded_once() -> None:
    latest, rounding, x = LatestInput(), Rounding(), torch.randn(2, 3, 4)
    rows = latest.quantised(x, rounding)
    assert rows.q.shape == (6, 4)
    assert latest.quantised(x, rounding) is rows
    assert rounding.made == 1
    assert latest.quantised(x, Rounding(torch.ones(4))) is not rows  # their features have other scales
    assert latest.quantised(x, rounding) is not rows  # only the latest is kept


def test_features_apart_are_not_rounded() -> None:
    latest, rounding, x, apart = LatestInput(), Rounding(), torch.randn(2, 3, 4), torch.tensor([2, 0])
    rows = latest.quantised(x, rounding, apart)
    assert rows.values is not None
    assert torch.equal(rows.values, x.view(6, 4)[:, apart])
    assert not rows.q[:, apart].any()
    assert latest.latest(x, rounding, apart) is rows
    assert latest.latest(x, rounding, apart.clone()) is latest.latest(x, rounding) is None


def test_a_changed_input_is_another_one() -> None:
    latest, rounding, x = LatestInput(), Rounding(), torch.zeros(3, 4)
    assert latest.latest(x, rounding) is None
    latest.quantised(x, rounding)
    x.add_(2)
    assert latest.latest(x, rounding) is None
    assert (latest.quantised(x, rounding).q == 2).all()
    assert latest.latest(x.clone(), rounding) is None
    with torch.inference_mode():
        inference = torch.ones(3, 4)
        latest.quantised(inference, rounding)
    assert latest.latest(x, rounding) is not None  # a tensor without a version is not remembered


def test_it_goes_with_the_input() -> None:
    latest, x = LatestInput(), torch.randn(3, 4)
    rows = weakref.ref(latest.quantised(x, Rounding()))
    assert rows() is not None
    del x
    assert rows() is None


def test_threads_share_nothing() -> None:
    latest, rounding, x = LatestInput(), Rounding(), torch.randn(3, 4)
    latest.quantised(x, rounding)
    thread = threading.Thread(target=lambda: latest.quantised(x, rounding))
    thread.start()
    thread.join()
    assert rounding.made == 2
