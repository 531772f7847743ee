"""Measures how much the error of one layer matters to the whole gradient."""

from __future__ import annotations

import statistics

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
    """Disturb groups of layers, by depth and by kind, and measure how much of the error arrives in the LoRA gradient.

    If there are few layers, they are disturbed one by one.
    """
    size = 1 if len(layers) <= _FEW_LAYERS else -(-len(layers) // _DEPTHS)
    depths = [layers[i : i + size] for i in range(0, len(layers), size)]
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    groups = depths + (list(kinds.values()) if size > 1 and 1 < len(kinds) <= _MOST_KINDS else [])
    arrived = []
    for i, group in enumerate(groups):
        error = bench.fidelity({layer.name: layer for layer in group}, _Disturbed).relative_error
        caused = sum(layer.disturbed**2 for layer in group)
        arrived.append(error**2 / caused if caused > 0 else 1.0)
        bench.progress("probing influence", 0.25 + 0.4 * (i + 1) / len(groups))
    mean = statistics.fmean(arrived[len(depths) :]) if len(groups) > len(depths) else 0.0
    for group, rate in zip(depths, arrived, strict=False):
        for layer in group:
            layer.influence = rate
    if mean > 0:
        for group, rate in zip(kinds.values(), arrived[len(depths) :], strict=True):
            for layer in group:
                layer.influence *= rate / mean
    for layer in layers:
        layer.influence = round(layer.influence, 8)
