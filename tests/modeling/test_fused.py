"""The fused LoRA linear gives PEFT's results: alone, in whole models, and with every estimator."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import celora
from celora import CELoraConfig
from celora.modeling.adapter import Adapter, vanilla_adapter
from celora.modeling.fused import FusedGraft
from celora.modeling.switch import Mode
from celora.numerics import reference
from celora.runtime.attachment import require
from labelled import gradient
from lora_layer import FUSED, fused_calls, layer, run
from machine import refuses_config
from small import MEMBERS, adapter, make_batch, make_model, train
from tolerances import OF_GRADIENT, after_adam


@pytest.mark.parametrize("leading", [(7,), (2, 5), (2, 1, 3)])
@pytest.mark.parametrize("lora", [{}, {"bias": "lora_only"}, {"use_rslora": True}], ids=str)
def test_equals_peft(leading: tuple[int, ...], lora: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, g = layer(**lora), torch.randn(*leading, 12).double(), torch.randn(*leading, 20).double()
    expected = run(model, x, g)
    celora.attach(model, FUSED)
    calls = fused_calls(model, monkeypatch)
    found = run(model, x, g)
    assert len(calls) == 1
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def test_equals_the_formula() -> None:
    model, x = layer(bias=False), torch.randn(7, 12).double()
    celora.attach(model, FUSED)
    found = vanilla_adapter(model.base_model.model[0])
    assert isinstance(found, Adapter)
    weight = model.base_model.model[0].base_layer.weight
    torch.testing.assert_close(model(x), reference.lora_linear(x, weight, found.A, found.B, found.scaling))


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_only_what_is_trained_gets_a_gradient_and_is_saved_for(frozen: str) -> None:
    model, x, g = layer(), torch.randn(6, 12).double(), torch.randn(6, 20).double()
    for name, p in model.named_parameters():
        p.requires_grad_(frozen not in name and "lora" in name)
    expected = run(model, x, g)
    celora.attach(model, FUSED)
    found = run(model, x, g)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_an_input_without_gradient() -> None:
    model, x = layer(), torch.randn(6, 12).double()
    model(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    celora.attach(model, FUSED)
    model(x).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name])


def test_dropout_drops_and_rescales_like_peft_does() -> None:
    """The masks differ, so the mean over many draws is compared, and each draw's backward with its own forward."""
    model, x = layer(lora_dropout=0.25), torch.randn(4, 12).double()
    model.eval()
    exact = model(x).detach()
    model.train()
    celora.attach(model, FUSED)
    draws = torch.stack([model(x).detach() for _ in range(4000)])
    assert draws.std(0).min() > 0
    torch.testing.assert_close(draws.mean(0), exact, rtol=0.05, atol=0.05)

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        result: Tensor = model(x)
        return result

    assert torch.autograd.gradcheck(seeded, x.clone().requires_grad_())
    A = next(p for name, p in model.named_parameters() if "lora_A" in name)
    torch.manual_seed(3)
    model(x).square().sum().backward()
    epsilon, numeric = 1e-6, torch.zeros_like(A)
    with torch.no_grad():
        for i in range(A.numel()):
            values = []
            for sign in (1, -1):
                A.view(-1)[i] += sign * epsilon
                values.append(seeded(x).square().sum())
                A.view(-1)[i] -= sign * epsilon
            numeric.view(-1)[i] = (values[0] - values[1]) / (2 * epsilon)
    torch.testing.assert_close(A.grad, numeric, rtol=1e-5, atol=1e-5)


def test_bf16_is_as_good_as_peft_with_float32_adapters() -> None:
    """Everything is computed in the base's dtype. The result is rounded to it anyway."""
    x, g = torch.randn(64, 12), torch.randn(64, 20)
    truth = run(layer(dtype=torch.bfloat16, adapter_dtype=True).double(), x.bfloat16().double(), g.bfloat16().double())
    errors = {}
    for fused in (False, True):
        model = layer(dtype=torch.bfloat16, adapter_dtype=True)
        if fused:
            celora.attach(model, FUSED)
        found = run(model, x.bfloat16(), g.bfloat16())
        assert all(value.dtype == torch.float32 for name, value in found.items() if "lora" in name)
        errors[fused] = {name: (found[name].double() - truth[name]).norm() / truth[name].norm() for name in truth}
    for name in truth:
        # bfloat16's eps is the largest error of two roundings: of a product of rank r, and of the result.
        assert errors[True][name] < max(2 * errors[False][name], torch.finfo(torch.bfloat16).eps), name


