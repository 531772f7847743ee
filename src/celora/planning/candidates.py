"""The settings that a plan considers for a layer. Every registered estimator lists its own."""

from __future__ import annotations

import torch

from celora.numerics.estimators import ESTIMATORS, Estimator, make_estimator
from celora.settings.config import LayerConfig

EXACT = LayerConfig("dense")  # the baseline of all candidates


def make_candidate(setting: LayerConfig, shape: tuple[int, int], device: torch.device) -> Estimator:
    """The estimator of this setting for a layer of this shape (out_features, in_features) on this device."""
    estimator = make_estimator(setting.estimator, *shape, vars(setting))
    estimator.device = device
    return estimator


def candidates(shape: tuple[int, int], device: torch.device) -> dict[LayerConfig, Estimator]:
    """The settings that a plan considers for a layer of this shape here, each with its estimator; exact first.

    A setting is dropped if there is no product for this shape, or if its product is slow on this device.
    """
    found = {EXACT: make_candidate(EXACT, shape, device)}
    for name, cls in ESTIMATORS.items():
        for fields in cls.candidates(*shape, device):
            setting = LayerConfig(name, **{"rank": 0, **fields})
            estimator = make_candidate(setting, shape, device)
            if not (estimator.product.slow(device) or estimator.unavailable()):
                found[setting] = estimator
    return found
