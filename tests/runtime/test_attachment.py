"""An attachment while its model trains: when it refreshes, what it monitors, and how copies behave."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import statistics
import warnings
import weakref
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import celora
from celora import CELoraConfig
from celora.modeling.switch import Mode
from celora.numerics.estimators import Columns
from celora.runtime.attachment import Attachment, require
from machine import refuses_config
from patching import patch_all
from small import MEMBERS, adapter, make_batch, make_model, train

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3)


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("evaluate", [False, True])
def test_refreshes_at_optimizer_steps_0_tau_2tau(
    model: PeftModel, checkpointing: str | None, accumulate: int, evaluate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    celora.attach(model, HALF)
    observed: dict[int, int] = {}
    selected: list[int] = []
    observe, select = Columns.observe, Columns.select
    graft = next(g for n, g in require(model).grafts.items() if n.endswith("layers.1.mlp.up_proj"))

    def count_observe(self: Columns, *args: Any) -> None:
        if self is graft.estimator:
            step = require(model).clock.step
            observed[step] = observed.get(step, 0) + 1
        observe(self, *args)

    def count_select(self: Columns) -> None:
        if self is graft.estimator:
            selected.append(require(model).clock.step - 1)
        select(self)

    monkeypatch.setattr(Columns, "observe", count_observe)
    monkeypatch.setattr(Columns, "select", count_select)

    def between() -> None:
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(**make_batch(9))
            model.train()

    train(model, 8, accumulate=accumulate, between=between)
    assert observed == {0: accumulate, 3: accumulate, 6: accumulate}
    assert selected == [0, 3, 6]
    assert require(model).refreshes == 3


def test_a_refresh_step_is_exact() -> None:
    plain, estimated = make_model(), make_model()
    celora.attach(estimated, HALF)
    train(plain, 1)
    train(estimated, 1)
    found = adapter(estimated)
    for name, value in adapter(plain).items():
        assert value.equal(found[name])


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_a_copy_of_the_model_is_attached_too_and_trains_the_same(model: PeftModel, how: str) -> None:
    celora.attach(model, HALF)
    train(model, 2)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert require(twin) is not require(model)
    for m in (model, twin):
        train(m, 4, first=2)
        assert (require(m).clock.step, require(m).refreshes) == (6, 2)
    found = adapter(twin)
    for name, value in adapter(model).items():
        assert value.equal(found[name])


def test_a_dropped_model_is_freed_at_once() -> None:
    model = make_model()
    celora.attach(model, HALF)
    train(model, 2)
    attachment = weakref.ref(require(model))
    gc.collect()
    gc.disable()
    try:
        del model
        assert attachment() is None
    finally:
        gc.enable()


def test_permuting_a_layers_gradient_permutes_its_selection(model: PeftModel) -> None:
    """Tests the whole machinery: the gradient of `up_proj` is permuted on its way into the graft."""
    name = "base_model.model.model.layers.1.mlp.up_proj"
    base = model.get_submodule(name).get_base_layer()
    base.weight.data.fill_(0.1)  # with equal weights, the gradient alone decides
    permutation = torch.randperm(80)
    chosen = []
    for permute in (False, True):
        twin = copy.deepcopy(model)
        celora.attach(twin, CELoraConfig(keep_ratio=0.5, rank=0))

        def reorder(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.view_as(output)
            output.register_hook(lambda g: g[..., permutation])
            return output

        if permute:
            twin.get_submodule(name).get_base_layer().register_forward_hook(reorder)
        train(twin, 1)
        estimator = require(twin).grafts[name].estimator
        assert isinstance(estimator, Columns)
        assert estimator.index is not None
        chosen.append(set(estimator.index.tolist()))
    assert chosen[0] != chosen[1]
    assert {int(permutation[i]) for i in chosen[1]} == chosen[0]


def test_an_optimizer_of_other_tensors_is_said(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    celora.attach(model, HALF)
    optimizer = torch.optim.SGD([p.detach().clone() for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch).loss.backward()
    for _ in range(4):  # steps of another model, while this one is idle
        optimizer.step()
    model(**batch).loss.backward()
    optimizer.step()
    model(**batch).loss.backward()
    with pytest.warns(UserWarning, match="three optimizer steps, none of a parameter of this model"):
        optimizer.step()


@pytest.mark.parametrize("how", ["by hand", "told", "accumulated"])
def test_a_loop_whose_steps_celora_cannot_see_is_told_what_to_call(
    how: str, model: PeftModel, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    patch_all(monkeypatch, "celora.modeling.graft:MOST_BACKWARDS", 4)
    celora.attach(model, CELoraConfig(keep_ratio=0.5, rank=0, refresh_every=3))
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for step in range(4 if how == "accumulated" else 7):
        model(**make_batch(step)).loss.backward()
        if how != "accumulated":
            torch._foreach_add_([p.data for p in parameters], [p.grad for p in parameters], alpha=-1e-3)
            model.zero_grad()
        if how == "told":
            require(model).clock.advance()
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (how == "by hand")
    assert all("4 backwards, and celora has seen no step of an optimizer" in line for line in said)
    assert require(model).clock.step == (7 if how == "told" else 0)


def test_an_idle_model_says_nothing_while_another_trains(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    other = make_model()
    for each in (model, other):
        celora.attach(each, HALF)
    for step in range(4):
        model(**batch).loss.backward()  # a teacher model, for example, runs backward and is not trained
        train(other, 1, first=step)
    assert (require(model).clock.step, require(other).clock.step) == (0, 4)


def test_a_model_that_was_moved_after_attach_is_told(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(config: str | CELoraConfig) -> None:
        with monkeypatch.context() as attaching:
            attaching.setattr(Attachment, "_device", lambda self: torch.device("cuda"))
            celora.attach(model, config)
        train(model, 11)

    with pytest.warns(UserWarning, match="was on cuda when celora was attached and trains on cpu") as told:
        move(HALF)
    assert len(told) == 1
    move("off")  # estimates nothing; warnings are errors here


def test_replicas_of_data_parallel_are_exact(model: PeftModel) -> None:
    celora.attach(model, HALF)
    train(model, 1)
    base = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").get_base_layer()
    x = torch.randn(3, 48, requires_grad=True)
    assert "Graft" in type(base(x).grad_fn).__name__
    base._is_replica = True
    assert "Graft" not in type(base(x).grad_fn).__name__


def test_spread_refreshes_take_turns_and_come_round(model: PeftModel) -> None:
    model.enable_input_require_grads()  # otherwise the first layers would never see a gradient
    celora.attach(model, CELoraConfig(keep_ratio=0.5, rank=0, refresh_every=14, spread=True))
    grafts = list(require(model).grafts.values())
    observing = []
    for _ in range(14 + 28):
        observing.append([i for i, graft in enumerate(grafts) if graft.mode is Mode.OBSERVE])
        train(model, 1)
    # every layer observes soon, but not all at once
    assert {i for step in observing[:11] for i in step} == set(range(14))
    assert max(map(len, observing[:14])) <= 6
    assert observing[14:] == [[i] for i in range(14)] * 2


def test_layers_of_a_deep_model_share_their_turns(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a turn for each layer, a model of 200 layers would have no step in which nothing is read or agreed upon."""
    model.enable_input_require_grads()
    monkeypatch.setattr("celora.runtime.attachment._TURNS", 5)
    celora.attach(model, CELoraConfig("tokens", selection="energy", rank=0, refresh_every=20, spread=True))
    attachment, observing = require(model), {}
    for step in range(20, 40):
        attachment.set_modes(step)
        observing[step] = [graft for graft in attachment.grafts.values() if graft.mode is Mode.OBSERVE]
    busy = [step for step, grafts in observing.items() if grafts]
    assert busy == [20, 24, 28, 32, 36]
    assert {len(observing[step]) for step in busy} == {2, 3}
    assert sum(map(len, observing.values())) == 14


