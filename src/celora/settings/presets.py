"""The presets, and how a name, a configuration or changes to one become a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from celora.errors import CELoraError, unknown
from celora.settings.config import LAYER_FIELDS, CELoraConfig

PRESETS: dict[str, CELoraConfig] = {
    # The published experiments: value and attention output keep 0.55 of the rows, up and down 0.65, the rest is dense.
    "paper": CELoraConfig(
        estimator="dense",
        overrides={
            "v_proj": {"estimator": "columns", "keep_ratio": 0.55},
            "o_proj": {"estimator": "columns", "keep_ratio": 0.55},
            "up_proj": {"estimator": "columns", "keep_ratio": 0.65},
            "down_proj": {"estimator": "columns", "keep_ratio": 0.65},
        },
        fused=True,
        labelled_head=True,
        padding_free=True,
    ),
    # Nothing is estimated: only work that changes no result is left out.
    "exact": CELoraConfig(
        estimator="dense", fused=True, labelled_head=True, padding_free=True, zero_tokens=True, spread=True
    ),
    # What `by_rule`, or a plan (celora.make_plan), is carried out in: their layers are the overrides.
    "auto": CELoraConfig(estimator="dense", spread=True, fused=True, labelled_head=True, padding_free=True),
    # Forward and backward of every frozen layer in 8 bits, of the tokens that carry 0.9997 of the gradient's energy.
    "fast": CELoraConfig(
        estimator="tokens",
        selection="energy",
        keep_ratio=0.9997,
        rank=0,
        precision="int8",
        forward="int8",
        head_keep_ratio=0.1,
        head_forward="int8",
        spread=True,
        fused=True,
        labelled_head=True,
        padding_free=True,
    ),
    "off": CELoraConfig(estimator="dense"),
}

# What preset auto begins with where no plan is asked for: 8-bit products of the tokens that carry 0.9997 of the
# gradient's energy in every layer, a tenth of the words for the head (docs/develop/log/plans.md).
RULE: Mapping[str, Any] = {
    "estimator": "tokens",
    "selection": "energy",
    "keep_ratio": 0.9997,
    "rank": 0,
    "precision": "int8",
    "head_keep_ratio": 0.1,
    "zero_tokens": True,
    "most_error": 0.05,
}


def by_rule(frame: CELoraConfig, given: Collection[str] = ()) -> CELoraConfig:
    """Preset auto with what its rule sets; `given` are the fields of `frame` that the user has set."""
    own = {*given, *(() if frame.labelled_head else ("head_keep_ratio",))}
    own |= set() if frame.target_error is None else {"most_error"}
    return dataclasses.replace(frame, **{name: value for name, value in RULE.items() if name not in own})


def resolve(config: str | CELoraConfig, changes: Mapping[str, Any] | None = None) -> CELoraConfig:
    """A preset's configuration by name, or the configuration itself; with `changes` of what concerns all layers.

    What needs the head over labelled tokens goes with it, where `labelled_head=False` says nothing else.
    """
    if not isinstance(config, str | CELoraConfig):
        raise CELoraError(f"config={config!r}; expected a CELoraConfig or one of: {', '.join(sorted(PRESETS))}.")
    if isinstance(config, str):
        if config not in PRESETS:
            raise unknown("preset", config, PRESETS)
        config = PRESETS[config]
    if not changes:
        return config
    whole = [field.name for field in dataclasses.fields(CELoraConfig) if field.name not in (*LAYER_FIELDS, "overrides")]
    for name in changes:
        if name in LAYER_FIELDS or name == "overrides":
            raise CELoraError(f"{name} is a setting of layers; give a CELoraConfig, with overrides for some of them.")
        if name not in whole:
            raise unknown("setting", name, whole)
    if changes.get("labelled_head") is False:
        changes = {"padding_free": False, "head_keep_ratio": 1.0, "head_forward": "exact", **changes}
    return dataclasses.replace(config, **changes)
