"""Other code's hooks run on a fused layer. After an error, in a copy or detached, it is PEFT's layer again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import celora
from celora import CELoraConfig
from celora.modeling.fused import FusedGraft
from lora_layer import FUSED, layer, run
from small import make_batch, make_model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "config", [FUSED, CELoraConfig(estimator="tokens", keep_ratio=1.0, selection="energy", rank=0)]
)
def test_hooks_of_others_under_the_adapter(config: CELoraConfig, when: str) -> None:
    """Such hooks see the base layer's output. If they change it, the model trains through the change."""
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


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("kind", ["register_backward_hook", "register_full_backward_hook"])
def test_backward_hooks_under_the_adapter(kind: str) -> None:
    """They are called, with the gradient of the base layer's output."""
    model, x, g = layer(), torch.randn(6, 12).double(), torch.randn(6, 20).double()
    seen: list[torch.Tensor] = []
    getattr(model.base_model.model[0].base_layer, kind)(lambda module, into, out: seen.append(out[0].clone()))
    expected = run(model, x, g)
    celora.attach(model, FUSED)
    found = run(model, x, g)
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0])
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


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_is_merged_after_ctrl_c(safe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT calls what it finds in `lora_variant`, and the interrupted forward has left celora's graft there."""
    model, x = layer(), torch.randn(6, 12).double()
    expected = model(x)
    celora.attach(model, FUSED)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FusedGraft, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(x)
    assert isinstance(model.base_model.model[0].lora_variant["default"], FusedGraft)
    model.merge_adapter(safe_merge=safe)
    assert not model.base_model.model[0].lora_variant
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)


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


def test_a_copy_made_during_a_forward_is_whole() -> None:
    """A hook may copy the layer in the middle of a call.

    The copy must not keep the variant that this call removes at its end.
    """
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
