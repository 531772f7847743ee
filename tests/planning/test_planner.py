"""The planner on a tiny model: what it measures, chooses and leaves alone. Real times are not asserted."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model

import celora
from celora import CELoraError
from celora.modeling.switch import Mode, Switch
from celora.numerics.estimators import Dense
from celora.planning import bench as bench_module
from celora.planning import planner
from celora.runtime.attachment import find, require
from celora.weights.stored import StoredWeight
from machine import refuses
from patching import patch_all
from small import adapter, make_base, make_batch, make_model, masked_batch, train


def test_layers_whose_product_is_computed_elsewhere_are_not_measured(
    batches: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hra = get_peft_model(make_base(), peft.HRAConfig(r=8, target_modules=["up_proj"]))
    asked: list[Any] = []

    def no_plans(bench: Any, layers: list[Any], *_: Any) -> list[Any]:
        asked.extend(layers)
        return [None]

    patch_all(monkeypatch, "celora.planning.planner:_make_plans", no_plans)
    celora.make_plan(hra, batches)
    assert asked == []


def test_a_product_in_a_quantised_layer_s_own_dtype_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stored(StoredWeight):
        def dense(self) -> torch.Tensor:
            return self.stored

    waits: list[None] = []
    patch_all(monkeypatch, "celora.machine.timing:synchronise", lambda device: waits.append(None))
    weight = Stored(torch.ones(6, 4), torch.Size((6, 4)), torch.float32, compute_dtype=torch.bfloat16)
    graft = bench_module._TimedGraft(Dense(6, 4), Switch())
    assert graft.grad_input(torch.ones(3, 6), weight, Mode.ESTIMATE).equal(torch.full((3, 4), 6.0))
    assert len(waits) == 2  # once before and once after the product


@pytest.mark.parametrize("fidelity", [0.9, 0.99, 1.0])
def test_the_plan_keeps_what_was_asked_for(
    model: PeftModel, batches: list[dict[str, torch.Tensor]], free_estimates: None, fidelity: float
) -> None:
    plan = celora.make_plan(model, batches, fidelity)
    assert plan.predicted_cosine >= fidelity
    assert plan.audited_cosine >= fidelity  # the choice did not use this batch
    report = celora.attach(model, plan)
    assert report.estimated or fidelity == 1
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for _ in range(12):  # every layer selects from the same batch as the planner
        model(**batches[0]).loss.backward()
        optimizer.step()
    assert celora.audit(model, batches[2]).cosine == pytest.approx(plan.audited_cosine, abs=1e-4)
    assert abs(plan.predicted_cosine - plan.audited_cosine) < 0.02
    assert plan.tokens == 30  # three sequences, without their last tokens


def test_plans_are_verified_on_the_sum_of_batches_of_their_own(model: PeftModel, free_estimates: None) -> None:
    batches = [masked_batch(seed) for seed in range(12)]
    given = iter(batches)
    plan = celora.make_plan(model, given, 0.97)
    assert next(given) is batches[planner.MOST_BATCHES]  # the planner takes no more batches from a loader than it uses
    assert plan.audited_batches == planner.MOST_BATCHES - 2
    assert plan.audited_cosine >= 0.97
    celora.attach(model, dataclasses.replace(plan.config(), spread=False))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model(**batches[0]).loss.backward()  # every layer selects from the same batch as the planner
    optimizer.step()
    assert celora.audit(model, batches[2:10]).cosine == pytest.approx(plan.audited_cosine, abs=1e-4)
    assert "(sum of 8 batches)" in str(plan)


def test_a_plan_that_loses_the_same_in_every_batch_is_made_more_careful(
    model: PeftModel, free_estimates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch alone may be near enough, and their sum may still not be."""
    audit = bench_module.Bench.audit
    asked: list[float] = []

    def biased(bench: Any, layers: Any, settings: Any, numbers: Any = None) -> Any:
        found = audit(bench, layers, settings, numbers)
        if numbers is None:
            return found
        asked.append(found.cosine)
        return dataclasses.replace(found, cosine=max(0.0, 1 - 3 * (1 - found.cosine)))

    batches = [masked_batch(seed) for seed in range(10)]
    plain = celora.make_plan(model, batches, 0.95)
    monkeypatch.setattr(bench_module.Bench, "audit", biased)
    careful = celora.make_plan(model, batches, 0.95)
    assert len(asked) > 1
    assert careful.audited_cosine >= 0.95
    assert asked[-1] >= 1 - 0.05 / 3 - 1e-9
    assert careful.predicted_time > plain.predicted_time


