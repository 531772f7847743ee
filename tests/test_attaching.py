"""Attaching to real PEFT models, and detaching: what changes, what does not, and what is reported."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from torch.optim import optimizer as optim

import celora
from celora import CELoraConfig, CELoraError
from celora.modeling.graft import LayerGraft
from celora.numerics.factor import svd_factor
from celora.runtime.attachment import find, require
from forked import code, run
from machine import refuses
from small import MEMBERS, adapter, make_base, make_model, mixed_model, train

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3)


def _footprint(model: nn.Module) -> list[Any]:
    """All modules with class, attributes and hooks; the keys of the state; and all globals that celora could change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return [
        [(n, type(m), sorted(m.__dict__), [dict(getattr(m, h)) for h in hooks]) for n, m in model.named_modules()],
        [(k, id(v)) for k, v in model.state_dict(keep_vars=True).items()],
        dict(optim._global_optimizer_post_hooks),
        torch.get_rng_state().tolist(),
    ]


def test_attach_and_detach_leave_no_trace(model: PeftModel) -> None:
    before = _footprint(model)
    celora.attach(model, HALF)
    assert list(model.state_dict()) == [key for key, _ in before[1]]
    celora.detach(model)
    assert _footprint(model) == before
    celora.detach(model)  # nothing is attached, so nothing happens
    assert _footprint(model) == before


def test_training_after_detach_is_training_never_attached() -> None:
    plain, touched = make_model(lora_dropout=0.1), make_model(lora_dropout=0.1)
    celora.attach(touched, HALF)
    celora.detach(touched)
    for model in (plain, touched):
        torch.manual_seed(5)
        train(model, 5)
    found = adapter(touched)
    for name, value in adapter(plain).items():
        assert value.equal(found[name])


