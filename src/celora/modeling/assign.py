"""Chooses the estimator of one layer by the configuration."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterable
from typing import Any

from celora.errors import CELoraError
from celora.modeling.report import LOSSLESS, LayerReport
from celora.modeling.survey import AdaptedLayer
from celora.numerics.estimators import Estimator, estimator_class, make_estimator
from celora.settings.config import CELoraConfig, LayerConfig, balanced_rank

_EXACT_AT_1 = {("topk", "native"), ("sampled", "native")}


def last_block(names: Iterable[str]) -> set[str]:
    """The layers of the last block: those with the highest number in their names. Each tower has one."""
    found = {name: match for name in names if (match := re.match(r"(.*?)(?<![^.])(\d+)(?![^.])", name))}
    highest: dict[str, int] = {}
    for tower, number in (match.groups() for match in found.values()):
        highest[tower] = max(int(number), highest.get(tower, 0))
    return {name for name, match in found.items() if int(match[2]) == highest[match[1]]}


def choose_estimator(
    layer: AdaptedLayer, config: CELoraConfig, *, last: bool = False
) -> tuple[LayerReport, Estimator | None]:
    """The setting of this layer in the configuration, and its estimator; None for the exact backward.

    `last`: whether the layer is in the last decoder block.

    Raises:
        CELoraError: the layer cannot have the estimator in the configuration, or its input cannot be saved as asked.
    """
    report, estimator = _choose(layer, config, last=last)
    saved = config.for_layer(layer.name).saved_input
    if layer.cannot_estimate or saved == "forward":
        return report, estimator
    if saved == "int8" and layer.cannot_fuse:
        raise CELoraError(
            f"layer {layer.name!r}: saved_input='int8' needs a fused adapter, and this one takes PEFT's own path: "
            f"{layer.cannot_fuse}. Give the layer an override with saved_input='forward'."
        )
    return dataclasses.replace(report, saved_input=saved), estimator


def _choose(layer: AdaptedLayer, config: CELoraConfig, *, last: bool) -> tuple[LayerReport, Estimator | None]:
    name, out_features, in_features, device = layer.name, layer.out_features, layer.in_features, layer.device
    if layer.cannot_estimate:
        return LayerReport(name, out_features, in_features, "dense", 1.0, reason=layer.cannot_estimate), None
    setting = config.for_layer(name)
    # Not on an accelerator: there tokens are not counted, and the share of the latest refresh may be too small.
    if last and setting.estimator == "dense" and device.type == "cpu":
        setting = LOSSLESS
    kind = estimator_class(setting.estimator)
    exact = setting.keep_ratio == 1 and (setting.selection, setting.precision) in _EXACT_AT_1
    if setting.estimator == "dense" or (exact and "keep_ratio" in kind.uses):
        return LayerReport(name, out_features, in_features, "dense", 1.0), None
    rank = rank_of(layer, setting)
    # Each layer draws its own numbers: unbiased estimates stay unbiased through depth only if they are independent.
    seed = zlib.crc32(f"{config.seed} {name}".encode())
    chosen: dict[str, Any] = dataclasses.asdict(setting) | {"rank": rank, "seed": seed}
    if not layer.takes_forward:
        chosen["forward"] = "exact"
    try:
        estimator = make_estimator(setting.estimator, out_features, in_features, chosen)
    except CELoraError as error:
        raise CELoraError(f"layer {name!r}: {error}") from None
    if config.synchronise and setting.factor == "gradient" and rank:
        raise CELoraError(
            f"layer {name!r}: synchronise=True beside a gradient factor, which each process makes of its own "
            "gradients; use factor='svd' or rank=0."
        )
    estimator.agreed, estimator.device = config.synchronise, device
    if reason := estimator.unavailable():
        return LayerReport(name, out_features, in_features, "dense", 1.0, reason=reason), None
    selected = "keep_ratio" in kind.uses
    report = LayerReport(
        name,
        out_features,
        in_features,
        estimator.name,
        estimator.cost,
        setting.keep_ratio if selected else 1.0,
        rank,
        selection=setting.selection if selected else "",
        precision=estimator.settings.precision,
        forward=estimator.settings.forward,
    )
    return report, estimator


def rank_of(layer: AdaptedLayer, setting: LayerConfig) -> int:
    """The number that `setting.rank` means for this layer; 0 for an estimator without a frozen factor."""
    if "rank" not in estimator_class(setting.estimator).uses:
        return 0
    if isinstance(setting.rank, int):
        return setting.rank
    if layer.rank is None:
        raise CELoraError(
            f"rank={setting.rank!r} for {layer.name!r}, a {type(layer.module).__name__} without a LoRA rank; give an "
            "integer."
        )
    rank = layer.rank if setting.rank == "adapter" else balanced_rank(layer.rank)
    return min(rank, *layer.shape)
