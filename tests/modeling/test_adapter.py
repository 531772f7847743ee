"""Adapters that can be computed together with their base layer, and the reasons for others."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

from celora.modeling.adapter import Adapter, looked_at, touched, vanilla_adapter


def tuner(config: Any = None, **lora: Any) -> Any:
    config = config or LoraConfig(target_modules=["0"], r=4, lora_alpha=12, init_lora_weights=False, **lora)
    return get_peft_model(nn.Sequential(nn.Linear(6, 10)), config).base_model.model[0].train()


def test_a_vanilla_adapter_is_its_matrices_its_scaling_and_its_dropout() -> None:
    module = tuner(lora_dropout=0.25)
    found = vanilla_adapter(module)
    assert isinstance(found, Adapter)
    assert found.A is module.lora_A["default"].weight
    assert found.B is module.lora_B["default"].weight
    assert (found.scaling, found.dropout) == (3.0, 0.25)
    module.lora_dropout["default"].eval()
    found = vanilla_adapter(module)
    assert isinstance(found, Adapter)
    assert found.dropout == 0


class Noise(nn.Dropout):
    pass


def _look(*_: object) -> None:
    pass


def _second(module: Any) -> None:
    for part in (module.lora_A, module.lora_B):
        part["other"] = copy.deepcopy(part["default"])
    module.set_adapter(["default", "other"])


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "disabled": (lambda m: m.enable_adapters(False), "disabled or merged"),
    "merged": (lambda m: m.merge(), "disabled or merged"),
    "a replica": (lambda m: setattr(m, "_is_replica", True), "replica of DataParallel"),
    "two adapters": (_second, "2 adapters are active"),
    "an old PEFT": (lambda m: delattr(m, "lora_variant"), "hands no layer over"),
    "a variant": (lambda m: m.lora_variant.update(default=object()), r"variant of LoRA \(object\)"),
    "a bias": (lambda m: m.lora_B.update({"default": nn.Linear(4, 10)}), "two linear layers without bias"),
    "a hook on A": (lambda m: m.lora_A["default"].register_forward_hook(_look), "adapter has hooks"),
    "a forward of B's own": (lambda m: setattr(m.lora_B["default"], "forward", _look), "adapter has hooks"),
    "a hook on the base": (lambda m: m.get_base_layer().register_forward_hook(_look), "base layer has hooks"),
    "another dropout": (lambda m: m.lora_dropout.update({"default": Noise(0.5)}), "its dropout is Noise"),
    "another scaling": (lambda m: m.scaling.update(default=torch.ones(())), "scaling is not a number"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_left_to_peft_has_a_reason(what: str) -> None:
    module = tuner()
    change, reason = CHANGES[what]
    change(module)
    found = vanilla_adapter(module)
    assert isinstance(found, str)
    assert re.search(reason, found)


def test_other_tuners_are_no_lora() -> None:
    assert vanilla_adapter(tuner(LoHaConfig(target_modules=["0"], r=2))) == "Linear is not a LoRA linear layer"


def test_who_has_a_hand_in_a_module() -> None:
    module = nn.Linear(2, 2)
    assert not touched(module)
    assert not looked_at(module)
    handle = module.register_full_backward_hook(_look)
    assert touched(module)
    assert not looked_at(module)
    handle.remove()
    module._is_full_backward_hook = None
    handle = module.register_backward_hook(_look)
    assert looked_at(module)
    handle.remove()
    assert not looked_at(module)
    assert not touched(module)
    module.register_forward_hook(_look)
    assert touched(module)
    assert looked_at(module)
