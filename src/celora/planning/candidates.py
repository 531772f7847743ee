"""The settings that a plan considers for a layer: every registered estimator says which of its own."""

from __future__ import annotations

import torch

from celora.numerics.estimators import ESTIMATORS, Estimator, make_estimator
from celora.settings.config import LayerConfig

EXACT = LayerConfig("dense")  # what every candidate is compared with, and the only estimator that planning names


def make_candidate(setting: LayerConfig, shape: tuple[int, int], device: torch.device) -> Estimator:
    """The estimator of this setting for a layer of this shape (out_features, in_features) on this device."""
    estimator = make_estimator(setting.estimator, *shape, vars(setting))
    estimator.device = device
    return estimator


def candidates(shape: tuple[int, int], device: torch.device) -> dict[LayerConfig, Estimator]:
    """All that a plan considers for a layer of this shape on this device, exact first, each with its estimator.

    What has no product for this shape here is left out, and so is what cannot pay on this device.
    """
    found = {EXACT: make_candidate(EXACT, shape, device)}
    for name, cls in ESTIMATORS.items():
        for fields in cls.candidates(*shape, device):
            setting = LayerConfig(name, **{"rank": 0, **fields})
            estimator = make_candidate(setting, shape, device)
            if not (estimator.product.slow(device) or estimator.unavailable()):
                found[setting] = estimator
    return found
