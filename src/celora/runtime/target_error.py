"""`target_error` of the configuration: it moves each layer's `keep_ratio` to keep the error near a target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from celora.numerics.estimators import Estimator

_NAME = "keep_ratio"


def aim(estimator: Estimator, relative_error: float, target: float) -> None:
    """Move the estimator's `keep_ratio`, so that the error comes nearer to `target`. It was `relative_error`.

    The dropped share `1 - keep_ratio` is multiplied by `target / relative_error`, limited to [1/2, 2]. If `keep_ratio`
    is a share of the squared norm, it is multiplied by the square of that. Source: ours.
    """
    if _NAME not in estimator.uses or math.isnan(relative_error):
        return
    energy = estimator.settings.selection == "energy"
    ratio = target / relative_error if relative_error > 0 else math.inf
    change = min(2.0, max(0.5, ratio)) ** (2 if energy else 1)
    least = 1e-6 if energy else 1e-2
    estimator.keep_ratio = 1 - min(1 - least, max(least, (1 - estimator.keep_ratio) * change))


def state_dict(estimator: Estimator) -> dict[str, Tensor]:
    """The `keep_ratio`, if it has moved."""
    if estimator.keep_ratio == estimator.settings.keep_ratio:
        return {}
    return {_NAME: torch.tensor(estimator.keep_ratio, dtype=torch.float64, device="cpu")}


def load_state_dict(estimator: Estimator, state: dict[str, Tensor]) -> None:
    """Restore what `state_dict` returned. Call it first: the estimator's own state depends on it."""
    estimator.keep_ratio = float(state.get(_NAME, estimator.settings.keep_ratio))
