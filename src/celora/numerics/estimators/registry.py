"""The estimators of `grad_output @ W` by name. `register_estimator` adds one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from celora.errors import CELoraError, unknown
from celora.numerics.estimators.base import Estimator
from celora.numerics.estimators.columns import Columns
from celora.numerics.estimators.dense import Dense, Fp8, Int8
from celora.numerics.estimators.more.columns_by_energy import ColumnsByEnergy
from celora.numerics.estimators.more.sampled import SampledColumns, SampledTokens
from celora.numerics.estimators.tokens import Tokens

ESTIMATORS: dict[str, type[Estimator]] = {cls.name: cls for cls in (Dense, Columns, Tokens, Int8, Fp8)}
# (estimator, selection) -> the class, if the estimator's own class lacks the selection.
_VARIANTS: dict[tuple[str, str], type[Estimator]] = {
    (cls.name, cls.selections[0]): cls for cls in (ColumnsByEnergy, SampledColumns, SampledTokens)
}
Kind = TypeVar("Kind", bound=type[Estimator])


def register_estimator(cls: Kind) -> Kind:
    """Make an estimator known by its `name` to configurations, audits, checkpoints and reports.

    Call it, or use it as a decorator of the class, in every program that trains with the estimator, or that reads a
    configuration with its name. It replaces a class of the same module and name, so that a notebook's cell can
    run again.

    Raises:
        CELoraError: not a subclass of `Estimator` with a `name`, `cost` and `estimate`, or the name is taken.
    """
    if not (isinstance(cls, type) and issubclass(cls, Estimator)):
        raise CELoraError(f"{cls!r} is not a subclass of celora.numerics.estimators.Estimator.")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name:
        raise CELoraError(f"{cls.__name__}.name={name!r}; expected the name of the estimator, like 'columns'.")
    if inspect.isabstract(cls):
        raise CELoraError(f"{cls.__name__} does not implement {', '.join(sorted(cls.__abstractmethods__))}.")
    known = ESTIMATORS.get(name, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise CELoraError(f"the name {name!r} is taken by {known.__module__}.{known.__qualname__}; choose another.")
    ESTIMATORS[name] = cls
    return cls


def estimator_class(name: str) -> type[Estimator]:
    """The estimator registered as `name`. Raises CELoraError with the nearest name if there is none."""
    try:
        return ESTIMATORS[name]
    except KeyError:
        raise unknown("estimator", name, ESTIMATORS) from None


def make_estimator(name: str, out_features: int, in_features: int, settings: Mapping[str, Any]) -> Estimator:
    """Make the estimator `name`. It gets the `settings` that it uses; others are dropped."""
    cls = estimator_class(name)
    cls = _VARIANTS.get((name, settings.get("selection", "topk")), cls)
    return cls(out_features, in_features, **{key: settings[key] for key in cls.uses & settings.keys()})
