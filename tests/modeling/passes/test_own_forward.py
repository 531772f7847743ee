"""celora's forwards in front of a class's own: what others see of them, when they step aside, copies, and removal."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import celora
from celora import CELoraConfig, CELoraError
from celora.kernels.c import library as kernels
from celora.machine.memory import saved_for_backward
from celora.modeling.own_forward import OwnForward
from celora.modeling.passes import known as passes
from celora.modeling.passes.gate import Gate
from celora.modeling.passes.norm import Norm
from celora.modeling.switch import Switch
from celora.numerics import passes as numerics
from decoders import logit_gradients
from patching import patch_all
from small import make_model
from tolerances import no_further
from without import as_on_accelerators, without

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
FUSED = CELoraConfig(estimator="dense", fused=True)


OTHERS: dict[str, Callable[[PeftModel], object]] = {
    "evaluation": lambda model: model.eval(),
    "float64": lambda model: model.double(),
    "trained": lambda model: [p.requires_grad_() for n, p in model.named_parameters() if "norm" in n],
    "another dtype": lambda model: [m.bfloat16() for m, kind in passes.known(model).items() if kind is Norm],
    "a hook": lambda model: [m.register_forward_hook(_look) for m in looked_at(model)],
    "a hook with kwargs": lambda model: [m.register_forward_hook(_look, with_kwargs=True) for m in looked_at(model)],
    "a pre-hook": lambda model: [m.register_forward_pre_hook(_look) for m in looked_at(model)],
    "a pre-hook with kwargs": lambda model: [
        m.register_forward_pre_hook(_look, with_kwargs=True) for m in looked_at(model)
    ],
    "a backward hook": lambda model: [
        model.enable_input_require_grads(),
        *(m.register_full_backward_hook(_look) for m in looked_at(model) if "Attention" not in type(m).__name__),
    ],
    "a forward": lambda model: [setattr(m, "forward", m.forward) for m in looked_at(model)],
    "a block's forward": lambda model: [setattr(m, "forward", m.forward) for m in passes.known(model)],
    "no kernels": lambda model: None,
    "torch's operators alone": lambda model: None,
}


def looked_at(model: PeftModel) -> list[nn.Module]:
    """The modules that a pass computes. Of a gated block it computes all but the activation, so the list has that."""
    found = passes.known(model).items()
    return [module.act_fn if kind is Gate else module for module, kind in found]


def _look(*_: object) -> None:
    pass


EVERYTHING = ("rms_norm", "gated", "rotated")
LEFT = dict.fromkeys(("trained", "another dtype"), ("rms_norm",)) | {
    what: ("gated",) for what in OTHERS if "hook" in what
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_left_to_the_module(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is plain PEFT's."""
    model, plain = (make_model().train() for _ in range(2))
    for each in (model, plain):
        OTHERS[what](each)
    celora.attach(model, FUSED)
    if what == "no kernels":
        without(monkeypatch, "c")
    if what == "torch's operators alone":  # the model has moved, and no base is held in 8 bits
        as_on_accelerators(monkeypatch)
    seen: Counter[str] = Counter()
    for name in EVERYTHING:
        function = getattr(numerics, name)

        def counted(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            seen[name] += 1
            return function(*args, **kwargs)

        patch_all(monkeypatch, f"celora.numerics.passes:{name}", counted)
    batch = {"input_ids": torch.randint(3, 61, (2, 9))}
    found, expected = logit_gradients(model, batch), logit_gradients(plain, batch)
    assert set(seen) == set(EVERYTHING) - set(LEFT.get(what, EVERYTHING))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_hooks_of_others_see_what_they_saw() -> None:
    """Hooks of a norm, a block and an attention see PEFT's inputs (angles, too), outputs and gradients."""
    model, plain = (make_model().train() for _ in range(2))
    celora.attach(model, FUSED)
    seen: dict[int, list[Tensor]] = {}
    for number, each in enumerate((model, plain)):
        each.enable_input_require_grads()
        tensors: list[Tensor] = seen.setdefault(number, [])

        def look(module: nn.Module, *values: Any, tensors: list[Tensor] = tensors) -> None:
            tensors.extend(value.detach() for value in tree_leaves(values) if isinstance(value, Tensor))

        layer = each.base_model.model.model.layers[1]
        for module in (layer.input_layernorm, layer.mlp, layer.self_attn):
            module.register_forward_pre_hook(look, with_kwargs=True)
            module.register_forward_hook(look, with_kwargs=True)
            if module is not layer.self_attn:  # an attention gets named arguments, which such hooks do not see
                module.register_full_backward_hook(look)
        logit_gradients(each, {"input_ids": torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(3))})
    assert len(seen[0]) == len(seen[1]) >= 19  # Transformers 4 hands over a mask and positions, too
    for found, expected in zip(seen[0], seen[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["autocast", "checkpointing", "reentrant"])
def test_ways_to_train(how: str) -> None:
    model, batch = make_model().train(), {"input_ids": torch.randint(3, 61, (2, 9))}
    if how != "autocast":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    truth, found = logit_gradients(copy.deepcopy(model).double(), batch), []
    for _ in range(2):
        with torch.autocast("cpu", enabled=how == "autocast"):
            found.append(logit_gradients(model, batch))
        celora.attach(model, FUSED)
    if how == "autocast":  # results under autocast are float32, and less exact
        assert (found[1] - truth).norm() <= 2 * (found[0] - truth).norm()
    else:
        assert no_further(found[1], found[0], truth)


def test_less_is_saved_for_backward() -> None:
    model, batch = make_model(dtype=torch.bfloat16).train(), {"input_ids": torch.randint(3, 61, (4, 32))}
    celora.attach(model, FUSED)
    sizes = []
    for on in (False, True):
        with pytest.MonkeyPatch.context() as patch, saved_for_backward(model) as saved:
            if not on:
                without(patch, "c")
            model(**batch)
        sizes.append(saved.nbytes)
    tokens = 4 * 32
    # Saved: x itself instead of float32 copies, in four norms (the first one's input needs no gradient); each gate's
    # result.
    assert sizes[0] - sizes[1] == tokens * (4 * (4 - 2) * 48 + 2 * 2 * 80)


def test_a_copy_of_a_part_and_a_detached_model_are_plain() -> None:
    model = make_model().train()
    untouched = {name: sorted(vars(module)) for name, module in model.named_modules()}
    norm = model.base_model.model.model.norm
    celora.attach(model, FUSED)
    assert norm.forward.switch.on
    assert not copy.deepcopy(norm).forward.switch.on
    assert copy.deepcopy(model).base_model.model.model.norm.forward.switch.on
    celora.detach(model)
    assert untouched == {name: sorted(vars(module)) for name, module in model.named_modules()}


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_computes_with_its_own_weights(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, batch = make_model().train(), {"input_ids": torch.randint(3, 61, (2, 9))}
    celora.attach(model, FUSED)
    expected = model(**batch).logits
    other = copied(model)
    for module, kind in passes.known(other).items():
        assert type(module.forward) is kind
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(**batch).logits.any()
    assert model(**batch).logits.equal(expected)
    original = weakref.ref(model.base_model.model.model.norm)
    del model
    gc.collect()
    assert original() is None
    assert not other(**batch).logits.any()


def test_a_forward_without_its_module_says_so() -> None:
    norm = LlamaRMSNorm(16)
    Norm(Switch()).under(norm)
    forward = norm.forward
    del norm
    with pytest.raises(CELoraError, match=r"copy modules by copy\.deepcopy"):
        forward(torch.ones(2, 16))


def test_a_forward_that_a_user_puts_on_top_is_kept() -> None:
    model, batch = make_model().train(), {"input_ids": torch.randint(3, 61, (2, 9))}
    norm = model.base_model.model.model.norm
    celora.attach(model, FUSED)
    expected, ours = 2 * model(**batch).logits, norm.forward
    norm.forward = lambda x: 2 * ours(x)
    torch.testing.assert_close(model(**batch).logits, expected)
    mine = norm.forward
    for _ in range(2):
        celora.detach(model)
        assert norm.forward is mine
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        celora.attach(model, FUSED)
    assert norm not in passes.known(model)


@pytest.mark.parametrize("detached", ["before", "after", "never"])
def test_hooks_of_accelerate_around_it(detached: str) -> None:
    """accelerate's hooks keep the forward that they replace, and put it back."""
    model, batch = make_model().train(), {"input_ids": torch.randint(3, 61, (2, 9))}
    celora.attach(model, FUSED)
    expected = model(**batch).logits
    modules = list(passes.known(model))
    for module in modules:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert model(**batch).logits.equal(expected)
    if detached == "before":
        celora.detach(model)
    for module in modules:
        remove_hook_from_module(module)
    if detached == "after":
        celora.detach(model)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    for module in modules:
        assert isinstance(module.forward, OwnForward) is (detached == "never")
