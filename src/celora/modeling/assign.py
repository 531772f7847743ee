"""Choose the estimator of one layer from the configuration."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from celora.errors import CELoraError
from celora.modeling.report import LOSSLESS, LayerReport
from celora.modeling.survey import cannot_estimate
from celora.numerics.estimators import Estimator, estimator_class, make_estimator
from celora.settings.config import CELoraConfig, LayerConfig, balanced_rank
from celora.weights.read import device_of, shape_of

_EXACT_AT_1 = {("topk", "native"), ("sampled", "native")}


def last_block(names: Iterable[str]) -> set[str]:
    """The layers of the last decoder block: those with the highest number in their names."""
    numbers = {name: next((int(part) for part in name.split(".") if part.isdigit()), -1) for name in names}
    highest = max(numbers.values(), default=-1)
    return {name for name, number in numbers.items() if number == highest >= 0}


def choose_estimator(
    name: str, module: BaseTunerLayer, config: CELoraConfig, *, last: bool = False
) -> tuple[LayerReport, Estimator | None]:
    base, reason = module.get_base_layer(), cannot_estimate(module)
    out_features, in_features = shape_of(base)
    if reason:
        return LayerReport(name, out_features, in_features, "dense", 1.0, reason=reason), None
    setting = config.for_layer(name)
    # On accelerators tokens are not counted but taken by the share of the latest refresh: too few, some time.
    if last and setting.estimator == "dense" and device_of(base).type == "cpu":
        setting = LOSSLESS
    kind = estimator_class(setting.estimator)
    exact = setting.keep_ratio == 1 and (setting.selection, setting.precision) in _EXACT_AT_1
    if setting.estimator == "dense" or (exact and "keep_ratio" in kind.uses):
        return LayerReport(name, out_features, in_features, "dense", 1.0), None
    rank = _rank(name, module, setting) if "rank" in kind.uses else 0
    # Layers that drew the same numbers would not be independent, and unbiased estimates not unbiased through depth.
    seed = zlib.crc32(f"{config.seed} {name}".encode())
    chosen: dict[str, Any] = dataclasses.asdict(setting) | {"rank": rank, "seed": seed}
    try:
        estimator = make_estimator(setting.estimator, out_features, in_features, chosen)
    except CELoraError as error:
        raise CELoraError(f"layer {name!r}: {error}") from None
    if config.synchronise and setting.factor == "gradient" and rank:
        raise CELoraError(
            f"layer {name!r}: synchronise=True beside a gradient factor, which each process makes of its own "
            "gradients; use factor='svd' or rank=0."
        )
    estimator.agreed, estimator.device = config.synchronise, device_of(base)
    if reason := estimator.product.unavailable(out_features, in_features, device_of(base)):
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
    )
    return report, estimator


def _rank(name: str, module: BaseTunerLayer, setting: LayerConfig) -> int:
    if isinstance(setting.rank, int):
        return setting.rank
    ranks = getattr(module, "r", None)
    if not isinstance(ranks, dict) or not ranks:
        raise CELoraError(
            f"rank={setting.rank!r} for {name!r}, a {type(module).__name__} without a LoRA rank; give an integer."
        )
    adapter = next((a for a in module.active_adapters if a in ranks), next(iter(ranks)))
    lora_rank = int(ranks[adapter])
    rank = lora_rank if setting.rank == "adapter" else balanced_rank(lora_rank)
    return min(rank, *shape_of(module.get_base_layer()))
