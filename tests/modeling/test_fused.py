"""The fused LoRA linear against PEFT's own, and everything that must not take it."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import celora
from celora import CELoraConfig
from celora.modeling.adapter import Adapter, vanilla_adapter
from celora.modeling.fused import FusedGraft
from celora.modeling.switch import Mode
from celora.numerics import reference
from celora.runtime.attachment import require
from machine import refuses_config
from patching import patch_all
from small import MEMBERS, adapter, make_batch, make_model, train
from tolerances import OF_GRADIENT, after_adam

FUSED = CELoraConfig(estimator="dense", fused=True)


def layer(
    *, dtype: torch.dtype = torch.float64, bias: bool = True, adapter_dtype: bool = False, **lora: Any
) -> PeftModel:
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(12, 20, bias=bias)).to(dtype)
    lora = {"r": 4, "lora_alpha": 12, "init_lora_weights": False, **lora}
    return get_peft_model(base, LoraConfig(target_modules=["0"], **lora), autocast_adapter_dtype=adapter_dtype).train()


def run(model: PeftModel, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of one forward and backward pass."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(g)
    found = {"output": y.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def fused_calls(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Adapter]:
    """Record what takes the fused path from now on."""
    seen: list[Adapter] = []
    before = FusedGraft.takes

    def record(self: FusedGraft, *args: Any) -> bool:
        takes = before(self, *args)
        if takes:
            seen.append(self.taken[0])
        return takes

    monkeypatch.setattr(FusedGraft, "takes", record)
    return seen


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
    """The masks differ, so the expectation over many draws is compared, and each draw's backward with its forward."""
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
    """Everything runs in the base's dtype; the result is rounded to it in any case."""
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

    assert saved(False) == 4 * 64 * (12 + 4)  # x and A x, in float32
    assert saved(True) == saved(False) / 2 + 2 * 4 * (12 + 20)  # in bfloat16, and so A and B


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, "variant of LoRA"),
        ({"lora_bias": True}, "without bias"),
    ],
    ids=["dora", "lora_bias"],
)
def test_what_is_not_vanilla_takes_pefts_own_path(
    lora: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, g = layer(**lora), torch.randn(6, 12).double(), torch.randn(6, 20).double()
    expected = run(model, x, g)
    report = celora.attach(model, FUSED)
    assert any("0 of 1 layers" in note and reason in note for note in report.notes)
    calls = fused_calls(model, monkeypatch)
    found = run(model, x, g)
    assert not calls
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("how", ["hook", "patched"])
def test_an_adapter_that_something_else_has_a_hand_in(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP, DeepSpeed and offloading put an adapter's parameters in place just before its own forward."""
    model, x, g = layer(), torch.randn(6, 12).double(), torch.randn(6, 20).double()
    expected = run(model, x, g)
    celora.attach(model, FUSED)
    calls = fused_calls(model, monkeypatch)
    A = model.base_model.model[0].lora_A["default"]
    seen: list[int] = []
    if how == "hook":
        A.register_forward_pre_hook(lambda *_: seen.append(1))
    else:
        own = A.forward
        A.forward = lambda x: seen.append(1) or own(x)
    found = run(model, x, g)
    assert seen == [1]
    assert not calls
    assert all(found[name].equal(expected[name]) for name in expected)


def test_states_that_change_after_attaching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disabled, merged, several or other adapters, evaluation: decided anew in every forward."""
    model, x, g = layer(), torch.randn(6, 12).double(), torch.randn(6, 20).double()
    model.add_adapter("other", LoraConfig(target_modules=["0"], r=3, init_lora_weights=False))
    celora.attach(model, FUSED)
    calls = fused_calls(model, monkeypatch)
    run(model, x, g)
    assert len(calls) == 1
    model.set_adapter("other")
    run(model, x, g)
    assert len(calls) == 2
    assert calls[1].A.shape == (3, 12)
    model.base_model.set_adapter(["default", "other"])
    both = run(model, x, g)
    with model.disable_adapter():
        base = model(x).detach()
    model.set_adapter("default")
    model.eval()
    merged = model(x).detach()
    model.merge_adapter()
    torch.testing.assert_close(model(x), merged)
    model.unmerge_adapter()
    assert len(calls) == 2
    plain = layer().base_model.model[0].base_layer
    torch.testing.assert_close(base, plain(x).detach())
    assert not both["output"].allclose(merged)


@pytest.mark.parametrize("what", ["dropout is off", "no dropout", "B"])
def test_the_adapter_as_it_is_now_is_used(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layer(lora_dropout=0.5)
    tuner: Any = model.base_model.model[0]
    x = torch.randn(7, 12, dtype=torch.float64)
    celora.attach(model, FUSED)
    calls = fused_calls(model, monkeypatch)
    model(x)
    if what == "dropout is off":
        tuner.lora_dropout["default"].eval()
    else:
        tuner.lora_dropout["default"] = nn.Identity()
    if what == "B":
        tuner.lora_B["default"] = copy.deepcopy(tuner.lora_B["default"])
        tuner.lora_B["default"].weight.data *= 2
    found = model(x)
    assert len(calls) == 2
    celora.detach(model)
    torch.testing.assert_close(found, model(x))


def test_an_interrupted_forward_leaves_the_adapter_on() -> None:
    model, x, g = layer(), torch.randn(6, 12).double(), torch.randn(6, 20).double()
    celora.attach(model, FUSED)
    expected = run(model, x, g)
    tuner = model.base_model.model[0]
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(*_: object, error: type[BaseException] = error) -> None:
            raise error

        handle = tuner.base_layer.register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(x)
        handle.remove()
        if error is RuntimeError:
            assert not tuner.disable_adapters
        found = run(model, x, g)
        assert not tuner.disable_adapters
        assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["reentrant", "other", "none"])
def test_whole_model_trains_as_with_peft(kind: str) -> None:
    """Twenty steps, with both kinds of checkpointing: parameters within rounding of plain PEFT's."""
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
    """It keeps what operators return, which a fused adapter would be added onto a second time, and counts them."""
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
    for gradient in found[1:]:
        assert (gradient - found[0]).norm() < OF_GRADIENT * found[0].norm()


@pytest.mark.parametrize("config", MEMBERS.values(), ids=MEMBERS)
def test_composes_with_estimators(config: CELoraConfig) -> None:
    """The same estimate of `grad_output @ W` arrives, whether the adapter is fused or not."""
    if refuses_config(config):
        return
    results = []
    for fused in (False, True):
        model = make_model(dtype=torch.float64)
        celora.attach(model, dataclasses.replace(config, fused=fused))
        train(model, 3)
        results.append(adapter(model))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=after_adam(3, lr=1e-2))


def test_few_tokens_take_pefts_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.modeling.fused:_FEWEST_TOKENS", 6)
    model = layer()
    celora.attach(model, FUSED)
    calls = fused_calls(model, monkeypatch)
    for leading, expected in (((5,), 0), ((6,), 1), ((2, 3), 2), ((2, 2), 2)):
        model(torch.randn(*leading, 12).double())
        assert len(calls) == expected


def test_detaching_and_copies() -> None:
    model, batch = make_model().train(), make_batch(0)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    expected = model(**batch).loss
    celora.attach(model, "exact")
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(**batch).loss, expected)
    part = copy.deepcopy(model.base_model.model.model.layers[0].mlp.up_proj)
    x = torch.randn(3, 48)
    torch.testing.assert_close(part(x), model.base_model.model.model.layers[0].mlp.up_proj(x))
    assert not part.disable_adapters
    celora.detach(model)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert not any(m._forward_hooks_with_kwargs or m._forward_hooks_always_called for m in model.modules())
    assert model(**batch).loss.equal(expected)


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
        gradients.append(adapter_gradient(model).double())
    true, *found = gradients
    theirs, ours = (float((of - true).norm() / true.norm()) for of in found)
    assert theirs > 1e-3  # autocast does round
    assert ours < 1.5 * theirs
    assert losses[2] == pytest.approx(losses[0], rel=1e-2)


