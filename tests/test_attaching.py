"""Attaching to real PEFT models, and detaching: what is touched, what is not, and what the report says."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from torch.optim import optimizer as optim

import celora
from celora import CELoraConfig, CELoraError
from celora.modeling.graft import LayerGraft
from celora.numerics.estimators import Columns
from celora.numerics.factor import svd_factor
from celora.runtime.attachment import find, require
from machine import refuses
from patching import patch_all
from small import MEMBERS, adapter, make_base, make_model, train

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3)


def _footprint(model: nn.Module) -> list[Any]:
    """Every module, its class, attributes, hooks and keys; and every global that celora could have changed."""
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
    celora.detach(model)  # nothing there: nothing happens
    assert _footprint(model) == before


def test_training_after_detach_is_training_never_attached() -> None:
    plain, touched = make_model(lora_dropout=0.1), make_model(lora_dropout=0.1)
    celora.attach(touched, HALF)
    celora.detach(touched)
    for model in (plain, touched):
        torch.manual_seed(5)
        train(model, 5)
    for name, value in adapter(plain).items():
        assert value.equal(adapter(touched)[name])


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


def test_report_says_what_and_why() -> None:
    model = make_model(target_modules=["q_proj", "v_proj", "up_proj", "embed_tokens"])
    model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    report = celora.attach(model, CELoraConfig(keep_ratio=0.25, rank=2, overrides={"v_proj": {"estimator": "dense"}}))
    prefix = "base_model.model.model"
    assert set(report.estimated) == {
        f"{prefix}.layers.0.self_attn.q_proj",
        f"{prefix}.layers.0.mlp.up_proj",
        f"{prefix}.layers.1.mlp.up_proj",
    }
    assert set(report.dense) == {f"{prefix}.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    assert report.skipped == {
        f"{prefix}.embed_tokens": "Embedding is not a linear layer",
        f"{prefix}.layers.1.self_attn.q_proj": "its weight is trained",
    }
    layer = report.estimated[f"{prefix}.layers.0.mlp.up_proj"]
    assert (layer.out_features, layer.in_features, layer.keep_ratio, layer.rank) == (80, 48, 0.25, 2)
    assert layer.cost == pytest.approx(0.25 + 2 * 128 / (80 * 48))
    table = str(report)
    assert "up_proj" in table
    assert "(its weight is trained)" in table
    assert "3 of 7 frozen layers estimated" in table


def test_paper_preset_on_a_llama(model: PeftModel) -> None:
    report = celora.attach(model, "paper")
    kinds = {(name.rpartition(".")[2], layer.keep_ratio, layer.rank) for name, layer in report.estimated.items()}
    assert kinds == {("v_proj", 0.55, 7), ("o_proj", 0.55, 7), ("up_proj", 0.65, 7), ("down_proj", 0.65, 7)}
    assert len(report.dense) == 6


def test_off_attaches_nothing(model: PeftModel) -> None:
    report = celora.attach(model, "off")
    assert report.estimated == {}
    assert report.cost == 1.0
    assert not any(isinstance(hook, LayerGraft) for m in model.modules() for hook in m._forward_hooks.values())


def test_an_override_touches_only_the_layer_it_names(model: PeftModel) -> None:
    target = "base_model.model.model.layers.1.mlp.down_proj"
    celora.attach(model, CELoraConfig(keep_ratio=0.5, rank=4, overrides={target: {"keep_ratio": 0.25, "rank": 1}}))
    for name, graft in require(model).grafts.items():
        assert isinstance(graft.estimator, Columns)
        expected = (0.25, 1) if name == target else (0.5, 4)
        assert (graft.estimator.keep_ratio, graft.estimator.settings.rank) == expected
    train(model, 1)
    for name, graft in require(model).grafts.items():
        if graft.estimator.ready:
            assert isinstance(graft.estimator, Columns)
            assert graft.estimator.index is not None
            share = len(graft.estimator.index) / graft.estimator.out_features
            assert share == pytest.approx(0.25 if name == target else 0.5, abs=0.03)


def test_attaching_again_is_idempotent_and_another_configuration_replaces(model: PeftModel) -> None:
    first = celora.attach(model, HALF)
    train(model, 2)
    attachment = find(model)
    assert celora.attach(model, HALF) == first
    assert find(model) is attachment
    model.base_model.model.model.gradient_checkpointing = True  # as Trainer may: one more piece of advice
    assert any("checkpointing" in note for note in celora.attach(model, HALF).notes)
    assert find(model) is attachment
    model.base_model.model.model.gradient_checkpointing = False
    celora.attach(model, "paper")
    hooks = [h for m in model.modules() for h in m._forward_hooks.values() if isinstance(h, LayerGraft)]
    assert len(hooks) == 14  # one for each layer, for its adapter
    assert len(require(model).grafts) == 8
    assert require(model).clock.step == 0


def test_zero_tokens_are_not_guessed_on_an_accelerator(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """There `tokens` keeps the share that the latest refresh needed: too few of them when more have labels."""
    report = celora.attach(model, "exact")
    assert [layer.label for layer in report.layers] == ["dense"] * 7 + ["dense, without zero tokens"] * 7
    celora.detach(model)
    patch_all(monkeypatch, "celora.weights.read:device_of", lambda module: torch.device("cuda"))
    assert {layer.label for layer in celora.attach(model, "exact").layers} == {"dense"}


@pytest.mark.fault(
    "numbers",
    "preset `exact` leaves out tokens whose gradient is zero",
    sees="`None of 14 frozen layers estimated: the gradient is exact LoRA's`",
    kept="the gradient; the report counts no such layer as estimated",
)
def test_leaving_out_zero_gradients_is_no_estimate(model: PeftModel) -> None:
    report = celora.attach(model, "exact")
    assert report.estimated == {}
    assert len(report.dense) == len(report.layers) == 14
    assert "None of 14 frozen layers estimated: the gradient is exact LoRA's." in str(report)
    estimated = str(celora.attach(model, HALF))
    assert "14 of 14 frozen layers estimated" in estimated
    assert "FLOPs / dense" in estimated.splitlines()[0]


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
    gate.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    down.weight.data = torch.full_like(down.weight, torch.nan)  # memory that was never written to
    celora.attach(model, HALF)
    grafts = require(model).grafts
    assert {name for name, graft in grafts.items() if graft.estimator.factor.V is None} == set(names)
    # Where it will lie decides, as in the processes where it is already: or they would wait for each other.
    assert refuses() or names[0] in celora.attach(model, MEMBERS["int8"]).estimated


def test_clear_errors(model: PeftModel) -> None:
    with pytest.raises(CELoraError, match="unknown preset 'papper'; did you mean 'paper'"):
        celora.attach(model, "papper")
    with pytest.raises(CELoraError, match=r"rank=49 for a 48 x 48 weight; expected 0 <= rank <= 48"):
        celora.attach(model, CELoraConfig(rank=49))
    with pytest.raises(CELoraError, match="no PEFT layers in Linear; add an adapter first"):
        celora.attach(nn.Linear(2, 2))
    with pytest.raises(CELoraError, match="unknown setting 'labeled_head'"):  # before it asks for batches
        celora.attach(model, "auto", labeled_head=False)
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


def test_a_missing_layer_of_a_preset_is_no_mistake() -> None:
    report = celora.attach(make_model(target_modules=["q_proj", "v_proj"]), "paper")
    assert len(report.estimated) == 2


def test_nothing_estimated_is_said() -> None:
    with pytest.warns(UserWarning, match="no layer can be estimated"):
        celora.attach(make_model(target_modules=["q_proj"]), "paper")


def test_weights_of_another_kind_are_skipped(model: PeftModel) -> None:
    class Packed(torch.nn.Parameter):
        pass

    name = "base_model.model.model.layers.1.mlp.up_proj"
    base = model.get_submodule(name).get_base_layer()
    base.weight = Packed(base.weight.detach(), requires_grad=False)
    assert celora.attach(model, HALF).skipped == {name: "its weight is a Packed"}


def test_the_adapters_own_rank() -> None:
    report = celora.attach(make_model(r=32), CELoraConfig(rank="adapter"))
    ranks = {name.rpartition(".")[2]: layer.rank for name, layer in report.estimated.items()}
    assert (ranks["up_proj"], ranks["v_proj"]) == (32, 24)  # no larger than the layer


def test_an_override_without_a_layer_is_said(model: PeftModel) -> None:
    with pytest.warns(UserWarning, match=r"the override '\*.qproj' matches no adapted layer"):
        celora.attach(model, CELoraConfig(rank=2, overrides={"*.qproj": {"estimator": "dense"}}))


def test_importing_celora_changes_nothing() -> None:
    """In a process of its own, without network, and with nothing of torch or PEFT replaced."""
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
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_independent_layers_draw_different_numbers(model: PeftModel) -> None:
    celora.attach(model, MEMBERS["sampled tokens"])
    seeds = {graft.estimator.settings.seed for graft in require(model).grafts.values()}
    assert len(seeds) == 14


def test_a_layer_that_has_no_such_product_is_skipped_with_the_reason() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24)), LoraConfig(target_modules=["0", "1"]))
    report = celora.attach(model, CELoraConfig(estimator="fp8"))
    said = "fp8 products need in_features that are a multiple of 16, not 24"
    assert report.skipped == {"base_model.model.0": said}
    assert set(report.estimated) == {"base_model.model.1"}


def test_layers_split_over_processes_are_left_alone(model: PeftModel) -> None:
    name = next(iter(celora.attach(model, HALF).estimated))
    model.get_submodule(name).get_base_layer()._hf_tp_plan = "colwise"
    assert celora.attach(model, HALF).skipped == {name: "it is split by tensor parallelism"}
