"""Padding stays if hooks or adapters depend on the shape of a batch."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import celora
from celora.modeling import onlookers, packing
from decoders import model_of
from labelled import gradients, ragged
from patching import patch_all
from tolerances import OF_GRADIENT


def test_hooks_that_may_look_at_the_shape_of_a_batch_keep_its_padding() -> None:
    """Hooks that only make activations require a gradient do not count."""
    model, batch = model_of("llama"), ragged([11, 4, 7, 1])
    seen: list[tuple[int, ...]] = []
    celora.attach(model, "exact")
    model.enable_input_require_grads()
    assert model(**batch).logits is None
    layer = model.base_model.model.model.layers[1].mlp
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:2])))
    with pytest.warns(UserWarning, match=r"padding stays in batches: layers\.1\.mlp has a forward hook"):
        model(**batch)
    model(**batch)  # the second time, nothing is said
    assert seen == [tuple(batch["input_ids"].shape)] * 2
    handle.remove()
    packed: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        pack = packing.pack
        patch_all(patch, "celora.modeling.packing:pack", lambda *args: packed.append(pack(*args)) or packed[-1])
        model(**batch)
    assert packed[0] is not None


class _Noise(nn.Module):
    """Depends on the shape, as NEFTune does."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.of(x)
        return result + result.shape[1]


def _replace_forward(layer: Any) -> str:
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: own(x) + x.shape[1]
    return r"the forward of layers\.0\.mlp is test_onlookers\.<lambda>"


def _put_a_module_around(layer: Any) -> str:
    layer.mlp = _Noise(layer.mlp)
    return r"the forward of layers\.0\.mlp is test_onlookers\.forward"


def _replace_the_forward_of_the_class(layer: Any) -> str:
    kind, own = type(layer.mlp), type(layer.mlp).forward
    layer.mlp.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, x: own(self, x) + x.shape[1]})
    return r"the forward of layers\.0\.mlp is test_onlookers\.<lambda>"


@pytest.mark.parametrize("change", [_replace_forward, _put_a_module_around, _replace_the_forward_of_the_class])
def test_forwards_that_may_look_at_the_shape_of_a_batch_keep_its_padding(change: Callable[[Any], str]) -> None:
    model, batch = model_of("llama"), ragged([11, 4, 7, 1])
    said = change(model.base_model.model.model.layers[0])
    loss, expected = gradients(model, batch)
    assert any(re.search(said, note) for note in celora.attach(model, "exact").notes)
    found, gradient = gradients(model, batch)
    assert found == pytest.approx(loss, rel=1e-6)
    assert (gradient - expected).norm() < OF_GRADIENT * expected.norm()


class _OneScale(nn.Linear):
    """Its scale is that of the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.detach().abs().max()


@pytest.mark.parametrize("where", ["up_proj", "down_proj"])
@pytest.mark.parametrize("how", ["of its class", "replaced"])
def test_a_linear_layer_of_another_kind_keeps_the_padding(where: str, how: str) -> None:
    """One that carries an adapter, or none; but not one of a package that quantises."""
    model, batch = model_of("llama"), ragged([11, 4, 7, 1])
    layer: Any = getattr(model.base_model.model.model.layers[0].mlp, where)
    layer = getattr(layer, "base_layer", layer)
    if how == "replaced":
        layer.forward = functools.partial(_OneScale.forward, layer)
        layer.__class__ = type("Linear", (_OneScale,), {"forward": nn.Linear.forward})
    else:
        layer.__class__ = _OneScale
    loss, expected = gradients(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert any("Padding stays" in note for note in celora.attach(model, "exact").notes)
    found, gradient = gradients(model, batch)
    assert found == pytest.approx(loss, rel=1e-6)
    assert (gradient - expected).norm() < OF_GRADIENT * expected.norm()


def test_a_linear_layer_of_a_package_that_quantises_does_not_count() -> None:
    code: dict[str, Any] = {"__name__": "gptqmodel.nn_modules.qlinear"}
    exec("def forward(self, x): return x @ self.weight.T", code)
    module: Any = type("TorchQuantLinear", (nn.Linear,), {"forward": code["forward"]})(2, 2)
    assert onlookers.unknown_forward(module) == ""
    module.forward = lambda x: x
    assert "the forward of {} is test_onlookers.<lambda>" in onlookers.unknown_forward(module)


def _as_kernels_wraps(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward around this one, in a module of `kernels`, as `use_kernelized_func` makes one."""
    names: dict[str, Any] = {"__name__": "kernels.layer", "within": forward}
    exec("def new_forward(self, *args, **kwargs): return within(self, *args, **kwargs)", names)
    wrapped: Callable[..., Any] = functools.wraps(forward)(names["new_forward"])
    return wrapped