def adapter_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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
    model.enable_input_require_grads()  # or the first layer's q, k and v have no grad_input to observe
    celora.attach(model, CELoraConfig(keep_ratio=0.5, rank=2, refresh_every=4, fused=True))
    grafts = require(model).grafts
    modes: list[set[Mode]] = []
    train(model, 6, between=lambda: modes.append({graft.mode for graft in grafts.values()}))
    assert modes[0] == {Mode.ESTIMATE}
    assert modes[3] == {Mode.OBSERVE}
    assert all(isinstance(graft, FusedGraft) for graft in grafts.values())


def test_a_base_weight_that_trains_for_a_moment_keeps_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA-GA, for one, looks at the base weight's gradient: nothing may cut it off."""
    model, x, g = layer(), torch.randn(6, 12).double(), torch.randn(6, 20).double()
    weight = model.base_model.model[0].base_layer.weight
    weight.requires_grad_()
    expected = run(model, x, g)
    weight.requires_grad_(False)
    celora.attach(model, FUSED)
    calls = fused_calls(model, monkeypatch)
    weight.requires_grad_()
    found = run(model, x, g)
    assert not calls
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    weight.requires_grad_(False)
    run(model, x, g)
    assert len(calls) == 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "config", [FUSED, CELoraConfig(estimator="tokens", keep_ratio=1.0, selection="energy", rank=0)]
)
def test_hooks_of_others_under_the_adapter(config: CELoraConfig, when: str) -> None:
    """What they see is the base layer's output, and what they make of it is trained through."""
    model, x, g = layer(), torch.randn(6, 12).double(), torch.randn(6, 20).double()
    seen: list[torch.Tensor] = []

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().clone())
        return output * 0.5

    base = model.base_model.model[0].base_layer
    handle = base.register_forward_hook(hook)
    expected = run(model, x, g)
    if when == "after":
        handle.remove()
    celora.attach(model, config)
    if when == "after":
        base.register_forward_hook(hook)
    found = run(model, x, g)
    torch.testing.assert_close(seen[-1], seen[0])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_backward_hooks_of_the_adapter_are_called() -> None:
    model, x, g = layer(), torch.randn(6, 12).double(), torch.randn(6, 20).double()
    celora.attach(model, FUSED)
    seen: list[int] = []
    A = model.base_model.model[0].lora_A["default"]
    A.register_full_backward_hook(lambda *_: seen.append(1))
    run(model, x, g)
    assert seen == [1]