@pytest.mark.parametrize("start", [0.999, 0.7])
def test_the_controller_holds_the_error_near_the_target(start: float) -> None:
    """At first, a share of 0.999 loses nothing of so few tokens; 0.7 loses more than the target (an error of 0.55)."""
    model = make_model()
    config = CELoraConfig(estimator="tokens", keep_ratio=start, rank=0, selection="energy", refresh_every=1)
    celora.attach(model, dataclasses.replace(config, target_error=0.3))
    train(model, 16)
    assert statistics.median(require(model).relative_errors.values()) == pytest.approx(0.3, rel=0.15)


def test_the_monitor_says_once_that_an_error_has_reached_1() -> None:
    """Sampling a twentieth of the columns has a relative error above 1. Keeping half of the tokens does not."""
    sampled = CELoraConfig(keep_ratio=0.05, rank=0, selection="sampled", refresh_every=2)
    model = make_model()
    celora.attach(model, sampled)
    with pytest.warns(UserWarning, match=r"the relative error of .* is .* Convergence is proven for errors below 1"):
        train(model, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        celora.attach(model, CELoraConfig(estimator="tokens", keep_ratio=0.5, rank=0, refresh_every=2))
        train(model, 4)


@pytest.mark.parametrize("config", ["exact", HALF, MEMBERS["int8"]], ids=["exact", "columns", "int8"])
def test_offloaded_weights_stay_exact(config: Any, batch: dict[str, torch.Tensor]) -> None:
    """accelerate takes the weights away again after each forward."""
    if isinstance(config, CELoraConfig) and refuses_config(config):
        return
    from accelerate import cpu_offload

    model = make_model().train()
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for name, module in list(model.named_modules()):
        if name.endswith("base_layer"):
            cpu_offload(module, execution_device=torch.device("cpu"))
    celora.attach(model, config)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(**batch).loss.backward()
    told = [one for one in said if "is offloaded, so its backward is exact" in str(one.message)]
    assert len(told) == 1
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name])