def test_a_plan_that_misses_its_fidelity_says_so(
    model: PeftModel, batches: Any, free_estimates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = bench_module.Bench.audit

    def worse(bench: Any, layers: Any, settings: Any, numbers: Any = None) -> Any:
        found = audit(bench, layers, settings, numbers)
        return found if numbers is None else dataclasses.replace(found, cosine=0.9)

    monkeypatch.setattr(bench_module.Bench, "audit", worse)
    with pytest.warns(UserWarning, match=r"none of 4 plans kept a cosine of .*; this one keeps 0\.9000"):
        celora.make_plan(model, batches, 0.99)


def test_less_fidelity_is_cheaper(model: PeftModel, batches: Any, free_estimates: None) -> None:
    times = [celora.make_plan(model, batches, fidelity).predicted_time for fidelity in (0.8, 0.95, 0.995)]
    assert times == sorted(times)
    assert times[0] < times[-1] <= 1


def test_fidelities_come_in_any_order(model: PeftModel, batches: Any, free_estimates: None) -> None:
    """What was tried for one fidelity helps the next one, and does not hinder it."""
    for fidelities in ([1.0, 0.8, 0.95], [0.8, 1.0, 0.95]):
        times = {plan.fidelity: plan.predicted_time for plan in planner.make_plans(model, batches, fidelities)}
        assert times[0.8] < times[0.95] < times[1.0]


def test_nothing_is_left_behind(model: PeftModel, batches: Any) -> None:
    other = make_model()
    before, state = adapter(model), torch.get_rng_state()
    celora.make_plan(model, batches)
    assert torch.get_rng_state().equal(state)
    assert find(model) is None
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    train(model, 3)
    train(other, 3)
    found = adapter(model)
    for name, value in adapter(other).items():
        assert value.equal(found[name])
        assert not value.equal(before[name])


def test_an_attached_model_is_planned_as_if_it_were_not_and_stays_attached(
    model: PeftModel, batches: Any, free_estimates: None
) -> None:
    plain = celora.make_plan(model, batches)
    celora.attach(model, "paper")
    again = celora.make_plan(model, batches)
    assert again.memory_limit == plain.memory_limit
    assert [layer.chosen for layer in again.layers] == [layer.chosen for layer in plain.layers]
    assert require(model).switch.on
    train(model, 2)


def test_auto_plans_and_never_slows_a_layer_down(model: PeftModel, batches: Any) -> None:
    plan = celora.make_plan(model, batches)
    for layer in plan.layers:
        assert layer.choice.time_ms <= layer.dense_ms
        assert all(c.time_ms < layer.dense_ms for c in layer.candidates[1:])
    celora.attach(model, "auto", batches=iter(batches))
    assert require(model).config.spread
    train(model, 2)


def test_layers_that_are_not_faster_in_a_whole_backward_are_exact(
    model: PeftModel, batches: Any, free_estimates: None, wide_head: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module.Bench, "time", lambda bench, layers, settings: 1.01)
    plan = celora.make_plan(model, batches, 0.9)
    assert {layer.chosen for layer in plan.layers} == {0}
    assert plan.audited_time == plan.predicted_time == 1
    # Only the head's estimate is left. It is timed by itself.
    assert plan.config().head_keep_ratio < 1
    assert 0.9 <= plan.audited_cosine < 1 - 1e-6
    celora.attach(model, plan)
    assert celora.audit(model, batches[2]).cosine == pytest.approx(plan.audited_cosine, abs=1e-5)
    without, *_ = planner.make_plans(model, batches, [0.9], head=False)
    assert without.predicted_cosine == without.audited_cosine == 1


def test_the_memory_limit_is_kept(model: PeftModel, batches: Any, free_estimates: None) -> None:
    free = celora.make_plan(model, batches, 0.995, memory_limit=10**9)
    assert (free.memory > 0) is not refuses()  # only 8-bit copies of weights take memory
    tight = celora.make_plan(model, batches, 0.995, memory_limit=free.memory // 2)
    assert tight.memory <= free.memory // 2
    assert celora.make_plan(model, batches, 0.995, memory_limit=0).memory == 0
    default = celora.make_plan(model, batches, 0.995)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert default.memory <= default.memory_limit
    assert weights / 20 < default.memory_limit < weights


def test_one_batch_serves_for_all(model: PeftModel, free_estimates: None) -> None:
    plan = celora.make_plan(model, [make_batch(0)], 0.95)
    assert plan.predicted_cosine == pytest.approx(plan.audited_cosine, abs=1e-6)


def test_progress_is_told(model: PeftModel, batches: Any) -> None:
    told: list[tuple[str, float]] = []
    celora.make_plan(model, batches, progress=lambda what, share: told.append((what, share)))
    assert [share for _, share in told] == sorted(share for _, share in told)
    assert told[-1] == ("done", 1.0)


def test_a_loss_of_ones_own(model: PeftModel, batches: Any) -> None:
    calls = []

    def loss(module: torch.nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        return module(**batch).loss * 2

    celora.make_plan(model, batches, loss=loss)
    assert len(calls) > 10


@pytest.mark.parametrize("fidelity", [0, 1.1, -1, float("nan"), True, "0.9"])
def test_a_fidelity_out_of_range(model: PeftModel, batches: Any, fidelity: Any) -> None:
    with pytest.raises(CELoraError, match="expected a cosine"):
        celora.make_plan(model, batches, fidelity)


def test_what_cannot_be_planned(model: PeftModel) -> None:
    with pytest.raises(CELoraError, match="no batches to plan with"):
        celora.make_plan(model, [])
    with pytest.raises(CELoraError, match="no PEFT layers in Linear"):
        celora.make_plan(torch.nn.Linear(3, 3), [make_batch(0)])
    with pytest.raises(CELoraError, match="returned no loss"):
        celora.make_plan(model, [{"input_ids": make_batch(0)["input_ids"]}])


def test_where_nothing_can_be_estimated_everything_stays_exact(model: PeftModel) -> None:
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.weight.requires_grad_(True)
    plan = celora.make_plan(model, [make_batch(0)])
    assert plan.layers == ()
    assert (plan.predicted_time, plan.audited_cosine) == (1.0, 1.0)
    assert "everything stays exact" in str(plan)
    with pytest.warns(UserWarning, match="no layer can be estimated"):
        celora.attach(model, plan)
    masked = make_batch(0)
    masked["labels"][:] = -100
    model = make_model()
    masked["labels"][0, 1] = 5
    assert celora.make_plan(model, [masked]).layers


def test_on_an_accelerator_what_energy_leaves_out_is_audited(
    model: PeftModel, batches: Any, free_estimates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, an earlier batch decides what share of the tokens is kept. At first there is no such batch."""
    patch_all(monkeypatch, "celora.machine.device:reads_freely", lambda device: False)
    (plan,) = planner.make_plans(model, batches, [0.97], head=False)
    assert any(layer.choice.setting.selection == "energy" for layer in plan.layers)
    assert 0.96 < plan.audited_cosine < 0.9999
    celora.attach(model, plan)
    assert any(not graft.estimator.ready for graft in require(model).grafts.values())
    train(model, 11)
    assert all(graft.estimator.ready for graft in require(model).grafts.values())


def test_a_model_in_evaluation_mode_is_planned_as_it_will_train(
    model: PeftModel, free_estimates: None, wide_head: None
) -> None:
    """`from_pretrained` leaves the model in this mode, whatever `get_peft_model` sets for the wrapper around it."""
    masked = [masked_batch(seed) for seed in range(3)]
    plans = []
    for modes in (model.train(), model.eval()):
        modes.base_model.model.model.layers[0].train(False)
        before = [module.training for module in modes.modules()]
        plans.append(celora.make_plan(modes, masked, 0.9))
        assert [module.training for module in modes.modules()] == before
    assert plans[0].head == plans[1].head is not None
    assert plans[0].tokens == plans[1].tokens


def test_what_makes_no_sense_is_said_before_anything_is_measured(
    model: PeftModel, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_all(monkeypatch, "celora.planning.planner:_make_plans", lambda *_: pytest.fail("measured"))
    for limit in ("1GB", -1, math.inf, math.nan):
        with pytest.raises(CELoraError, match=f"memory_limit={limit!r}; expected 0 or more bytes"):
            celora.make_plan(model, batches, memory_limit=limit)  # type: ignore[arg-type]
    monkeypatch.setattr(planner, "DTensor", torch.nn.Parameter)
    with pytest.raises(CELoraError, match="a sharded model cannot be measured"):
        celora.make_plan(model, batches)
