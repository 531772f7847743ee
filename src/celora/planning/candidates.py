"""The settings that a plan considers for a layer and for the head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from celora.numerics.estimators.base import Precision
from celora.numerics.products.registry import PRODUCTS, make_product
from celora.settings.config import LayerConfig
from celora.weights.read import device_of, shape_of

# Shares of the squared gradient norm that `tokens` may keep; 1 leaves out only what is exactly zero.
SHARES = (1.0, 0.9999, 0.9997, 0.999, 0.997, 0.995, 0.99, 0.98, 0.97, 0.95, 0.92, 0.88, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2)
COLUMNS = (0.75, 0.5)
HEAD_SHARES = (0.3, 0.1, 0.03, 0.01)  # of the words, in the gradient of the logits


def tokens_setting(share: float, precision: Precision = "native", *, copy: bool = True) -> LayerConfig:
    return LayerConfig("tokens", keep_ratio=share, rank=0, selection="energy", precision=precision, weight_copy=copy)


def candidates(device: torch.device) -> list[LayerConfig]:
    """Everything the planner considers on this kind of device, dense first."""
    found = [LayerConfig("dense")]
    found += [tokens_setting(share) for share in SHARES]
    found += [LayerConfig("columns", keep_ratio=keep, rank=0) for keep in COLUMNS]
    formats: tuple[Precision, ...] = ("int8", "fp8")
    for precision, copy in itertools.product(formats, (True, False)):
        if make_product(precision, copy=copy).slow(device):
            continue
        found.append(LayerConfig(precision, rank=0, weight_copy=copy))
        found += [tokens_setting(share, precision, copy=copy) for share in SHARES]
        if copy:
            found += [LayerConfig("columns", keep_ratio=keep, rank=0, precision=precision) for keep in COLUMNS]
    return found


def possible(base: nn.Module, considered: Sequence[LayerConfig]) -> list[LayerConfig]:
    """Those of the candidates whose products exist for this layer's shape on its device."""
    shape, device = shape_of(base), device_of(base)
    lacking = {
        (name, copy)
        for name, copy in itertools.product(PRODUCTS, (True, False))
        if make_product(name, copy=copy).unavailable(*shape, device)
    }
    return [setting for setting in considered if (precision_of(setting), setting.weight_copy) not in lacking]


def precision_of(setting: LayerConfig) -> str:
    """The arithmetic of a setting: `int8` is one, and what others are computed in."""
    return setting.precision if setting.precision != "native" else setting.estimator