def test_the_forward_is_exact_and_the_backward_is_not(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    plain = copy.deepcopy(model)
    celora.attach(model, HALF)
    train(model, 1)
    plain.load_state_dict(model.state_dict())
    losses = [m(**batch).loss for m in (plain, model)]
    assert losses[0].equal(losses[1])
    for value in losses:
        value.backward()
    grads = [[p.grad for p in m.parameters() if p.requires_grad] for m in (plain, model)]
    assert any(not a.equal(b) for a, b in zip(*grads, strict=True))


def test_attaching_again_is_idempotent_and_another_configuration_replaces(model: PeftModel) -> None:
    first = celora.attach(model, HALF)
    train(model, 2)
    attachment = find(model)
    assert celora.attach(model, HALF) == first
    assert find(model) is attachment
    # Trainer may do this; the report then has one more piece of advice
    model.base_model.model.model.gradient_checkpointing = True
    assert any("checkpointing" in note for note in celora.attach(model, HALF).notes)
    assert find(model) is attachment
    model.base_model.model.model.gradient_checkpointing = False
    celora.attach(model, "paper")
    hooks = [h for m in model.modules() for h in m._forward_hooks.values() if isinstance(h, LayerGraft)]
    assert len(hooks) == 14  # one for the adapter of each layer
    assert len(require(model).grafts) == 8
    assert require(model).clock.step == 0


def test_attaching_the_same_again_under_another_name_counts(model: PeftModel) -> None:
    """Whether this machine's times settled the configuration decides how another machine's state is resumed."""
    celora.attach(model, "fast")
    attachment = require(model)
    for config, timed in ((attachment.config, False), ("fast", True)):
        celora.attach(model, config)
        assert require(model) is attachment
        assert attachment.timed is timed


def test_weights_are_factored_before_the_first_step_where_they_are_at_hand(model: PeftModel) -> None:
    celora.attach(model, HALF)
    for name, graft in require(model).grafts.items():
        weight = model.get_submodule(name).get_base_layer().weight
        U, V = svd_factor(weight.detach(), HALF.rank, seed=graft.estimator.settings.seed)
        assert graft.estimator.factor.U.equal(U)
        assert graft.estimator.factor.V.equal(V)


def test_a_weight_that_a_launcher_has_yet_to_put_in_place_is_left_to_the_first_refresh(model: PeftModel) -> None:
    names = [f"base_model.model.model.layers.0.mlp.{kind}_proj" for kind in ("up", "gate", "down")]
    up, gate, down = (model.get_submodule(name).get_base_layer() for name in names)
    up.to("meta")
    gate.weight.data = torch.empty(0)  # ZeRO-3 leaves an empty weight
    down.weight.data = torch.full_like(down.weight, torch.nan)  # nobody has written to this memory
    celora.attach(model, HALF)
    grafts = require(model).grafts
    assert {name for name, graft in grafts.items() if graft.estimator.factor.V is None} == set(names)
    # The device that the weight will be on decides, as in processes that have it already. Else they would wait for each
    # other.
    assert refuses() or names[0] in celora.attach(model, MEMBERS["int8"]).estimated


def test_clear_errors(model: PeftModel) -> None:
    with pytest.raises(CELoraError, match="unknown preset 'papper'; did you mean 'paper'"):
        celora.attach(model, "papper")
    with pytest.raises(CELoraError, match=r"rank=49 for a 48 x 48 weight; expected 0 <= rank <= 48"):
        celora.attach(model, CELoraConfig(rank=49))
    with pytest.raises(CELoraError, match="no PEFT layers in Linear; add an adapter first"):
        celora.attach(nn.Linear(2, 2))
    with pytest.raises(CELoraError, match=r"SimpleNamespace is not a model; give the model itself, .* trainer\.model"):
        celora.attach(SimpleNamespace(model=model), "exact")
    for call in (celora.detach, celora.quantise_base):
        with pytest.raises(CELoraError, match="NoneType is not a model"):
            call(None)  # type: ignore[arg-type]
    with pytest.raises(CELoraError, match="unknown setting 'labeled_head'"):  # before it times
        celora.attach(model, "auto", labeled_head=False)
    with pytest.raises(CELoraError, match="batches is gone: preset auto decides by a rule, by timing, and while"):
        celora.attach(model, "auto", batches=[])
    prompts = get_peft_model(make_base(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(CELoraError, match="PROMPT_TUNING adapts no layer"):
        celora.attach(prompts, "exact")
    model.merge_adapter()
    with pytest.raises(
        CELoraError, match=r"the adapter is merged into its base .* call model.unmerge_adapter\(\) first"
    ):
        celora.attach(model)
    assert find(model) is None


@pytest.mark.parametrize("first", [HALF, "off"])
def test_attaching_to_an_inner_model_ends_the_outer_attachment(model: PeftModel, first: Any) -> None:
    celora.attach(model, first)
    outer = require(model)
    celora.attach(model.base_model, "paper")
    assert find(model) is find(model.base_model) is not outer
    assert not outer.switch.on
    train(model, 2)
    assert (require(model).clock.step, outer.clock.step) == (2, 0)
    celora.detach(model.base_model)
    assert find(model) is None


def test_detaching_a_part_says_that_the_rest_ends_too() -> None:
    both = torch.nn.ModuleList([make_model(), make_model()])
    celora.attach(both, HALF)
    with pytest.warns(UserWarning, match="an attachment to a larger model ends; 14 other layers"):
        celora.detach(both[0])
    assert find(both) is None
    assert not [hook for module in both.modules() for hook in module._forward_hooks.values()]


def test_nothing_estimated_is_said() -> None:
    with pytest.warns(UserWarning, match="no layer can be estimated"):
        celora.attach(make_model(target_modules=["q_proj"]), "paper")


def test_a_preset_that_estimates_nothing_does_not_warn_of_one_skipped_layer() -> None:
    report = celora.attach(make_model(target_modules=["q_proj", "embed_tokens"]), "off")
    assert 0 < len(report.skipped) < len(report.layers)


def test_weights_of_another_kind_are_skipped(model: PeftModel) -> None:
    class Packed(torch.nn.Parameter):
        pass

    name = "base_model.model.model.layers.1.mlp.up_proj"
    base = model.get_submodule(name).get_base_layer()
    base.weight = Packed(base.weight.detach(), requires_grad=False)
    assert celora.attach(model, HALF).skipped == {name: "its weight is a Packed"}


def test_an_override_without_a_layer_is_said(model: PeftModel) -> None:
    with pytest.warns(UserWarning, match=r"the override '\*.qproj' matches no adapted layer"):
        celora.attach(model, CELoraConfig(rank=2, overrides={"*.qproj": {"estimator": "dense"}}))


@pytest.mark.parametrize("config", ["paper", CELoraConfig(estimator="columns", rank=0)])
def test_a_layer_under_two_kinds_of_adapters_is_estimated_once(config: Any) -> None:
    model = mixed_model().train()
    report = celora.attach(model, config)
    assert len(report.layers) == len(report.estimated) == 2
    train(model, steps=2)
    assert [graft.observed for graft in require(model).grafts.values()] == [0, 1]  # the first needs no gradient


def test_importing_celora_changes_nothing() -> None:
    """Runs in a new process without network. Nothing of torch or PEFT is replaced."""
    script = """
import socket, sys
import peft, torch, transformers
from torch.optim import optimizer
def state():
    classes = [torch.nn.Linear, torch.nn.Module, peft.tuners.lora.Linear, transformers.Trainer, torch.autograd.Function]
    return [{k: id(v) for k, v in vars(c).items()} for c in classes], len(optimizer._global_optimizer_post_hooks)
def refuse(*_): raise AssertionError("network")
socket.socket.connect = refuse
before, rng = state(), torch.get_rng_state()
import celora
assert state() == before and torch.get_rng_state().equal(rng)
assert not any(name.startswith("celora.train") for name in sys.modules)
"""
    done = run(code, script)
    assert done.returncode == 0, done.stderr


def test_layers_split_over_processes_are_left_alone(model: PeftModel) -> None:
    name = next(iter(celora.attach(model, HALF).estimated))
    model.get_submodule(name).get_base_layer()._hf_tp_plan = "colwise"
    assert celora.attach(model, HALF).skipped == {name: "it is split by tensor parallelism"}


def test_attaching_again_hooks_a_block_that_was_replaced(model: PeftModel) -> None:
    celora.attach(model, HALF)
    before = require(model)
    celora.attach(model, HALF)
    assert require(model) is before
    layers = model.get_base_model().model.layers
    layers[0] = copy.deepcopy(layers[0])
    celora.attach(model, HALF)
    train(model, 1)
    assert all(graft.observed for name, graft in require(model).grafts.items() if graft.needed)
    assert require(model).grafted().keys() == require(model).grafts.keys()
