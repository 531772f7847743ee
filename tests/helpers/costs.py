"""Pretended times of estimates that do not depend on the machine. The kept share counts as the time."""

from __future__ import annotations

from celora.planning.candidates import EXACT
from celora.settings.config import LayerConfig


class Costs(dict[LayerConfig, float]):
    """Milliseconds of a setting: the kept share, unless a test puts in another number."""

    def __missing__(self, setting: LayerConfig) -> float:
        if setting == EXACT:
            return 1.0
        if setting.estimator in ("int8", "fp8"):
            return 0.6 if setting.weight_copy else 0.8
        cheaper = 1.0 if setting.precision == "native" else 0.5
        return cheaper * setting.keep_ratio * (1.0 if setting.weight_copy else 1.2)
