"""The latest input of a thread in 8 bits. Query, key and value share an input, and so do gate and up.

In: `x: (..., in)`. Out: its `QuantisedRows`, (T, in). Layers that follow each other get the same rows, for a forward in
8 bits (`celora.numerics.products.both_ways`) or for the gradient of `lora_A` (`celora.numerics.saved`).
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from typing import Protocol

from torch import Tensor

from celora.kernels.packed import QuantisedRows


class Quantiser(Protocol):
    """Rounds inputs. Two of one class with the same `input_scale` round alike."""

    @property
    def input_scale(self) -> Tensor | None:
        """What input features are multiplied with before rounding, (in,) float32; None for 1."""

    def quantise(self, x: Tensor) -> QuantisedRows:
        """The rows of `x: (T, in)` in 8 bits."""


class LatestInput(threading.local):
    """The latest input of each thread in 8 bits.

    It is dropped together with the input. It is made again for another input, or if the input was changed in place. A
    change through `.data` or a NumPy view is not noticed.
    """

    def __init__(self) -> None:
        self._known: list[tuple[weakref.ref[Tensor], int, type, QuantisedRows]] = []  # at most one

    def quantised(self, x: Tensor, by: Quantiser, apart: Tensor | None = None) -> QuantisedRows:
        """The rows of `x: (..., in)` as `by` rounds them. The features `apart: (k,)` are not rounded, but kept."""
        if x.is_inference():  # such a tensor has no version, so a change would go unnoticed
            return _rounded(x, by, apart)
        rows = self.latest(x, by, apart)
        if rows is None:
            rows = _rounded(x, by, apart)
            self._known[:] = [(weakref.ref(x, functools.partial(_drop, self._known)), x._version, type(by), rows)]
        return rows

    def latest(self, x: Tensor, by: Quantiser, apart: Tensor | None = None) -> QuantisedRows | None:
        """The rows of x, if x is the latest input; else None."""
        known = next(iter(self._known), None)
        if known is None or known[0]() is not x or known[1:3] != (x._version, type(by)):
            return None
        rows = known[3]
        return rows if rows.input_scale is by.input_scale and rows.apart is apart else None


def _rounded(x: Tensor, by: Quantiser, apart: Tensor | None) -> QuantisedRows:
    x = x.reshape(-1, x.shape[-1])
    if apart is None:
        return by.quantise(x)
    return dataclasses.replace(by.quantise(x.index_fill(1, apart, 0)), apart=apart, values=x[:, apart])


def _drop(known: list[tuple[weakref.ref[Tensor], int, type, QuantisedRows]], gone: object) -> None:
    """Forget an input that is gone. The last to refer to it may be another thread."""
    if known and known[0][0] is gone:
        known.clear()
