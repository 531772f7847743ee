"""A layer that does not compute `x W^T + b` keeps PEFT's own backward, from the start or from the moment it changes."""

from __future__ import annotations

import copy
import functools
import math
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as everywhere
from torch.nn.utils import parametrizations, prune

import celora
from celora import CELoraConfig
from celora.machine.precision import float32_roundoff, whole_float32
from celora.modeling import trial
from celora.modeling.graft import LayerGraft
from celora.modeling.survey import survey
from celora.modeling.trial import tampered, unlike
from celora.runtime.attachment import require
from layers import KINDS, make_layer
from patching import patch_all
from small import make_batch, make_model, train

HALF = CELoraConfig(estimator="columns", keep_ratio=0.5, rank=0, refresh_every=3, fused=True)
PRESETS = {"exact": "exact", "estimated": HALF}
NAME = "base_model.model.model.layers.1.mlp.up_proj"


def base_of(model: nn.Module) -> Any:
    return model.get_submodule(NAME).get_base_layer()


def gradients(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    model(**make_batch(seed)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


def _mask(base: nn.Linear) -> Tensor:
    return (torch.rand(base.weight.shape, generator=torch.Generator().manual_seed(1)) > 0.3).to(base.weight.dtype)


def _masked_forward(base: nn.Linear) -> None:
    mask = _mask(base)
    base.forward = types.MethodType(lambda self, x: F.linear(x, self.weight * mask, self.bias), base)


def _pre_hook_on_the_input(base: nn.Linear) -> None:
    base.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def _pre_hook_on_the_weight(base: nn.Linear) -> None:
    """A pre-hook that puts the masked weight in the place of the parameter, as some pruning does."""
    prune.custom_from_mask(base, "weight", _mask(base))


def _hook_on_the_output(base: nn.Linear) -> None:
    base.register_forward_hook(lambda module, args, output: output * 0.5)


def _hook_before_ours(base: nn.Linear) -> None:
    base.register_forward_hook(lambda module, args, output: output.tanh(), prepend=True)


def _parametrized(base: nn.Linear) -> None:
    parametrizations.weight_norm(base)
    with torch.no_grad():
        base.parametrizations.weight.original0.mul_(2)
    base.requires_grad_(False)


def _another_weight(base: nn.Linear) -> None:
    base.weight = nn.Parameter(base.weight * _mask(base), requires_grad=False)


DONE_TO_A_LAYER = {
    "forward": _masked_forward,
    "input": _pre_hook_on_the_input,
    "pruned": _pre_hook_on_the_weight,
    "output": _hook_on_the_output,
    "output first": _hook_before_ours,
    "parametrized": _parametrized,
    "weight": _another_weight,
}
SAID = {"forward", "input", "pruned", "output first", "parametrized"}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", DONE_TO_A_LAYER)
def test_what_is_done_to_a_base_layer_is_trained_through(what: str, when: str, preset: str) -> None:
    """The gradient is PEFT's. Estimates are compared at a refresh, where all other layers are exact, too."""
    plain, model = make_model().train(), make_model().train()
    DONE_TO_A_LAYER[what](base_of(plain))
    expected = gradients(plain)
    if when == "before":
        DONE_TO_A_LAYER[what](base_of(model))
    report = celora.attach(model, PRESETS[preset], padding_free=False)
    assert (NAME in report.skipped) == (when == "before" and what in SAID - {"output first"})
    if when == "after":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradients(model)
        DONE_TO_A_LAYER[what](base_of(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = gradients(model)
        gradients(model)
    told = [str(one.message) for one in caught]
    assert len(told) == (when == "after" and what in SAID), told
    assert all(NAME in message for message in told)
    assert_same(found, expected)


def test_an_estimate_ends_where_the_forward_is_replaced_and_goes_on_elsewhere() -> None:
    model = make_model().train()
    celora.attach(model, HALF)
    optimizer = train(model, 1)
    _masked_forward(base_of(model))
    with pytest.warns(UserWarning, match=r"up_proj keeps PEFT's own backward: its forward was replaced\.$"):
        gradients(model)
    grafts = require(model).grafts
    observed = {name: graft.observed for name, graft in grafts.items()}
    train(model, 3, first=1, optimizer=optimizer)  # one of these steps is a refresh
    more = {name for name, graft in grafts.items() if graft.observed > observed[name]}
    assert NAME not in more
    assert len(more) > 8


def test_many_patched_layers_are_said_in_two_warnings() -> None:
    model = make_model().train()
    celora.attach(model, HALF)
    for layer in survey(model).layers.values():
        _masked_forward(layer.base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, 3)
    told = [str(one.message) for one in caught if "PEFT's own backward" in str(one.message)]
    assert len(told) == 2
    assert sum(told[1].count(name) for name in survey(model).layers) == 13


@pytest.mark.parametrize("preset", PRESETS)
def test_hooks_of_every_module_count_too(preset: str) -> None:
    def half(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 0.5 if getattr(module, "out_features", 0) == 80 else None

    plain, model = make_model().train(), make_model().train()
    celora.attach(model, PRESETS[preset], padding_free=False)
    handle = everywhere.register_module_forward_hook(half)
    try:
        expected = gradients(plain)
        with pytest.warns(UserWarning, match="keeps PEFT's own backward"):
            found = gradients(model)
    finally:
        handle.remove()
    assert_same(found, expected)


def test_a_forward_around_accelerates_is_not_taken_for_it() -> None:
    from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module

    linear = nn.Linear(12, 20).requires_grad_(False)
    assert tampered(add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu"))) == ""
    assert unlike(linear) == ""
    assert tampered(copy.deepcopy(linear)) == ""
    add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu"), append=True)
    assert tampered(linear) == ""
    add_hook_to_module(linear, ModelHook(), append=True)
    assert tampered(linear) == "its forward was replaced"

    masked = nn.Linear(12, 20).requires_grad_(False)
    _masked_forward(masked)
    add_hook_to_module(masked, AlignDevicesHook(execution_device="cpu"))
    assert tampered(masked) == "its forward was replaced"
    imitated = nn.Linear(12, 20)
    imitated.forward = functools.partial(lambda module, x: x, imitated)
    assert tampered(imitated) == "its forward was replaced"


@pytest.fixture
def patched_class() -> Iterator[Callable[[Callable[..., Tensor]], None]]:
    """Replace the forward of every nn.Linear until the test ends, as instrumentation of whole libraries does."""
    own = nn.Linear.forward

    def patch(forward: Callable[..., Tensor]) -> None:
        nn.Linear.forward = forward  # type: ignore[method-assign]

    yield patch
    nn.Linear.forward = own  # type: ignore[method-assign]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_class_that_computes_something_else_is_found_out_by_trying(
    when: str, patched_class: Callable[[Callable[..., Tensor]], None]
) -> None:
    """No name tells: the class is torch's own, and so is the name of its function."""

    def rounded(self: nn.Linear, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.requires_grad else (self.weight * 8).round() / 8
        return F.linear(x, weight, self.bias)

    plain, model = make_model().train(), make_model().train()
    if when == "before":
        patched_class(rounded)
        with pytest.warns(UserWarning, match="no layer can be estimated"):
            report = celora.attach(model, "exact", labelled_head=False)
        assert len(report.skipped) == 14
        assert all("does not compute x W^T + b (relative error" in reason for reason in report.skipped.values())
        found = gradients(model)
    else:
        celora.attach(model, "exact", labelled_head=False)
        gradients(model)
        patched_class(rounded)
        with pytest.warns(UserWarning, match=r"does not compute x W\^T \+ b"):
            found = gradients(model)
    assert_same(found, gradients(plain))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (64, 2048), (300, 7)], ids=str)
def test_plain_layers_pass_and_nearly_plain_ones_do_not(size: tuple[int, int], dtype: torch.dtype) -> None:
    out_features, in_features = size
    linear = nn.Linear(in_features, out_features, dtype=dtype).requires_grad_(False)
    state = torch.get_rng_state()
    assert unlike(linear) == ""
    assert torch.get_rng_state().equal(state)
    other = nn.Linear(in_features, out_features, dtype=dtype).requires_grad_(False)
    inner, factor = other.forward, 1 + 16 * torch.finfo(dtype).eps  # much more than rounding explains
    other.__dict__["forward"] = lambda x: (inner(x).double() * (factor + 2e-5)).to(dtype)
    assert "does not compute" in str(unlike(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_kind_pass_as_they_are_and_unchanged(kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(kind, out=160, dtype=dtype)
    before = dict(vars(layer)), getattr(layer, "compute_dtype", None)
    assert unlike(layer) == ""
    assert (dict(vars(layer)), getattr(layer, "compute_dtype", None)) == before
    assert len(layer._forward_hooks) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_kind_fail_where_they_differ(kind: str) -> None:
    """Each weight is off by a sixteenth at random, as after pruning or with another quantisation."""
    layer = make_layer(kind, out=160)
    other = make_layer(kind, out=160, seed=1)
    layer.__dict__["forward"] = lambda x: 0.94 * type(layer).forward(layer, x) + 0.06 * other(x)
    assert "does not compute x W^T + b" in str(unlike(layer))


def test_reduced_products_that_the_user_allows_are_no_difference() -> None:
    before = torch.get_float32_matmul_precision()
    linear = nn.Linear(256, 64).requires_grad_(False)
    linear.__dict__["forward"] = lambda x: F.linear(x, linear.weight.bfloat16().float(), linear.bias)
    try:
        torch.set_float32_matmul_precision("medium")
        assert unlike(linear) == ""
    finally:
        torch.set_float32_matmul_precision(before)  # type: ignore[arg-type]
    assert "does not compute" in str(unlike(linear))


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has one setting")
def test_tf32_for_all_backends_is_no_reason_against_a_layer() -> None:
    """`TrainingArguments(tf32=True)` sets this. torch then refuses to say what its older setting is."""
    linear = nn.Linear(256, 64).requires_grad_(False)
    for matmul in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        matmul.fp32_precision = "none"  # what holds for all
    torch.backends.fp32_precision = "tf32"
    try:
        assert unlike(linear) == ""
        assert float32_roundoff(torch.device("cpu")) == float32_roundoff(torch.device("cuda")) == 2.0**-11
        with whole_float32():
            assert float32_roundoff(torch.device("cuda")) == 2.0**-24
        assert float32_roundoff(torch.device("cuda")) == 2.0**-11
    finally:
        torch.backends.fp32_precision = "none"
    assert float32_roundoff(torch.device("cuda")) == 2.0**-24


def test_the_default_device_does_not_matter() -> None:
    linear = nn.Linear(256, 64).requires_grad_(False)
    with torch.device("meta"):
        assert unlike(linear) == ""


def test_a_layer_is_called_once_for_its_trial_and_no_hook_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.Module] = []
    tried = trial._tried
    patch_all(monkeypatch, "celora.modeling.trial:_tried", lambda *args: calls.append(args[0]) or tried(*args))
    model, seen = make_model().train(), []
    base_of(model).register_forward_hook(lambda *_: seen.append(1))
    for preset in ("exact", HALF, "exact"):
        celora.attach(model, preset, padding_free=False)
    gradients(model)
    gradients(model)
    assert len(calls) == len(set(calls))
    assert len(set(calls) - {model.get_output_embeddings()}) == 14  # some CPUs have a faster product for that one, too
    assert len(seen) == 2


def test_a_weight_that_is_put_in_place_later_is_tried_then() -> None:
    model = make_model().train()
    base = base_of(model)
    weight = base.weight
    base.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
    assert unlike(base) is None
    report = celora.attach(model, HALF)
    assert NAME in report.estimated
    base.weight = weight
    train(model, 2)
    assert require(model).grafts[NAME].observed == 1

    own = nn.Linear.forward
    model = make_model().train()
    base = base_of(model)
    base.weight, weight = nn.Parameter(base.weight.to("meta"), requires_grad=False), base.weight
    celora.attach(model, HALF)
    base.weight = nn.Parameter(weight.detach() * math.nan, requires_grad=False)
    assert unlike(base) is None  # uninitialised numbers tell nothing
    base.weight = weight
    assert unlike(base) == ""
    assert nn.Linear.forward is own


def test_a_copy_is_tried_anew() -> None:
    model = make_model().train()
    celora.attach(model, HALF)
    gradients(model)
    copied = copy.deepcopy(model)
    grafts = [hook for m in copied.modules() for hook in m._forward_hooks.values() if isinstance(hook, LayerGraft)]
    assert all(graft._tried is None for graft in grafts)
    expected, found = gradients(model), gradients(copied)
    assert all(found[name].equal(value) for name, value in expected.items())
    _masked_forward(base_of(copied))
    with pytest.warns(UserWarning, match="its forward was replaced"):
        gradients(copied)
    assert_same(gradients(model), expected)


def test_a_dropped_layer_is_freed_at_once() -> None:
    layer = nn.Linear(12, 20).requires_grad_(False)
    assert unlike(layer) == ""
    assert layer in trial._outcomes
    gone = weakref.ref(layer)
    del layer
    assert gone() is None


def test_a_layer_that_memory_was_too_short_for_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed has shown nothing about the layer."""
    layer = nn.Linear(8, 4)
    with monkeypatch.context() as patch:
        patch.setattr(trial, "_compared", Mock(side_effect=torch.OutOfMemoryError("no memory")))
        with pytest.raises(torch.OutOfMemoryError):
            unlike(layer)
    assert unlike(layer) == ""
