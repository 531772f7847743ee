"""The ways to estimate `grad_output @ W`, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celora.errors import unknown
from celora.numerics.estimators.base import Estimator, Settings
from celora.numerics.estimators.columns import Columns
from celora.numerics.estimators.dense import Dense, Fp8, Int8
from celora.numerics.estimators.tokens import Tokens

ESTIMATORS: dict[str, type[Estimator]] = {cls.name: cls for cls in (Dense, Columns, Tokens, Int8, Fp8)}


def estimator_class(name: str) -> type[Estimator]:
    """The estimator registered under `name`; CELoraError with the nearest name if there is none."""
    try:
        return ESTIMATORS[name]
    except KeyError:
        raise unknown("estimator", name, ESTIMATORS) from None


def make_estimator(name: str, out_features: int, in_features: int, settings: Mapping[str, Any]) -> Estimator:
    """The estimator `name` with those of the `settings` that mean something to it."""
    kind = estimator_class(name)
    return kind(out_features, in_features, **{key: settings[key] for key in kind.uses & settings.keys()})


__all__ = [
    "ESTIMATORS",
    "Columns",
    "Dense",
    "Estimator",
    "Fp8",
    "Int8",
    "Settings",
    "Tokens",
    "estimator_class",
    "make_estimator",
]
