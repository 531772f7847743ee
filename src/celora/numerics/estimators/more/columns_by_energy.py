"""Columns by energy: each refresh keeps the fewest columns that have a share of the squared scores."""

from __future__ import annotations

from torch import Tensor

from celora.machine.device import in_float64
from celora.numerics.estimators.columns import Columns
from celora.numerics.select import energy_count, top_k


class ColumnsByEnergy(Columns):
    """Keeps the fewest columns, the highest scores first, that have the share `keep_ratio` of the squared scores.

    A share of 1 leaves out only columns whose score is exactly zero.
    """

    selections = ("energy",)

    @property
    def _multiplied(self) -> int:
        return self.out_features if self.index is None else len(self.index)

    @property
    def keeps_all(self) -> bool:
        return False

    def _choose(self, scores: Tensor) -> None:
        self._use(top_k(scores, max(1, int(energy_count(in_float64(scores).square(), self.keep_ratio)))))

    def _fits(self, columns: int) -> bool:
        return True
