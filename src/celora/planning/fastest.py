"""Preset `fast` without a plan: a second of timing decides what each kind of layer gets, so that none is made slower.

For layers of one shape, dtype and device, forward and backward are timed together, in turns: in 8 bits both ways, with
an exact forward, with the gradient's own products of the same tokens, and as PEFT computes them. The fastest wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from celora.machine.device import random_states
from celora.machine.processes import from_first
from celora.machine.timing import cannot_time, interleaved
from celora.modeling.survey import Survey
from celora.planning.candidates import EXACT, make_candidate
from celora.settings.config import CELoraConfig, LayerConfig

TOKENS = 512  # of the products that are timed; what is faster for so many is so for more
_REPEATS = 5
_CLEARLY = 0.97  # of PEFT's time: less of a gain is noise


def gate(found: Survey, config: CELoraConfig) -> CELoraConfig:
    """`config` with an override for each layer for which something else is faster here than its own setting.

    All processes that train together take what the first one has measured.
    """
    fields = [field.name for field in dataclasses.fields(LayerConfig)]
    own = LayerConfig(**{name: getattr(config, name) for name in fields})
    kinds: dict[tuple[tuple[int, int], torch.dtype, torch.device, bool], list[str]] = {}
    for name, layer in found.layers.items():
        timed = not layer.cannot_estimate and layer.dtype is not None and not cannot_time(layer.device)
        if timed and layer.dtype is not None and config.for_layer(name) == own:
            kinds.setdefault((layer.shape, layer.dtype, layer.device, layer.takes_forward), []).append(name)
    overrides: dict[str, Mapping[str, Any]] = {}
    with random_states({device for _, _, device, _ in kinds}):
        for (shape, dtype, device, takes_forward), names in kinds.items():
            best = _fastest(own if takes_forward else dataclasses.replace(own, forward="exact"), shape, dtype, device)
            changes = {field: getattr(best, field) for field in fields if getattr(best, field) != getattr(own, field)}
            if best == EXACT:  # to which the other fields mean nothing
                changes = {"estimator": EXACT.estimator}
            overrides |= dict.fromkeys(names, changes) if changes else {}
    return dataclasses.replace(config, overrides=from_first({**config.overrides, **overrides}))


def _fastest(own: LayerConfig, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> LayerConfig:
    """The fastest setting for a layer of this kind; `EXACT` where none is clearly faster than that."""
    backward = dataclasses.replace(own, forward="exact")
    settings = dict.fromkeys((own, backward, dataclasses.replace(backward, precision="native")))
    out_features, in_features = shape
    dtype = dtype if dtype.is_floating_point else torch.bfloat16  # a quantised layer's products
    w = torch.randn(out_features, in_features, dtype=dtype, device=device) / in_features**0.5
    x = torch.randn(TOKENS, in_features, dtype=dtype, device=device)
    # A gradient sits in some of its tokens. Of log-normal norms, about 92 % of the tokens hold 0.9997 of the energy.
    g = torch.randn(TOKENS, out_features, dtype=dtype, device=device)
    g *= torch.randn(TOKENS, 1, dtype=dtype, device=device).exp()
    contenders = {EXACT: _step(EXACT, shape, w, x, g)}
    for setting in settings:
        product = make_candidate(setting, shape, device).product
        if product.pays(*shape, device):
            contenders[setting] = _step(setting, shape, w, x, g)
    named = {str(i): step for i, step in enumerate(contenders.values())}
    times = [found["time_ms"] for found in interleaved(named, repeats=_REPEATS, device=device).values()]
    best, time = min(zip(contenders, times, strict=True), key=lambda pair: pair[1])
    return best if time < _CLEARLY * times[0] else EXACT


def _step(setting: LayerConfig, shape: tuple[int, int], w: Tensor, x: Tensor, g: Tensor) -> Callable[[], object]:
    """The products of one layer's forward and backward."""
    estimator = make_candidate(setting, shape, w.device)
    estimator.observe(g, w, x)
    estimator.select()
    product: Any = estimator.product

    def step() -> object:
        y = x @ w.t() if setting.forward == "exact" else product.forward(x, w, None)
        return y, estimator.estimate(g, w)

    return step