def test_what_kernels_puts_around_a_forward_does_not_count() -> None:
    """Transformers 5.25 installs `kernels`, which wraps each attention. What is inside counts, whoever wrote it."""
    module = type("Layer", (nn.Module,), {"forward": _as_kernels_wraps(nn.Linear.forward)})()
    assert not onlookers.unknown_forward(module)
    module = type("Layer", (nn.Module,), {"forward": _as_kernels_wraps(lambda self, x: x + x.shape[1])})()
    assert "test_onlookers.<lambda>" in onlookers.unknown_forward(module)


def test_a_kernel_of_the_hub_does_not_count() -> None:
    """`kernels` binds the forward of its class to a module whose class names its kernel. Nobody else's does."""
    module: Any = type("Norm", (nn.Module,), {"kernel_layer_name": "RMSNorm", "forward": lambda self, x: x})()
    assert onlookers.unknown_forward(module) == ""
    module.forward = MethodType(_Noise.forward, module)
    assert onlookers.unknown_forward(module) == ""
    for own in (lambda x: x, MethodType(lambda self, x: x, module)):
        module.forward = own
        assert "test_onlookers.<lambda>" in onlookers.unknown_forward(module)


def _clipped(module: nn.Module, into: Any, out: Any) -> Any:
    return (
        (into[0] / (1 + into[0].norm(dim=1, keepdim=True)),)
        if isinstance(into, tuple) and into[0] is not None
        else None
    )


@pytest.mark.parametrize("where", ["model.layers.1", "model.norm", "model.layers.0.mlp.up_proj"])
def test_backward_hooks_keep_the_padding(where: str) -> None:
    model, batch = model_of("llama"), ragged([11, 4, 7, 1])
    model.base_model.model.get_submodule(where).register_full_backward_hook(_clipped)
    loss, expected = gradients(model, batch)
    celora.attach(model, "exact")
    with pytest.warns(UserWarning, match=r"has a backward hook \(_clipped\)"):
        found, gradient = gradients(model, batch)
    assert found == pytest.approx(loss, rel=1e-6)
    assert (gradient - expected).norm() < OF_GRADIENT * expected.norm()


def test_hooks_of_all_modules_keep_the_padding() -> None:
    model, batch = model_of("llama"), ragged([11, 4, 7, 1])

    def later(module: nn.Module, args: Any, output: Any) -> Any:
        return output * (1 + output.shape[1]) if type(module).__name__ == "LlamaMLP" else None

    handle = nn.modules.module.register_module_forward_hook(later)
    try:
        loss, expected = gradients(model, batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no layer is estimated
            assert any("hooks of all modules" in note for note in celora.attach(model, "exact").notes)
        found, gradient = gradients(model, batch)
    finally:
        handle.remove()
    assert found == pytest.approx(loss, rel=1e-6)
    assert (gradient - expected).norm() < OF_GRADIENT * expected.norm()


def _alora(**settings: Any) -> LoraConfig:
    """PEFT tells aLoRA's layers where the adapter begins in each row of the batch."""
    return LoraConfig(alora_invocation_tokens=[7], init_lora_weights=False, task_type="CAUSAL_LM", **settings)


def _velora(**settings: Any) -> LoraConfig:
    """VeLoRA's gradient of A has a mean over all tokens in it."""
    return LoraConfig(velora_config=peft.VeloraConfig(num_groups=4), init_lora_weights=False, **settings)


def _lily(**settings: Any) -> Any:
    """Lily's router takes a mean over all tokens."""
    return peft.LilyConfig(r=4, **settings)


def _from(name: str, make: Callable[..., Any]) -> Any:
    """Only if this version of PEFT has it."""
    return pytest.param(make, marks=pytest.mark.skipif(not hasattr(peft, name), reason=f"PEFT has no {name} yet"))


@pytest.mark.parametrize("make", [_alora, _from("VeloraConfig", _velora), _from("LilyConfig", _lily)])
def test_adapters_that_see_the_whole_batch_keep_the_padding(make: Callable[..., peft.PeftConfig]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(model_of("llama").unload(), make(target_modules=["q_proj", "up_proj"])).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    batch = ragged([11, 4, 7, 6])
    batch["input_ids"][:, 1] = 7
    loss, expected = gradients(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lily has no plain LoRA layer
        assert any("Padding stays: " in note for note in celora.attach(model, "exact").notes)
    found, gradient = gradients(model, batch)
    assert found == pytest.approx(loss, rel=1e-6)
    assert (gradient - expected).norm() < OF_GRADIENT * expected.norm()
