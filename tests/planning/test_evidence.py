"""Which settings are timed for the candidates, and how the candidates' times follow from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from peft import PeftModel

import celora
from celora import quantise_base
from celora.modeling.survey import survey
from celora.numerics.estimators import Finding
from celora.planning.bench import Layer
from celora.planning.candidates import EXACT, candidates
from celora.planning.evidence import evidence, graft_overhead, time_kinds
from celora.settings.config import LayerConfig
from machine import refuses
from patching import patch_all
from small import make_batch


def _layer(**changes: Any) -> Layer:
    linear = torch.nn.Linear(80, 48, bias=False).requires_grad_(False)
    return Layer("layer", linear, candidates((48, 80), torch.device("cpu")), tokens=64, **changes)


@pytest.mark.parametrize(("kept", "expected"), [(0.05, 0.2), (0.5, 0.5), (0.6, 0.56), (1.0, 0.9)])
def test_the_time_of_a_share_of_the_tokens_lies_between_two_that_are_timed(kept: float, expected: float) -> None:
    setting = LayerConfig("tokens", keep_ratio=0.95, rank=0, selection="energy")
    layer = _layer(findings={setting: [Finding(0.1, kept), Finding(0.1, kept)]})
    times = {0.125: 0.25, 0.25: 0.333333, 0.5: 0.5, 0.75: 0.65, 1.0: 0.9}
    timed = {
        LayerConfig("tokens", keep_ratio=share, rank=0, selection="energy" if share == 1 else "topk"): ms
        for share, ms in times.items()
    }
    found = evidence(layer, {EXACT: 1.0, **timed}, overhead_ms=0.0).candidates
    assert [candidate.setting for candidate in found] == [EXACT, setting]
    assert found[1].time_ms == pytest.approx(expected, abs=1e-5)
    assert found[1].relative_error == 0.1


def test_what_never_saw_a_gradient_or_is_no_faster_is_no_candidate() -> None:
    columns = LayerConfig("columns", keep_ratio=0.5, rank=0)
    assert evidence(_layer(), {EXACT: 1.0}, 0.0).candidates[1:] == ()
    layer = _layer(findings={columns: [Finding(0.3)]})
    assert evidence(layer, {EXACT: 1.0, columns: 0.98}, 0.0).candidates[1:] == ()
    assert evidence(layer, {EXACT: 1.0, columns: 0.5}, 0.5).candidates[1:] == ()
    assert evidence(layer, {EXACT: 1.0, columns: 0.5}, 0.0).candidates[1].setting == columns


def test_everything_that_candidates_need_is_timed_once() -> None:
    tokens = [LayerConfig("tokens", keep_ratio=share, rank=0, selection="energy") for share in (0.95, 0.8)]
    layer = _layer(findings={setting: [Finding(0.1, kept)] for setting, kept in zip(tokens, (0.6, 0.3), strict=True)})
    (times,) = time_kinds([layer, layer]).values()
    assert sorted(setting.keep_ratio for setting in times if setting.estimator == "tokens") == [0.25, 0.5, 0.75]
    assert all(ms > 0 for ms in times.values())


def test_layers_with_other_numbers_of_tokens_are_timed_for_themselves(model: PeftModel) -> None:
    layers = [
        Layer(layer.name, layer.base, candidates(layer.shape, layer.device), tokens=tokens)
        for tokens, layer in zip((4, 4, 4000), list(survey(model).layers.values())[:3:2] * 2, strict=False)
    ]
    assert len(time_kinds(layers)) == len({layer.kind for layer in layers}) > len({x.shape for x in layers})


def test_what_a_graft_itself_takes_is_counted(model: PeftModel, free_estimates: None, monkeypatch: Any) -> None:
    """The graft's own time counts, unless the layer has a graft anyway because its adapter is fused."""
    patch_all(monkeypatch, "celora.planning.evidence:graft_overhead", lambda device, dtype: 0.3)
    fused = celora.make_plan(model, [make_batch(0)], 0.9)
    assert min(c.time_ms for layer in fused.layers for c in layer.candidates[1:]) < 0.3
    for layer in survey(model).layers.values():
        part = layer.module.lora_B["default"]
        part.forward = part.forward  # a forward of its own keeps the adapter from being fused
    plan = celora.make_plan(model, [make_batch(0)], 0.9)
    assert all(0.3 < c.time_ms < 0.97 for layer in plan.layers for c in layer.candidates[1:])
    patch_all(monkeypatch, "celora.planning.evidence:graft_overhead", lambda device, dtype: 1.0)
    assert {layer.chosen for layer in celora.make_plan(model, [make_batch(0)], 0.5).layers} == {0}
    monkeypatch.undo()
    assert 0 <= graft_overhead(torch.device("cpu"), torch.float32) < 100


def test_a_base_in_8_bits_lends_its_bytes_to_estimates_of_all_rows() -> None:
    """Columns pack the rows that they keep. So they have a copy of their own."""
    if refuses():
        return
    settings = [
        LayerConfig("columns", keep_ratio=0.5, rank=0, precision="int8"),
        LayerConfig("tokens", keep_ratio=0.95, rank=0, selection="energy", precision="int8"),
        LayerConfig("int8", rank=0),
    ]
    layer = _layer(findings={setting: [Finding(0.1, 1.0)] for setting in settings})
    model = torch.nn.Sequential(layer.base)
    taken = []
    for _ in range(2):
        times = {timed: 0.5 for setting in settings for timed, _ in layer.timed_as(setting)}
        found = {c.setting: c.memory for c in evidence(layer, {EXACT: 1.0, **times}, 0.0).candidates}
        taken.append([found[setting] for setting in settings])
        quantise_base(model)
        layer = dataclasses.replace(layer, base=model[0])
    assert taken == [[24 * 80, 48 * 80, 48 * 80], [24 * 80, 0, 0]]
