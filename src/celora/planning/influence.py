"""Measures how much the error of one layer matters to the whole gradient."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable

from torch import Tensor

from celora.numerics.estimators import Dense
from celora.planning.bench import Bench, Layer

_DEPTHS, _MOST_KINDS, _FEW_LAYERS = 6, 8, 24


class _Disturbed(Dense):
    """Leaves out the tokens with the smallest gradients.

    Their number is not rounded to suit the product. Rounding could keep all tokens, and then the layer would seem to
    have no influence.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(*layer.shape)
        self.share = layer.disturbance

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        kept = max(1, round(self.share * len(grad_output)))
        return self.product.critical_rows(grad_output, weight, kept=kept, share=1.0)


def probe_influence(bench: Bench, layers: list[Layer]) -> None:
    """Disturb groups of layers, and measure how much of the error arrives in the LoRA gradient."""

    def rate(group: list[Layer]) -> float:
        error = bench.fidelity({layer.name: layer for layer in group}, _Disturbed).relative_error
        caused = sum(layer.disturbed**2 for layer in group)
        return error**2 / caused if caused > 0 else 1.0

    progress = functools.partial(bench.progress, "probing influence")
    for layer, influence in zip(layers, by_group(layers, rate, lambda done: progress(0.25 + 0.25 * done)), strict=True):
        layer.influence = round(influence, 8)


def by_group(
    layers: list[Layer], rate: Callable[[list[Layer]], float], progress: Callable[[float], None]
) -> list[float]:
    """A number for each layer, from the `rate` of groups of layers: by depth, times that of its kind over the mean.

    If there are few layers, each is a group. Where one of the two is infinite, so is the number. `progress` is called
    with the share that is done.
    """
    size = 1 if len(layers) <= _FEW_LAYERS else -(-len(layers) // _DEPTHS)
    depths = [layers[i : i + size] for i in range(0, len(layers), size)]
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    groups = depths + (list(kinds.values()) if size > 1 and 1 < len(kinds) <= _MOST_KINDS else [])
    rates = []
    for i, group in enumerate(groups):
        rates.append(rate(group))
        progress((i + 1) / len(groups))
    kind_rates = dict(zip(kinds, rates[len(depths) :], strict=True)) if len(groups) > len(depths) else {}
    finite = [found for found in kind_rates.values() if found < math.inf]
    mean = statistics.fmean(finite) if finite else 0.0
    of_kind = {kind: found / mean if mean > 0 else 1.0 for kind, found in kind_rates.items()}
    found = [(rates[i // size], of_kind.get(layer.name.rpartition(".")[2], 1.0)) for i, layer in enumerate(layers)]
    return [math.inf if math.inf in both else both[0] * both[1] for both in found]
