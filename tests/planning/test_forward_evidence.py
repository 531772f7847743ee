"""Forwards in 8 bits in plans: where they are chosen, what they cost, and that the model is as before."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel

import celora
from celora import CELoraConfig, CELoraError, Plan
from celora.modeling.eight_bit import EightBitForward
from celora.modeling.survey import survey
from celora.numerics.estimators import Finding
from celora.numerics.products.both_ways import Int8BothWays
from celora.planning import planner
from celora.planning.bench import Bench, Layer, _TimedGraft
from celora.planning.candidates import EXACT, candidates, make_candidate
from celora.planning.evidence import evidence
from celora.planning.forward_evidence import _milliseconds, forward_evidence
from celora.planning.influence import by_group
from celora.planning.observe import observe
from celora.planning.planner import make_plans
from celora.settings.config import LayerConfig
from machine import refuses
from patching import patch_all
from without import count_linear

INT8, COLUMNS = LayerConfig("int8", rank=0), LayerConfig("columns", keep_ratio=0.5, rank=0)
BOTH_WAYS = LayerConfig("int8", rank=0, forward="int8")
Batches = list[dict[str, torch.Tensor]]


@pytest.fixture
def fast_forwards(free_estimates: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On such small matrices no forward in 8 bits is faster. Pretend that each takes a quarter."""
    patch_all(monkeypatch, "celora.planning.forward_evidence:_milliseconds", lambda layer: (1.0, 0.25, 0.25))


@pytest.mark.parametrize("fidelity", [0.99, 0.9999])
def test_the_plan_keeps_what_was_asked_for(
    model: PeftModel, batches: Batches, fast_forwards: None, fidelity: float
) -> None:
    if refuses():
        return
    before = celora.make_plan(model, batches, fidelity)
    plan = celora.make_plan(model, batches, fidelity, forward=True)
    assert before.forwards == 0
    assert plan.forwards > 0
    assert plan.audited_cosine >= fidelity
    assert plan.memory_limit >= sum(max(c.memory for c in layer.candidates) for layer in plan.layers)
    assert f"{plan.forwards} forwards in 8 bits change the loss by" in str(plan)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    celora.attach(model, dataclasses.replace(plan.config(), spread=False))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model(**batches[0]).loss.backward()  # layers select and learn the scales of inputs from the batch of the planner
    optimizer.step()
    audit = celora.audit(model, batches[2])
    assert audit.cosine == pytest.approx(plan.audited_cosine, abs=1e-4)
    assert audit.loss_shift == pytest.approx(plan.loss_shift, abs=2e-6)


def test_a_higher_fidelity_takes_fewer(model: PeftModel, batches: Batches, fast_forwards: None) -> None:
    if refuses():
        return
    plans = [celora.make_plan(model, batches, fidelity, forward=True) for fidelity in (0.9, 0.99999, 1.0)]
    counts = [plan.forwards for plan in plans]
    assert counts[0] > counts[1] >= counts[2] == 0
    assert plans[2].loss_shift == 0