def _never_asks(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As a PEFT that has no variants of LoRA any more, or asks them somewhere else."""
    result: Tensor = self.base_layer(x)
    for name in self.active_adapters:
        result = result + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
    return result


def _changes_the_output(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As a PEFT that does something of its own between the base layer and its adapters."""
    result: Tensor = self.base_layer(x).tanh()
    for name in self.active_adapters:
        if name in self.lora_variant:
            result = self.lora_variant[name].forward(self, active_adapter=name, x=x, result=result)
        else:
            result = result + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
    return result


@pytest.mark.fault(
    "models",
    "a version of PEFT that computes its LoRA layers in another way than celora knows",
    sees="nothing, or `PEFT's own path in ... layers` in the report",
    kept="the result: PEFT's own path runs, and no adapter is applied twice or left out",
)
@pytest.mark.parametrize("forward", [_never_asks, _changes_the_output])
def test_another_peft_gives_its_own_result(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, g = layer(), torch.randn(6, 12).double(), torch.randn(6, 20).double()
    tuner = model.base_model.model[0]
    monkeypatch.setattr(type(tuner), "forward", forward)
    expected = run(model, x, g)
    celora.attach(model, FUSED)
    calls = fused_calls(model, monkeypatch)
    found = run(model, x, g)
    assert len(calls) == 1  # handed over, and not taken
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    assert tuner.lora_variant == {}
    assert tuner.cast_input_dtype_enabled


@pytest.mark.parametrize("name", ["lora_variant", "cast_input_dtype_enabled"])
def test_a_peft_without_what_the_hand_over_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, g = layer(), torch.randn(6, 12).double(), torch.randn(6, 20).double()
    tuner = model.base_model.model[0]
    monkeypatch.setattr(type(tuner), "forward", _never_asks)
    expected = run(model, x, g)
    delattr(tuner, name)
    report = celora.attach(model, FUSED)
    assert any("this version of PEFT hands no layer over" in note for note in report.notes)
    found = run(model, x, g)
    assert all(found[of].equal(value) for of, value in expected.items())


@pytest.mark.parametrize("where", ["base layer", "adapter", "hook"])
def test_what_is_lent_is_put_back_after_an_error(where: str) -> None:
    model, x = layer(), torch.randn(6, 12).double()
    celora.attach(model, FUSED)
    tuner = model.base_model.model[0]
    expected = model(x)

    def fail(*_: Any) -> None:
        raise ValueError

    if where == "base layer":
        handle = tuner.base_layer.register_forward_pre_hook(fail)
    elif where == "adapter":
        handle = tuner.lora_A["default"].register_forward_hook(fail)
    else:
        handle = tuner.register_forward_hook(fail, prepend=True)
    with pytest.raises(ValueError):
        model(x)
    assert tuner.lora_variant == {}
    assert tuner.cast_input_dtype_enabled
    handle.remove()
    assert model(x).equal(expected)


def test_a_copy_made_during_a_forward_is_whole() -> None:
    """By a hook, in the middle of the call: the copy has no variant that nobody takes out."""
    model, x = layer(), torch.randn(6, 12).double()
    celora.attach(model, FUSED)
    tuner = model.base_model.model[0]
    copies: list[Any] = []
    before = FusedGraft.forward

    def copying(self: FusedGraft, module: Any, *args: Any, **kwargs: Any) -> Tensor:
        copies.append(copy.deepcopy(module))
        return before(self, module, *args, **kwargs)

    FusedGraft.forward = copying  # type: ignore[method-assign]
    try:
        expected = model(x).detach()
    finally:
        FusedGraft.forward = before  # type: ignore[method-assign]
    (copied,) = copies
    torch.testing.assert_close(copied(x).detach(), expected)
    assert tuner.lora_variant == copied.lora_variant == {}
    assert copied.cast_input_dtype_enabled
