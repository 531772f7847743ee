"""Code that bypasses layers is refused, left out with a reason, or reported after the first refresh."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

import celora
from celora import CELoraConfig, CELoraError
from celora.modeling.bypass import only_calls_base
from celora.runtime.attachment import find, require
from forked import code, run
from patching import patch_all
from small import make_base, make_model, train

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3)


def _from(module: str, function: Callable[..., Any]) -> Callable[..., Any]:
    function.__module__ = module
    return function


def _attention_kernel(model: PeftModel) -> None:
    attention = model.base_model.model.model.layers[1].self_attn
    attention.apply_qkv = _from("unsloth.kernels.fast_lora", lambda self, x: x)


def _patched_forward(model: PeftModel) -> None:
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.forward = types.MethodType(_from("unsloth.kernels.fast_lora", lambda self, x: x), mlp)


def _compiled_class(model: PeftModel) -> None:
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.__class__ = type("LlamaMLP", (type(mlp),), {"__module__": "unsloth_compiled_module_llama"})


def _patched_class(model: PeftModel) -> None:
    attention = model.base_model.model.model.layers[1].self_attn
    forward = _from("unsloth.models.llama", lambda self, *args, **kwargs: None)
    attention.__class__ = type("LlamaAttention", (type(attention),), {"forward": forward})


@pytest.mark.parametrize("patch", [_attention_kernel, _patched_forward, _compiled_class, _patched_class])
def test_a_model_patched_by_unsloth_is_refused(patch: Callable[[PeftModel], None], model: PeftModel) -> None:
    celora.attach(model, "off")
    celora.detach(model)
    patch(model)
    with pytest.raises(
        CELoraError, match=r"is patched by Unsloth \(unsloth.*load the model with Transformers"
    ) as caught:
        celora.attach(model, "paper")
    assert "\n" not in str(caught.value)
    assert find(model) is None


def test_adapters_that_multiply_with_a_weight_of_their_own_are_skipped() -> None:
    model = get_peft_model(make_base(), peft.HRAConfig(r=8, target_modules=["up_proj"]))
    with pytest.warns(UserWarning, match="no layer can be estimated"):
        report = celora.attach(model, HALF)
    assert set(report.skipped.values()) == {"HRA computes with a weight of its own"}
    assert report.estimated == {}


@pytest.mark.skipif(not hasattr(peft, "SupertuningConfig"), reason="this version of PEFT has no Super-Tuning")
def test_nothing_hooks_a_base_layer_that_is_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT warns of hooks on such a layer, once for each layer. On this CPU, frozen layers get another forward."""
    patch_all(monkeypatch, "celora.machine.cpu:multiplies", lambda dtype: False)
    model = get_peft_model(make_base(), peft.SupertuningConfig(target_modules=["q_proj", "up_proj"]))
    with pytest.warns(UserWarning, match="no layer can be estimated"):
        report = celora.attach(model, "exact")
    assert set(report.skipped.values()) == {"Super-Tuning computes with a weight of its own"}
    train(model, 1)


def test_a_tied_head_with_trained_tokens_is_skipped() -> None:
    base = make_base()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["up_proj"], trainable_token_indices=[1, 2]))
    report = celora.attach(model, CELoraConfig("tokens", selection="energy", keep_ratio=0.9, rank=0, refresh_every=2))
    assert set(report.skipped.values()) == {"an adapter of some tokens computes with a weight of its own"}
    assert len(report.skipped) == 2
    train(model, 3)


@pytest.mark.parametrize(
    ("config", "only_calls"),
    [
        (LoraConfig(target_modules=["up_proj"]), True),
        (LoraConfig(target_modules=["up_proj"], use_dora=True), False),
        (peft.LoHaConfig(target_modules=["up_proj"]), True),
        (peft.MissConfig(r=4, target_modules=["up_proj"], init_weights="bat"), False),
    ],
)
def test_which_adapters_may_read_the_weight_of_their_base(config: peft.PeftConfig, only_calls: bool) -> None:
    model = get_peft_model(make_base(), config)
    assert only_calls_base(model.base_model.model.model.layers[0].mlp.up_proj) is only_calls


class _PastItsBase(peft.tuners.lora.Linear):
    """An unknown kind of adapter that computes past its base layer."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        (adapter,) = self.active_adapters
        weight = self.base_layer.weight + self.get_delta_weight(adapter)
        return F.linear(x, weight)


def _kinds(model: nn.Module, kind: type, name: str) -> None:
    for path, module in model.named_modules():
        if path.endswith(name):
            module.__class__ = kind


@pytest.mark.parametrize("spread", [False, True])
def test_what_nobody_knew_of_is_said_after_the_first_observations(spread: bool) -> None:
    model = make_model()
    _kinds(model, _PastItsBase, "up_proj")
    celora.attach(model, CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=20, spread=spread))
    with pytest.warns(UserWarning, match=r"no backward came through the base layer of any .*_PastItsBase \(2 layers"):
        train(model, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, 11, first=10)


def test_layers_whose_input_needs_no_gradient_are_no_reason_to_warn(model: PeftModel) -> None:
    """The first layer's q, k and v never see a gradient, but other layers of their kind do."""
    celora.attach(model, HALF)
    train(model, 4)


def test_nor_if_no_other_layer_has_had_its_turn_yet(model: PeftModel) -> None:
    """Refreshes take turns. An estimate that needs none to begin with has had that of the first layer, q, by then."""
    config = CELoraConfig("tokens", selection="energy", keep_ratio=0.9, rank=0, refresh_every=200, spread=True)
    celora.attach(model, config)
    train(model, 5)
    model.enable_input_require_grads()
    train(model, 5, first=5)
    assert [graft.needed for graft in require(model).grafts.values()][:3] == [False, None, None]


def test_modules_that_moved_do_not_break_the_import() -> None:
    """Runs in a new process, in which importing these modules fails from celora on."""
    script = """
import sys, peft, transformers
moved = ("peft.tuners.hra", "peft.tuners.shira", "transformers.activations")
for name in [name for name in sys.modules if name in moved or name.startswith(tuple(f"{one}." for one in moved))]:
    sys.modules[name] = None
from celora import *
"""
    done = run(code, script)
    assert done.returncode == 0, done.stderr