def test_a_plan_without_estimates_shifts_nothing(
    model: PeftModel, batches: Batches, fast_forwards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was audited before it."""
    if refuses():
        return
    patch_all(
        monkeypatch,
        "celora.planning.candidates:candidates",
        lambda shape, device: {setting: make_candidate(setting, shape, device) for setting in (EXACT, INT8)},
    )
    plan, exact = make_plans(model, batches, [0.9, 1.0], forward=True)
    assert plan.loss_shift != 0 != plan.forwards
    assert exact.loss_shift == 0 == exact.forwards
    assert Plan.from_dict(exact.to_dict()) == exact


def test_a_forward_that_makes_the_loss_infinite_is_refused(
    model: PeftModel, batches: Batches, fast_forwards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refuses():
        return
    name, layer = next((name, layer) for name, layer in survey(model).layers.items() if name.endswith("down_proj"))
    forward = EightBitForward.forward

    def broken(self: EightBitForward, module: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, module, *args, **kwargs) * (torch.inf if module is layer.base else 1)

    monkeypatch.setattr(EightBitForward, "forward", broken)
    plan = celora.make_plan(model, batches, 0.9, forward=True)
    settings = {planned.name: planned.choice.setting for planned in plan.layers}
    assert plan.audited_cosine >= 0.9
    assert settings[name].forward == "exact"
    assert plan.forwards > 0
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_progress_goes_on_to_the_end(model: PeftModel, batches: Batches, fast_forwards: None) -> None:
    if refuses():
        return
    told: list[tuple[str, float]] = []
    celora.make_plan(model, batches, 0.9, forward=True, progress=lambda what, share: told.append((what, share)))
    assert "probing forwards" in dict(told)
    assert [share for _, share in told] == sorted(share for _, share in told)


@pytest.mark.parametrize("attached", [True, False])
def test_the_model_is_as_before(model: PeftModel, batches: Batches, fast_forwards: None, attached: bool) -> None:
    if refuses():
        return
    if attached:
        celora.attach(model, CELoraConfig(estimator="int8", forward="int8"))

    def own() -> dict[str, Any]:
        return {name: layer.base.__dict__.get("forward") for name, layer in survey(model).layers.items()}

    before = own(), [dict(module._forward_hooks) for module in model.modules()]
    assert attached == (set(before[0].values()) != {None})
    celora.make_plan(model, batches, 0.9, forward=True)
    assert (own(), [dict(module._forward_hooks) for module in model.modules()]) == before


def test_no_forward_is_planned_where_none_is_faster(
    model: PeftModel, batches: Batches, free_estimates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_all(monkeypatch, "celora.planning.forward_evidence:_milliseconds", lambda layer: (1.0, 0.99, 0.99))
    plan, without = (celora.make_plan(model, batches, 0.9, forward=forward) for forward in (True, False))
    assert plan.layers == without.layers


@pytest.mark.parametrize("pays", [True, False])
def test_forwards_are_kept_if_the_whole_plan_is_faster(
    model: PeftModel, batches: Batches, fast_forwards: None, monkeypatch: pytest.MonkeyPatch, pays: bool
) -> None:
    if refuses():
        return

    def time_of(bench: Bench, layers: Any, settings: dict[str, LayerConfig]) -> float:
        return 0.4 if pays == any(setting.forward != "exact" for setting in settings.values()) else 0.6

    monkeypatch.setattr(Bench, "time", time_of)
    plan = celora.make_plan(model, batches, 0.99, forward=True)
    assert (plan.forwards > 0) is pays
    assert plan.audited_time == 0.4
    assert plan.loss_shift == 0 or pays
    assert all(c.forward_error < 1 for layer in plan.layers for c in layer.candidates)


def test_a_faster_plan_that_misses_the_fidelity_is_not_taken(
    model: PeftModel, batches: Batches, fast_forwards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refuses():
        return
    finish = planner._finish

    def finished(*given: Any) -> Plan:
        plan = finish(*given)
        return plan if plan.forwards else dataclasses.replace(plan, audited_time=0.1, audited_cosine=0.98)

    patch_all(monkeypatch, "celora.planning.planner:_finish", finished)
    plan = celora.make_plan(model, batches, 0.99, forward=True)
    assert plan.forwards
    assert plan.audited_cosine >= 0.99


def test_the_layer_s_own_forward_takes_what_the_exact_product_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, base = count_linear(monkeypatch), torch.nn.Linear(48, 32)
    layer: Any = SimpleNamespace(base=base, dtype=torch.float32, tokens=16, shape=(32, 48))
    _milliseconds(layer)
    assert {*seen} == {((16, 48), (32, 48))}


def test_candidates_with_both_directions_stand_beside_those_with_one() -> None:
    linear = torch.nn.Linear(80, 48, bias=False).requires_grad_(False)
    known = candidates((48, 80), torch.device("cpu"))
    if refuses():
        return
    layer = Layer(
        "layer", linear, known, fused=True, tokens=64, tuner=linear, forward_ms=(1.0, 0.3), forward_error=0.02
    )
    layer.findings = {INT8: [Finding(0.01)], COLUMNS: [Finding(0.4)]}
    found = evidence(layer, {EXACT: 1.0, INT8: 0.5, COLUMNS: 0.6}, overhead_ms=0.0).candidates
    told = {c.setting: (c.time_ms, c.relative_error, c.forward_error) for c in found}
    expected = {EXACT: (2.0, 0, 0), INT8: (1.5, 0.01, 0), BOTH_WAYS: (0.8, 0.01, 0.02), COLUMNS: (1.6, 0.4, 0)}
    assert told == {setting: pytest.approx(values) for setting, values in expected.items()}


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "other"])
def test_forwards_that_checkpointing_repeats_are_counted(
    model: PeftModel, batches: Batches, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So are inputs that are rounded once for several layers: k, v and up read those of q and gate."""
    model.enable_input_require_grads()
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    layers = [Layer(x.name, x.base, {EXACT: make_candidate(EXACT, x.shape, x.device)}, tuner=x.module)
              for x in survey(model).layers.values()]  # fmt: skip
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    bench = Bench(model.train(), parameters, batches, None, lambda: None, lambda what, share: None)
    observe(bench, layers)
    passes = 1 if checkpointing == "none" else 2
    firsts = ("q_proj", "o_proj", "gate_proj", "down_proj")
    for layer in layers:
        assert layer.forwards == passes
        assert layer.new_inputs == (passes if layer.name.endswith(firsts) else 0)
        assert "forward" not in layer.base.__dict__
    patch_all(monkeypatch, "celora.planning.forward_evidence:_milliseconds", lambda layer: (1.0, 0.5, 0.25))
    monkeypatch.setattr(Bench, "fidelity", lambda *_, **__: SimpleNamespace(relative_error=0.1))
    forward_evidence(bench, layers)
    assert {layer.forward_ms for layer in layers if layer.name.endswith(firsts)} == {(passes * 1.0, passes * 0.5)}
    assert {layer.forward_ms for layer in layers if not layer.name.endswith(firsts)} == {(passes * 1.0, passes * 0.25)}


def test_a_plan_predicts_the_forwards_that_checkpointing_repeats(
    model: PeftModel, batches: Batches, fast_forwards: None
) -> None:
    """Of a backward that takes 1 and each forward that takes 1, with 8 bits in both directions 0.6 and 0.25 remain."""
    if refuses():
        return
    predicted = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        plan = celora.make_plan(model, batches, 0.5, forward=True)
        predicted.append({layer.dense_ms for layer in plan.layers})
        in_8_bits = {c.time_ms for layer in plan.layers for c in layer.candidates if c.setting == BOTH_WAYS}
        assert [*in_8_bits] == pytest.approx([0.6 + 0.25 * (1 + checkpointed)])
    assert predicted == [{2.0}, {3.0}]


def test_rounding_a_new_input_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the numbers of products and of roundings in place of a clock."""
    if refuses():
        return
    linear, done = torch.nn.Linear(80, 48, bias=False).requires_grad_(False), Counter[str]()
    packed = type(Int8BothWays()._multiplied_with(torch.ones(48, 80)))
    for name in ("quantise", "multiply"):
        usual = getattr(packed, name)

        def counted(*given: Any, _name: str = name, _usual: Any = usual, **more: Any) -> Any:
            done[_name] += 1
            return _usual(*given, **more)

        monkeypatch.setattr(packed, name, counted)

    def interleaved(calls: Any, **_: Any) -> Any:
        taken = {}
        for _ in range(3):  # in turns
            for name, call in calls.items():
                done.clear()
                call()
                taken[name] = {"time_ms": 10.0 if name == "own" else done["multiply"] + 0.5 * done["quantise"]}
        return taken

    patch_all(monkeypatch, "celora.planning.forward_evidence:interleaved", interleaved)
    found = _milliseconds(Layer("layer", linear, {}, tokens=64, tuner=linear))
    assert found == ((10.0, 1.5, 1.0) if Int8BothWays().pays(48, 80, torch.device("cpu")) else (10.0, 10.0, 10.0))


def test_a_rate_of_depths_and_kinds_becomes_one_of_each_layer() -> None:
    layers = [
        Layer(f"{block}.{kind}", torch.nn.Linear(1, 1), {}) for block in range(30) for kind in ("q_proj", "down_proj")
    ]

    def rate(group: list[Layer]) -> float:
        kinds = {layer.name.partition(".")[2] for layer in group}
        if len(kinds) == 1:
            return 1.0 if kinds == {"q_proj"} else 3.0
        return float(group[0].name.partition(".")[0])

    done: list[float] = []
    rates = dict(zip((layer.name for layer in layers), by_group(layers, rate, done.append), strict=True))
    assert rates["0.q_proj"] == 0
    assert (rates["5.q_proj"], rates["5.down_proj"]) == (5 * 0.5, 5 * 1.5)
    assert rates["9.q_proj"] == rates["5.q_proj"]  # of one depth
    assert done[-1] == 1
    assert by_group([], rate, done.append) == []


def test_an_infinite_rate_concerns_its_depth_and_its_kind_only() -> None:
    layers = [Layer(f"{block}.{kind}", torch.nn.Linear(1, 1), {}) for block in range(30) for kind in ("q", "k", "v")]

    def rate(group: list[Layer]) -> float:
        return torch.inf if any(layer.name == "0.q" for layer in group) else 2.0

    rates = dict(zip((layer.name for layer in layers), by_group(layers, rate, lambda _: None), strict=True))
    concerned = {layer.name for layer in layers[:15]} | {f"{block}.q" for block in range(30)}
    assert rates == {name: torch.inf if name in concerned else pytest.approx(2) for name in rates}


@pytest.mark.parametrize("row", [[0, 1.0, 0.1], [0, 1.0, 0.1, 0, 0.2, 0.3], [0, 1.0, 0.1, 0, -0.2]])
def test_a_plan_with_other_numbers_is_refused(
    model: PeftModel, batches: Batches, free_estimates: None, row: Any
) -> None:
    document = celora.make_plan(model, batches, 0.9).to_dict()
    document["layers"][0]["candidates"][0] = row
    with pytest.raises(CELoraError, match="not a whole plan"):
        Plan.from_dict(document)


@pytest.mark.parametrize(("forward_ms", "most"), [((1.0, 0.5), 2), ((0.0, 0.0), 1)])
def test_times_inside_whole_passes_include_planned_forwards(
    model: PeftModel, batches: Batches, monkeypatch: pytest.MonkeyPatch, forward_ms: tuple[float, float], most: int
) -> None:
    """By a clock that goes on by one at each reading, every product takes one."""
    if refuses():
        return
    grafts: list[Any] = []
    monkeypatch.setattr(_TimedGraft, "__del__", lambda graft: grafts.append(graft.seconds), raising=False)
    patch_all(monkeypatch, "celora.planning.bench:time", SimpleNamespace(perf_counter=itertools.count().__next__))
    layers = {
        layer.name: Layer(layer.name, layer.base, {}, tuner=layer.module, forward_ms=forward_ms)
        for layer in survey(model).layers.values()
    }
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    bench = Bench(model.train(), parameters, batches, None, lambda: None, lambda what, share: None)
    assert bench.time(layers, dict.fromkeys(layers, BOTH_WAYS if any(forward_ms) else INT8)) == 1
    gc.collect()
    assert max(grafts) == most
    assert all("forward" not in layer.base.__dict__ for layer in layers.values())
    assert not any(layer.base._forward_pre_hooks for layer in layers.values())