@pytest.mark.parametrize("config", ["paper", "exact", "auto", dataclasses.replace(HALF, synchronise=True)], ids=str)
def test_a_block_that_is_removed_or_wrapped_later_is_trained_without(config: str | CELoraConfig) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = make_model()
    celora.attach(model, config)
    decoder = model.get_base_model().model
    decoder.layers, model.config.num_hidden_layers = decoder.layers[:1], 1
    decoder.layers[0].mlp = Wrapped(decoder.layers[0].mlp)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="celora: padding stays")  # since a module is the user's own
        train(model, 11)
    names = require(model).grafted().keys()
    assert names == {name for name in require(model).grafts if "layers.0." in name}
    assert any("mlp" in name for name in names) == bool(names)


@pytest.mark.parametrize("preset", ["exact", "auto"])
def test_a_step_while_nothing_trains(preset: str) -> None:
    """PEFT's `disable_adapter` freezes the adapters for a while."""
    model = make_model()
    celora.attach(model, preset)
    optimizer = train(model, 1)
    model(**make_batch(1)).loss.backward()
    with model.disable_adapter():
        optimizer.step()
    train(model, 1, first=2, optimizer=optimizer)
    assert require(model).clock.step == 3


def test_a_layer_whose_input_needs_no_gradient_is_looked_at_in_refreshes_only(model: PeftModel) -> None:
    celora.attach(model, CELoraConfig(estimator="columns", keep_ratio=0.5, rank=0, refresh_every=3))
    graft = require(model).grafts["base_model.model.model.layers.0.self_attn.q_proj"]
    modes: list[Mode] = []
    train(model, 5, between=lambda: modes.append(graft.mode))
    assert graft.needed is False
    assert modes == [Mode.EXACT, Mode.EXACT, Mode.OBSERVE, Mode.EXACT, Mode.EXACT]
