"""The estimators of `grad_output @ W`, and their registry by name."""

from celora.numerics.estimators.base import Estimator, Settings
from celora.numerics.estimators.columns import Columns
from celora.numerics.estimators.dense import Dense, Fp8, Int8
from celora.numerics.estimators.registry import ESTIMATORS, estimator_class, make_estimator, register_estimator
from celora.numerics.estimators.tokens import Tokens

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
    "register_estimator",
]