def test_saves_the_input_once_and_in_its_own_dtype() -> None:
    def saved(fused: bool) -> int:
        model = layer(dtype=torch.bfloat16, adapter_dtype=True)
        if fused:
            celora.attach(model, FUSED)
        kept: dict[int, int] = {}
        parameters = {p.data_ptr() for p in model.parameters()}

        def pack(t: Tensor) -> Tensor:
            if t.data_ptr() not in parameters:
                kept[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(64, 12, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        del y
        return sum(kept.values())

    assert saved(False) == 4 * 64 * (12 + 4)  # x and A x are saved in float32
    assert saved(True) == saved(False) / 2 + 2 * 4 * (12 + 20)  # x and A x are saved in bfloat16, and so are A and B


@pytest.mark.parametrize("kind", ["reentrant", "other", "none"])
def test_whole_model_trains_as_with_peft(kind: str) -> None:
    """After twenty steps, with both kinds of checkpointing, parameters are within rounding of plain PEFT's."""
    results = []
    for fused in (False, True):
        model = make_model(init_lora_weights=True, dtype=torch.float64)
        if kind != "none":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        if fused:
            celora.attach(model, FUSED)
        train(model, 20, optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3))
        results.append(adapter(model))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=after_adam(20, lr=1e-3))


@pytest.mark.parametrize("kept", ["products", "sums"])
def test_selective_checkpointing_is_right(kept: str) -> None:
    """It keeps what operators return, and counts operators.

    A fused adapter would be added a second time onto a kept result.
    """
    aten = torch.ops.aten
    operators = {"products": (aten.mm.default, aten.addmm.default), "sums": (aten.add.Tensor, aten.mul.Tensor)}[kept]

    def keep(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in operators else CheckpointPolicy.PREFER_RECOMPUTE

    found = []
    for config in (None, "exact", CELoraConfig(keep_ratio=1.0, rank=0, fused=True)):
        model = make_model().train()
        model.enable_input_require_grads()
        contexts = functools.partial(create_selective_checkpoint_contexts, keep)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        if config is not None:
            celora.attach(model, config)
        model(**make_batch(0)).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for fused in found[1:]:
        assert (fused - found[0]).norm() < OF_GRADIENT * found[0].norm()


@pytest.mark.parametrize("config", MEMBERS.values(), ids=MEMBERS)
def test_composes_with_estimators(config: CELoraConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same estimate of `grad_output @ W` arrives, whether or not the adapter is fused."""
    if refuses_config(config):
        return
    monkeypatch.setattr(FusedGraft, "_in_8_bits", lambda *_: None)  # it would round the input of A's gradient
    results = []
    for fused in (False, True):
        model = make_model(dtype=torch.float64)
        celora.attach(model, dataclasses.replace(config, fused=fused))
        train(model, 3)
        results.append(adapter(model))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=after_adam(3, lr=1e-2))


def test_autocast_is_no_further_from_float32_than_pefts() -> None:
    model, batch = make_model().train(), make_batch(0)
    losses, gradients = [], []
    for dtype, fused in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        if fused:
            celora.attach(model, FUSED)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(gradient(model).double())
    true, *found = gradients
    theirs, ours = (float((g - true).norm() / true.norm()) for g in found)
    assert theirs > 1e-3  # autocast does round, so there is something to compare
    assert ours < 1.5 * theirs
    assert losses[2] == pytest.approx(losses[0], rel=1e-2)


def test_a_scaling_that_begins_to_train_gets_its_gradient() -> None:
    model = make_model().train()
    celora.attach(model, "exact")
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    plain = copy.deepcopy(model)
    celora.detach(plain)
    for each in (model, plain):
        each(**make_batch(0)).loss.backward()
        scaled = each.base_model.model.model.layers[1].mlp.up_proj
        scaled.scaling["default"] = nn.Parameter(torch.tensor(2.0))
        each(**make_batch(0)).loss.backward()
    expected = plain.base_model.model.model.layers[1].mlp.up_proj.scaling["default"].grad
    torch.testing.assert_close(layer.scaling["default"].grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
def test_compiles_without_a_break(fresh_dynamo: None) -> None:
    model, x, g = layer(dtype=torch.float32), torch.randn(6, 12), torch.randn(6, 20)
    expected = run(model, x, g)
    celora.attach(model, FUSED)
    compiled = torch.compile(model.base_model.model[0], fullgraph=True, backend="aot_eager")
    x = x.clone().requires_grad_()
    y = compiled(x)
    y.backward(g)
    torch.testing.assert_close(y, expected["output"])
    torch.testing.assert_close(x.grad, expected["x"])
    assert not model.base_model.model[0].disable_adapters


def test_refreshes_go_on_under_the_fused_layer() -> None:
    model = make_model()
    model.enable_input_require_grads()  # otherwise the first layer's q, k and v have no grad_input to observe
    celora.attach(model, CELoraConfig(keep_ratio=0.5, rank=2, refresh_every=4, fused=True))
    grafts = require(model).grafts
    modes: list[set[Mode]] = []
    train(model, 6, between=lambda: modes.append({graft.mode for graft in grafts.values()}))
    assert modes[0] == {Mode.ESTIMATE}
    assert modes[3] == {Mode.OBSERVE}
    assert all(isinstance(graft, FusedGraft) for graft in grafts.values())
