"""Forwards in 8 bits as candidates of a plan: their time, and the error that they bring into the LoRA gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from celora.kernels.operations import linear
from celora.machine.timing import interleaved
from celora.numerics.estimators import Int8
from celora.numerics.products.base import Native
from celora.numerics.products.both_ways import Int8BothWays
from celora.planning.bench import Bench, Layer
from celora.planning.evidence import gains
from celora.planning.influence import by_group
from celora.weights.read import device_of, read


class _OnlyForward(Int8):
    """The layer's forward is in 8 bits, its backward is exact."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(*layer.shape, forward="int8")
        self.device = device_of(layer.base)

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        return Native()(grad_output, weight)


def forward_evidence(bench: Bench, layers: list[Layer]) -> None:
    """Measure `forward_ms` and `forward_error` of the layers that have a `tuner`. If none gains, leave both at zero.

    The error is measured on groups of layers, by depth and by kind: `||g - e||^2 / ||e||^2` of the LoRA gradient with
    their forwards in 8 bits, divided among them.
    """
    able = [layer for layer in layers if layer.tuner is not None]
    kinds = {layer.kind: layer for layer in able}
    times = {kind: _milliseconds(layer) for kind, layer in kinds.items()}
    taken = {layer.name: _for_one_backward(layer, *times[layer.kind]) for layer in able}
    gaining = [layer for layer in able if gains(taken[layer.name])]
    if not gaining:
        return
    for layer in able:
        layer.forward_ms = taken[layer.name]

    def rate(group: list[Layer]) -> float:
        return bench.fidelity({layer.name: layer for layer in group}, _OnlyForward).relative_error ** 2 / len(group)

    bench.progress("probing forwards", 0.5)
    errors = by_group(gaining, rate, lambda done: bench.progress("probing forwards", 0.5 + 0.15 * done))
    for layer, error in zip(gaining, errors, strict=True):
        layer.forward_error = round(error, 8)


def _for_one_backward(layer: Layer, own: float, rounded: float, shared: float) -> tuple[float, float]:
    """Milliseconds of all its forwards for one backward: its own, and in 8 bits."""
    in_8_bits = layer.new_inputs * rounded + (layer.forwards - layer.new_inputs) * shared
    return layer.forwards * own, in_8_bits


def _milliseconds(layer: Layer) -> tuple[float, float, float]:
    """Of one forward: the layer's own product, that in 8 bits of a new input, and that of the layer before's input."""
    weight, product = read(layer.base, layer.dtype), Int8BothWays()
    x = torch.randn(layer.tokens, layer.shape[1], device=weight.device).to(layer.dtype)

    def in_8_bits(times: int) -> None:
        new = x.detach()  # another tensor, so its 8 bits are not known
        for _ in range(times):
            product.forward(new, weight, None)

    calls: dict[str, Callable[[], object]] = {"own": lambda: linear(x, weight.to(x.dtype))}
    if product.pays(*layer.shape, weight.device):
        calls |= {str(times): functools.partial(in_8_bits, times) for times in (1, 2)}
    found = {name: times["time_ms"] for name, times in interleaved(calls, repeats=7, device=weight.device).items()}
    own = found["own"]
    return (own, found["1"], max(0.0, found["2"] - found["1"])) if "1" in found else (own, own, own)
