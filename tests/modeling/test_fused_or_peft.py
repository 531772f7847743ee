"""In every forward celora decides again whether it computes a layer's adapter or PEFT's own forward does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import celora
from lora_layer import FUSED, fused_calls, layer, run
from patching import patch_all


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
    """FSDP, DeepSpeed and offloading put an adapter's parameters in place just before the adapter's own forward."""
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


def test_few_tokens_take_pefts_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.modeling.fused:_FEWEST_TOKENS", 6)
    model = layer()
    celora.attach(model, FUSED)
    calls = fused_calls(model, monkeypatch)
    for leading, expected in (((5,), 0), ((6,), 1), ((2, 3), 2), ((2, 2), 2)):
        model(torch.randn(*leading, 12).double())
        assert len(calls) == expected


def test_states_that_change_after_attaching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disabled, merged, several or other adapters, and evaluation: each forward decides again."""
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


def test_a_base_weight_that_trains_for_a_moment_keeps_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA-GA, for example, looks at the base weight's gradient. Nothing may cut it off."""
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


def _never_asks(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a PEFT that no longer has variants of LoRA, or asks for them elsewhere."""
    result: Tensor = self.base_layer(x)
    for name in self.active_adapters:
        result = result + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
    return result


def _changes_the_output(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a PEFT that changes something between the base layer and its adapters."""
    result: Tensor = self.base_layer(x).tanh()
    for name in self.active_adapters:
        if name in self.lora_variant:
            result = self.lora_variant[name].forward(self, active_adapter=name, x=x, result=result)
        else:
            result = result + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
    return result


@pytest.mark.parametrize("forward", [_never_asks, _changes_the_output])
def test_another_peft_gives_its_own_result(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, g = layer(), torch.randn(6, 12).double(), torch.randn(6, 20).double()
    tuner = model.base_model.model[0]
    monkeypatch.setattr(type(tuner), "forward", forward)
    expected = run(model, x, g)
    celora.attach(model, FUSED)
    calls = fused_calls(model, monkeypatch)
    found = run(model, x, g)
    assert len(calls) == 1  # PEFT hands the layer over, but celora does not take it
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
    assert all(found[key].equal(value) for key, value in expected.items())
