"""The presets, and how a preset's name and changes to it become a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from celora.errors import CELoraError, unknown
from celora.settings.config import LAYER_FIELDS, CELoraConfig
from celora.settings.names import GONE

# The backward of presets `auto` and `fast`: in every layer 8-bit products of the tokens that carry 0.9997 of the
# gradient's energy, and a tenth of the words for the head.
_BACKWARD: Mapping[str, Any] = {
    "estimator": "tokens",
    "selection": "energy",
    "keep_ratio": 0.9997,
    "rank": 0,
    "precision": "int8",
    "head_keep_ratio": 0.1,
}
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
    # Nothing is estimated. It only skips work that cannot change the result.
    "exact": CELoraConfig(
        estimator="dense", fused=True, labelled_head=True, padding_free=True, zero_tokens=True, spread=True
    ),
    # The frame of preset auto: `by_rule` fills in its rule.
    "auto": CELoraConfig(estimator="dense", spread=True, fused=True, labelled_head=True, padding_free=True),
    # Every frozen layer in 8 bits, forward and backward.
    "fast": CELoraConfig(
        **_BACKWARD,
        forward="int8",
        head_forward="int8",
        spread=True,
        fused=True,
        labelled_head=True,
        padding_free=True,
    ),
    "off": CELoraConfig(estimator="dense"),
}

# The rule of preset auto.
RULE: Mapping[str, Any] = {**_BACKWARD, "zero_tokens": True, "most_error": 0.05}


def by_rule(frame: CELoraConfig, given: Collection[str] = ()) -> CELoraConfig:
    """Fill the rule of preset auto into `frame`. Fields in `given` are the user's, and stay."""
    own = {*given, *(() if frame.labelled_head else ("head_keep_ratio",))}
    own |= set() if frame.target_error is None else {"most_error"}
    return dataclasses.replace(frame, **{name: value for name, value in RULE.items() if name not in own})


def ruled(preset: object, config: CELoraConfig, given: Collection[str] = ()) -> CELoraConfig:
    """The configuration of preset `auto` with its rule, and that of every other preset as it is."""
    return by_rule(config, given) if preset == "auto" else config


def resolve(config: str | CELoraConfig, changes: Mapping[str, Any] | None = None) -> CELoraConfig:
    """The configuration of a preset, or the given configuration, with `changes` of fields that concern all layers.

    `labelled_head=False` also turns off what needs it, unless `changes` say otherwise.
    """
    if not isinstance(config, str | CELoraConfig):
        raise CELoraError(f"config={config!r}; expected a CELoraConfig or one of: {', '.join(sorted(PRESETS))}.")
    if isinstance(config, str):
        if config.endswith(".json"):
            raise CELoraError(f"{config!r} is a file; give celora.CELoraConfig.load(...) of it.")
        if config not in PRESETS:
            raise unknown("preset", config, PRESETS)
        config = PRESETS[config]
    if not changes:
        return config
    whole = [field.name for field in dataclasses.fields(CELoraConfig) if field.name not in (*LAYER_FIELDS, "overrides")]
    for name, value in changes.items():
        if name == "preset":
            raise CELoraError(
                f"preset={value!r}: a preset is the second argument; write celora.attach(model, {value!r})"
            )
        if name in LAYER_FIELDS or name == "overrides":
            raise CELoraError(f"{name} is a setting of layers; give a CELoraConfig, with overrides for some of them.")
        if name in GONE:
            raise CELoraError(f"{name} is gone: {GONE[name]}.")
        if name not in whole:
            raise unknown("setting", name, whole)
    if changes.get("labelled_head") is False:
        changes = {"padding_free": False, "head_keep_ratio": 1.0, "head_forward": "exact", **changes}
    return dataclasses.replace(config, **changes)
