"""Attaching to real PEFT models: what is touched, what is not, when it refreshes, what is saved."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import statistics
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from torch.optim import optimizer as optim

import celora
from celora import CELoraConfig, CELoraError
from celora.modeling.graft import LayerGraft
from celora.modeling.switch import Mode
from celora.numerics.estimators import Columns
from celora.numerics.factor import svd_factor
from celora.runtime.attachment import find, require
from celora.settings.presets import PRESETS
from machine import refuses, refuses_config
from patching import patch_all
from small import MEMBERS, adapter, make_base, make_batch, make_model, train
from tolerances import after_adam

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


def test_a_refresh_step_is_exact() -> None:
    plain, estimated = make_model(), make_model()
    celora.attach(estimated, HALF)
    train(plain, 1)
    train(estimated, 1)
    for name, value in adapter(plain).items():
        assert value.equal(adapter(estimated)[name])


@pytest.mark.parametrize("config", MEMBERS.values(), ids=MEMBERS)
def test_checkpointing_changes_nothing(config: CELoraConfig) -> None:
    if refuses_config(config):
        return
    results = []
    for use_reentrant in (None, True, False):
        model = make_model(dtype=torch.float64)
        model.enable_input_require_grads()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        celora.attach(model, config)
        train(model, 5)
        results.append(adapter(model))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=after_adam(5, lr=1e-2))


# peft 0.21 finds fault with the shape of every `lora_B.bias` it has itself saved, and loads it nevertheless.
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")
@pytest.mark.parametrize("biases", [{"bias": "lora_only"}, {"lora_bias": True}, {"bias": "all"}])
def test_trainable_biases_train_save_and_reload(biases: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(base_bias=True, **biases)
    celora.attach(model, HALF)
    before = adapter(model)
    assert any("bias" in name or "lora_B.default.bias" in name for name in before)
    train(model, 5)
    assert all(not value.equal(before[name]) for name, value in adapter(model).items() if "bias" in name)
    _assert_reloads(model, tmp_path, base_bias=True)


def _biased() -> PeftModel:
    return make_model(base_bias=True, bias="lora_only")


def test_a_trainable_bias_gets_its_exact_gradient(batch: dict[str, torch.Tensor]) -> None:
    """The last layer's gradient is exact, whatever is estimated below, so its bias must match plain PEFT's."""
    plain, estimated = _biased(), _biased()
    celora.attach(estimated, HALF)
    require(estimated).clock.advance()
    for graft in require(estimated).grafts.values():
        graft.mode = Mode.OBSERVE
    estimated(**batch).loss.backward()
    estimated.zero_grad()
    require(estimated).clock.advance()
    for model in (plain, estimated):
        model(**batch).loss.backward()
    name = "base_model.model.model.layers.1.mlp.down_proj.base_layer.bias"
    grads = [dict(m.named_parameters())[name].grad for m in (plain, estimated)]
    torch.testing.assert_close(*grads)


def test_reloads_in_stock_peft_after_twenty_steps(model: PeftModel, tmp_path: Path) -> None:
    celora.attach(model, HALF)
    train(model, 20)
    _assert_reloads(model, tmp_path)


def _assert_reloads(model: PeftModel, folder: Path, **kwargs: Any) -> None:
    """The saved adapter on a rebuilt base, loaded by PEFT alone, gives the same logits."""
    model.eval()
    model.save_pretrained(folder)
    assert {p.name for p in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert "celora" not in (folder / "adapter_config.json").read_text()
    base = make_model(**kwargs).unload()
    stock = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(**make_batch(7)).logits, model(**make_batch(7)).logits, rtol=0, atol=1e-5)


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
    for name, value in adapter(model).items():
        assert value.equal(adapter(twin)[name])


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


MOVING = {
    "columns": CELoraConfig(estimator="columns", keep_ratio=0.5, rank=4, refresh_every=4, fused=True),
    "int8": CELoraConfig(estimator="int8", refresh_every=4, fused=True),
}


@pytest.mark.parametrize("name", MOVING)
def test_training_after_unmerging_goes_on_as_if_nothing_had_been_merged(name: str) -> None:
    """Between two refreshes, and past the next; in float64, for PEFT adds to the weight and subtracts again."""
    if refuses_config(MOVING[name]):
        return
    results = []
    for merges in (False, True):
        model = make_model(dtype=torch.float64)
        celora.attach(model, MOVING[name])
        optimizer = train(model, 6)
        if merges:
            with torch.no_grad():
                model.eval()
                expected = model(**make_batch(99)).logits
                model.merge_adapter()
                torch.testing.assert_close(model(**make_batch(99)).logits, expected)
                model.unmerge_adapter()
        assert {graft.mode for graft in require(model).grafts.values() if graft.estimator.ready} == {Mode.ESTIMATE}
        train(model, 6, first=6, optimizer=optimizer)
        results.append(adapter(model))
    for parameter, expected in results[0].items():
        torch.testing.assert_close(results[1][parameter], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MOVING)
def test_an_adapter_switched_to_trains_as_the_only_one(name: str) -> None:
    """From a refresh on, estimated for its own gradients, with nothing left of the other's."""
    if refuses_config(MOVING[name]):
        return
    results = []
    for config, switches in (("off", False), (MOVING[name], False), (MOVING[name], True)):
        model = make_model()
        torch.manual_seed(7)
        model.add_adapter("other", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
        celora.attach(model, config)
        optimizer = torch.optim.AdamW([p for key, p in model.named_parameters() if "lora_" in key], lr=1e-2)
        if switches:
            train(model, 8, optimizer=optimizer)
        first = adapter(model)
        model.set_adapter("other")
        train(model, 8, first=8, optimizer=optimizer)
        results.append(adapter(model))
        model.set_adapter("default")
        assert all(value.equal(first[key]) for key, value in adapter(model).items())
    plain, alone, after = results
    assert plain.keys() == alone.keys() == after.keys()
    assert all(value.equal(after[key]) for key, value in alone.items())
    assert any(not value.allclose(plain[key], rtol=1e-3, atol=1e-3) for key, value in alone.items())


def test_layers_left_by_merge_and_unload_are_exact() -> None:
    model = make_model()
    celora.attach(model, HALF)
    train(model, 2)
    merged = model.merge_and_unload()
    del model
    gc.collect()
    out = merged(inputs_embeds=torch.randn(1, 4, 48, requires_grad=True))
    nodes, seen = [out.logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [n for n, _ in node.next_functions]
    assert not any("Graft" in type(node).__name__ for node in seen)


def test_saved_for_backward_bytes_are_those_of_plain_peft(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    def saved() -> int:
        total = 0

        def pack(t: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(**batch)
        return total

    plain = saved()
    celora.attach(model, HALF)
    refreshing = saved()
    train(model, 1)
    assert require(model).grafts["base_model.model.model.layers.1.mlp.up_proj"].mode is Mode.ESTIMATE
    assert max(refreshing, saved()) <= plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_in_half_precision(dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    celora.attach(model, HALF)
    train(model, 5)
    assert all(torch.isfinite(value).all() for value in adapter(model).values())


def test_permuting_a_layers_gradient_permutes_its_selection(model: PeftModel) -> None:
    """Through the whole machinery: the gradient of `up_proj` is permuted on its way into the graft."""
    name = "base_model.model.model.layers.1.mlp.up_proj"
    base = model.get_submodule(name).get_base_layer()
    base.weight.data.fill_(0.1)  # so that the gradient alone decides
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


def test_an_optimizer_of_other_tensors_is_said(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    celora.attach(model, HALF)
    optimizer = torch.optim.SGD([p.detach().clone() for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch).loss.backward()
    for _ in range(4):  # of another model: this one is idle
        optimizer.step()
    model(**batch).loss.backward()
    optimizer.step()
    model(**batch).loss.backward()
    with pytest.warns(UserWarning, match="three optimizer steps, none of a parameter of this model"):
        optimizer.step()


def test_an_idle_model_says_nothing_while_another_trains(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    other = make_model()
    for of in (model, other):
        celora.attach(of, HALF)
    for step in range(4):
        model(**batch).loss.backward()  # as a teacher might
        train(other, 1, first=step)
    assert (require(model).clock.step, require(other).clock.step) == (0, 4)


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


def test_replicas_of_data_parallel_are_exact(model: PeftModel) -> None:
    celora.attach(model, HALF)
    train(model, 1)
    base = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").get_base_layer()
    x = torch.randn(3, 48, requires_grad=True)
    assert "Graft" in type(base(x).grad_fn).__name__
    base._is_replica = True
    assert "Graft" not in type(base(x).grad_fn).__name__


def test_a_missing_layer_of_a_preset_is_no_mistake() -> None:
    report = celora.attach(make_model(target_modules=["q_proj", "v_proj"]), "paper")
    assert len(report.estimated) == 2


@pytest.mark.parametrize("emulated", [False, True])
def test_advice_where_the_users_own_settings_cost_time(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.machine.timing:slower_than_float32", lambda dtype, device: emulated)
    plain = celora.attach(make_model(), "paper").notes
    unfused = dataclasses.replace(PRESETS["paper"], fused=False)
    model = make_model(dtype=torch.bfloat16, lora_dropout=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    costly = celora.attach(model, unfused).notes
    assert not [note for note in plain if "float32" in note or "dropout" in note or "checkpointing" in note]
    assert [note for note in costly if note.startswith("Gradient checkpointing computes every forward twice")]
    assert [note for note in costly if note.startswith("lora_dropout=0.1 draws")]
    assert [note for note in costly if note.startswith("float32 adapters on a bfloat16 base")]
    said = [note for note in costly if note.startswith("This CPU takes longer for bfloat16")]
    assert len(said) == emulated


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


@pytest.mark.parametrize("config", MEMBERS.values(), ids=MEMBERS)
def test_every_member_of_the_family_trains_with_accumulation_and_resumes(config: CELoraConfig, tmp_path: Path) -> None:
    if refuses_config(config):
        return
    first, second = make_model(), make_model()
    report = celora.attach(first, config)
    assert len(report.estimated) == 14
    str(report)
    train(first, 8, accumulate=2)
    celora.attach(second, config)
    optimizer = train(second, 4, accumulate=2)
    celora.save_state(second, tmp_path)
    celora.attach(second, "off")
    celora.attach(second, config)
    celora.load_state(second, tmp_path)
    train(second, 4, first=4, accumulate=2, optimizer=optimizer)
    for name, value in adapter(first).items():
        assert value.equal(adapter(second)[name]), name
    plain = make_model()
    train(plain, 8, accumulate=2)
    assert not all(value.equal(adapter(plain)[name]) for name, value in adapter(first).items())


@pytest.mark.parametrize("config", MEMBERS.values(), ids=MEMBERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_member_of_the_family_in_half_precision_with_bias(config: CELoraConfig, dtype: torch.dtype) -> None:
    if refuses_config(config):
        return
    model = make_model(dtype=dtype, base_bias=True)
    celora.attach(model, config)
    train(model, 5)
    assert all(value.isfinite().all() for value in adapter(model).values())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("member", ["int8", "int8 x tokens", "sampled tokens", "spread"])
def test_checkpointing_changes_nothing_for_any_member(member: str, reentrant: bool) -> None:
    if refuses_config(MEMBERS[member]):
        return
    models = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    models[1].enable_input_require_grads()
    models[1].gradient_checkpointing_enable({"use_reentrant": reentrant})
    models[0].enable_input_require_grads()
    for model in models:
        celora.attach(model, MEMBERS[member])
        train(model, 5)
    for name, value in adapter(models[0]).items():
        torch.testing.assert_close(value, adapter(models[1])[name], rtol=0, atol=after_adam(5, lr=1e-2))


def test_spread_refreshes_take_turns_and_come_round(model: PeftModel) -> None:
    model.enable_input_require_grads()  # or the first layers would never see a gradient to observe
    celora.attach(model, CELoraConfig(keep_ratio=0.5, rank=0, refresh_every=14, spread=True))
    grafts = list(require(model).grafts.values())
    observing = []
    for _ in range(14 + 28):
        observing.append([i for i, graft in enumerate(grafts) if graft.mode is Mode.OBSERVE])
        train(model, 1)
    assert {i for step in observing[:11] for i in step} == set(range(14))  # everyone soon, but not at once
    assert max(map(len, observing[:14])) <= 6
    assert observing[14:] == [[i] for i in range(14)] * 2


@pytest.mark.parametrize("start", [0.999, 0.7])
def test_the_controller_holds_the_error_near_the_target(start: float) -> None:
    """Whether the share of the energy to begin with loses nothing of so few tokens, or more (0.55)."""
    model = make_model()
    config = CELoraConfig(estimator="tokens", keep_ratio=start, rank=0, selection="energy", refresh_every=1)
    celora.attach(model, dataclasses.replace(config, target_error=0.3))
    train(model, 16)
    assert statistics.median(require(model).relative_errors.values()) == pytest.approx(0.3, rel=0.15)


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


def test_the_monitor_says_once_that_an_error_has_reached_1() -> None:
    """Sampling a twentieth of the columns has a relative error above 1; half of the tokens has not."""
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
    """accelerate takes them away again after each forward."""
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


def test_layers_split_over_processes_are_left_alone(model: PeftModel) -> None:
    name = next(iter(celora.attach(model, HALF).estimated))
    model.get_submodule(name).get_base_layer()._hf_tp_plan = "colwise"
    assert celora.attach(model, HALF).skipped == {name: "it is split by tensor parallelism"}
