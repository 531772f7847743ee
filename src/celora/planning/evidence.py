"""Time and error of each candidate for each layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import nn

from celora.kernels.operations import linear
from celora.machine.timing import interleaved
from celora.modeling.graft import LayerGraft
from celora.modeling.switch import Mode, Switch
from celora.numerics.estimators import Dense
from celora.planning.bench import Kind, Layer
from celora.planning.candidates import EXACT
from celora.planning.plan import Candidate, PlannedLayer
from celora.settings.config import LayerConfig
from celora.weights.read import read

MARGIN = 0.97  # of the dense time: an estimate must be faster than that, or the gain may be noise


def time_kinds(layers: list[Layer]) -> dict[Kind, dict[LayerConfig, float]]:
    """For each kind of layer, the milliseconds of every setting that the candidates need timed."""
    kinds: dict[Kind, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    return {kind: _time_kind(members) for kind, members in kinds.items()}


def _time_kind(layers: list[Layer]) -> dict[LayerConfig, float]:
    """The same for layers of one kind. The settings take turns with the dense product."""
    layer = layers[0]
    needed = [timed for member in layers for setting in member.findings for timed, _ in member.timed_as(setting)]
    weight = read(layer.base, layer.dtype)
    # The values of the gradient do not change the time, except that zeros would not be kept.
    grad = torch.randn(layer.tokens, layer.shape[0], device=weight.device).to(layer.dtype)
    calls = {}
    for setting in dict.fromkeys([EXACT, *needed]):
        estimator = layer.make(setting)
        if not estimator.ready:
            estimator.observe(grad, weight, linear(grad, weight.detach().t()))
            estimator.select()
        calls[setting] = functools.partial(estimator.estimate, grad, weight)
    measured = interleaved({str(i): call for i, call in enumerate(calls.values())}, repeats=7, device=weight.device)
    return {setting: measured[str(i)]["time_ms"] for i, setting in enumerate(calls)}


def graft_overhead(device: torch.device, dtype: torch.dtype) -> float:
    """Milliseconds that a graft adds to a layer's forward and backward."""
    linears = [nn.Linear(16, 16, device=device, dtype=dtype).requires_grad_(False) for _ in range(2)]
    layer = LayerGraft(Dense(16, 16), Switch())
    layer.mode = Mode.ESTIMATE
    linears[1].register_forward_hook(layer)
    x = torch.ones(1, 16, device=device, dtype=dtype, requires_grad=True)

    def run(linear: nn.Linear) -> None:
        with torch.enable_grad():
            linear(x).sum().backward()

    calls = {name: functools.partial(run, linear) for name, linear in zip(("bare", "grafted"), linears, strict=True)}
    times = interleaved(calls, repeats=50, device=device)
    return max(0.0, times["grafted"]["time_ms"] - times["bare"]["time_ms"])


def gains(forward_ms: tuple[float, float]) -> bool:
    """Whether a forward in 8 bits is clearly faster than the layer's own."""
    own, in_8_bits = forward_ms
    return in_8_bits < MARGIN * own


def evidence(layer: Layer, times: Mapping[LayerConfig, float], overhead_ms: float) -> PlannedLayer:
    """Dense, and all candidates of one layer that are faster than dense.

    A candidate that saw no gradient to select from has no findings, and is left out. If forwards are planned, times
    include the forward, and a candidate in 8 bits also stands there with a forward in 8 bits.
    """
    dense, weight = times[EXACT], read(layer.base, layer.dtype)
    own_forward, forward_in_8_bits = layer.forward_ms
    found = [Candidate(EXACT, dense + own_forward, 0.0)]
    for setting, estimator in layer.candidates.items():
        if setting == EXACT or setting not in layer.findings:
            continue
        alone = max(0.0, sum(share * times[timed] for timed, share in layer.timed_as(setting)))
        milliseconds = alone + (0.0 if layer.fused else overhead_ms)
        if milliseconds < MARGIN * dense:
            memory = estimator.memory(weight.dtype)
            memory -= weight.shape.numel() if estimator.borrows(weight) else 0
            error = round(layer.error(setting), 6)
            found.append(Candidate(setting, round(milliseconds + own_forward, 5), error, memory))
            if gains(layer.forward_ms) and estimator.multiplies_forwards:
                both_ways, ms = dataclasses.replace(setting, forward="int8"), milliseconds + forward_in_8_bits
                found.append(Candidate(both_ways, round(ms, 5), error, memory, layer.forward_error))
    return PlannedLayer(layer.name, *layer.shape, layer.influence, tuple(found), 0)
