"""What each candidate costs, in time, and loses, in error, for each layer."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from celora.machine.timing import interleaved
from celora.modeling.graft import LayerGraft
from celora.modeling.language_model import find_language_model
from celora.modeling.recognise import IGNORED
from celora.modeling.switch import Mode, Switch
from celora.numerics.estimators import Dense, Estimator
from celora.numerics.head import chunk_size, through_the_head
from celora.planning.bench import Bench, Kind, Layer, candidate_estimator
from celora.planning.candidates import HEAD_SHARES, precision_of, tokens_setting
from celora.planning.plan import Candidate, PlannedLayer
from celora.settings.config import LayerConfig
from celora.settings.names import HEAD
from celora.weights.read import read
from celora.weights.sharded import whole

_TIMED_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the tokens; times in between are interpolated
_MARGIN = 0.97  # an estimate must beat the dense product by more than timing noise, or the layer stays dense


def time_kinds(layers: list[Layer]) -> dict[Kind, dict[tuple[str, bool, float], float]]:
    """For each kind of layer: (what, whether it keeps a copy, share kept) -> milliseconds."""
    found: dict[Kind, dict[tuple[str, bool, float], float]] = {}
    for layer in layers:
        if layer.kind in found:
            continue
        precisions = sorted({(s.precision, s.weight_copy) for s in layer.candidates if s.estimator == "tokens"})
        weight = read(layer.base, layer.dtype)
        # What is in the gradient does not matter to the time, except that zeros would not be kept.
        grad = torch.randn(layer.tokens, layer.shape[0], device=weight.device).to(layer.dtype)
        contenders: dict[tuple[str, bool, float], Estimator] = {("dense", True, 1.0): Dense(*layer.shape)}
        for setting in layer.candidates:
            if setting.estimator in ("int8", "fp8"):
                contenders[setting.estimator, setting.weight_copy, 1.0] = candidate_estimator(layer, setting)
            elif setting.estimator == "columns":
                estimator = candidate_estimator(layer, setting)
                estimator.observe(grad, weight, grad @ weight.to(grad.dtype))
                estimator.select()
                contenders[f"columns {setting.precision}", True, setting.keep_ratio] = estimator
        for precision, copy in precisions:
            for share in _TIMED_SHARES:
                setting = dataclasses.replace(tokens_setting(share, precision, copy=copy), selection="topk")
                if share == 1:  # where topk would not even look
                    setting = tokens_setting(1.0, precision, copy=copy)
                contenders[f"tokens {precision}", copy, share] = candidate_estimator(layer, setting)
        calls = {
            "/".join(map(str, key)): functools.partial(estimator.estimate, grad, weight)
            for key, estimator in contenders.items()
        }
        measured = interleaved(calls, repeats=7, device=weight.device)
        found[layer.kind] = {key: measured["/".join(map(str, key))]["time_ms"] for key in contenders}
    return found


def graft_overhead(device: torch.device, dtype: torch.dtype) -> float:
    """Milliseconds that a graft adds to a layer's forward and backward: a layer left alone does not have them."""
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


def _time(setting: LayerConfig, kept: float, times: Mapping[tuple[str, bool, float], float]) -> float:
    """Milliseconds of a candidate that keeps this share of the tokens: between the two shares that were timed."""
    if setting.estimator in ("dense", "int8", "fp8"):
        return times[setting.estimator, setting.weight_copy, 1.0]
    if setting.estimator == "columns":
        return times[f"columns {setting.precision}", True, setting.keep_ratio]
    at = [times[f"tokens {setting.precision}", setting.weight_copy, share] for share in _TIMED_SHARES]
    low = next((i for i in range(len(at) - 2) if kept <= _TIMED_SHARES[i + 1]), len(at) - 2)
    along = (kept - _TIMED_SHARES[low]) / (_TIMED_SHARES[low + 1] - _TIMED_SHARES[low])
    return max(0.0, at[low] + along * (at[low + 1] - at[low]))


def evidence(layer: Layer, times: Mapping[tuple[str, bool, float], float], overhead_ms: float) -> PlannedLayer:
    """All candidates of one layer that are faster than dense, with dense first."""
    out_features, in_features = layer.shape
    dense = times["dense", True, 1.0]
    found = [Candidate(LayerConfig("dense"), dense, 0.0)]
    for setting in layer.candidates[1:]:
        bits = precision_of(setting)
        if setting.estimator == "columns" and dataclasses.replace(setting, precision="native") not in layer.errors:
            continue  # never saw a gradient to select from
        kept = 1.0
        if setting.estimator == "tokens":
            kept = statistics.fmean(layer.kept[setting.keep_ratio, layer.grain(setting)])
        milliseconds = _time(setting, kept, times) + (0.0 if layer.fused else overhead_ms)
        rounding = layer.error(LayerConfig(bits, rank=0)) if bits in ("int8", "fp8") else 0.0
        if setting.estimator in ("int8", "fp8"):
            selected = 0.0
        elif setting.estimator == "tokens":
            selected = layer.error(setting)
        else:
            selected = layer.error(dataclasses.replace(setting, precision="native"))
        memory = out_features * in_features if bits in ("int8", "fp8") and setting.weight_copy else 0
        if setting.estimator == "columns":
            memory = round(memory * setting.keep_ratio * (1 + read(layer.base, layer.dtype).dtype.itemsize))
        if milliseconds < _MARGIN * dense:
            error = (selected**2 + rounding**2) ** 0.5
            found.append(Candidate(setting, round(milliseconds, 5), round(error, 6), memory))
    return PlannedLayer(layer.name, out_features, in_features, layer.influence, tuple(found), 0)


def head_evidence(bench: Bench) -> list[PlannedLayer]:
    """The vocabulary projection and what its shares of the words take and lose; nothing where celora does not do it."""
    causal, batch = find_language_model(bench.model)[0], bench.batches[bench.measuring]
    labels = batch.get("labels")
    if bench.forward is None or causal is None or not isinstance(labels, Tensor) or labels.dim() != 2:
        return []
    settings = {share: LayerConfig("columns", keep_ratio=share, rank=0) for share in HEAD_SHARES}
    errors = {share: bench.audit({}, {HEAD: of}).relative_error for share, of in settings.items()}
    if errors[HEAD_SHARES[-1]] == 0:  # a hundredth of the words loses nothing: the loss of this batch is not ours
        return []
    weight = whole(cast(Tensor, causal.get_output_embeddings().weight)).detach()
    tokens = int((labels[:, 1:] != IGNORED).sum())
    size = chunk_size(tokens, len(weight))
    grad = torch.randn(size, len(weight), device=weight.device).to(weight.dtype)
    out = grad.new_empty(size, weight.shape[1])
    calls = {
        str(share): functools.partial(through_the_head, grad, weight, share, out, 0) for share in (1.0, *HEAD_SHARES)
    }
    ms = {call: of["time_ms"] * tokens / size for call, of in interleaved(calls, repeats=5, device=grad.device).items()}
    found = [Candidate(LayerConfig("dense"), round(ms["1.0"], 5), 0.0)]
    for share, setting in settings.items():
        if ms[str(share)] < _MARGIN * ms["1.0"]:
            found.append(Candidate(setting, round(ms[str(share)], 5), round(errors[share], 6)))
    return [PlannedLayer(HEAD, len(weight), weight.shape[1], 1.0, tuple(found), 0)]
