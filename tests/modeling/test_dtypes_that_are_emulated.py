"""A model in a dtype that the CPU does not multiply: none of its products meets torch's slow code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import celora
from celora.kernels import widened
from celora.kernels.backends import choose
from celora.kernels.operations import linear
from celora.modeling.float_forward import FloatForward
from celora.modeling.recognise import _close, _is_product
from patching import patch_all
from small import make_batch, make_model

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_scaled_mm"}  # for a vector torch has fast code
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(autouse=True)
def _such_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.machine.cpu:multiplies", lambda dtype: False)


class _Seen(TorchDispatchMode):
    """Lists the products that torch computes, by dtype, and how many rows the first operand has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in _PRODUCTS:
            operand = args[1] if name.startswith(("add", "badd")) else args[0]
            self.found.append((name, operand.dtype, operand.numel() // operand.shape[-1]))
        return func(*args, **(kwargs or {}))


def emulated(call: Callable[[], object]) -> list[tuple[str, torch.dtype, int]]:
    """The products of this call in a dtype that the CPU does not multiply."""
    with _Seen() as seen:
        call()
    assert seen.found
    return [(name, dtype, rows) for name, dtype, rows in seen.found if dtype != torch.float32 and rows]


def gradients(model: PeftModel, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """What a step gives the parameters; its forward is autocast to this dtype."""
    model.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = model(**make_batch(0)).loss
    loss.backward()
    return {name: p.grad.clone().double() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("targets", [{}, ATTENTION, {"use_dora": True}], ids=["all layers", "two of seven", "DoRA"])
@pytest.mark.parametrize("preset", ["exact", "paper", "auto", "fast"])
def test_no_product_of_a_step_is_emulated(
    preset: str, targets: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widened, "_MANY", 1)
    model = make_model(dtype=dtype, **targets).train()
    # Without celora, all are but the adapters', which are in float32. The input of three layers needs no gradient.
    assert len(emulated(lambda: gradients(model))) == 2 * (2 * 7 + 1) - 3
    name = str(dtype).removeprefix("torch.")
    said = f"Products of {name} are computed in float32: this CPU has no instructions for them."
    assert said in celora.attach(model, preset, head_keep_ratio=0.3).notes
    gradients(model)  # tries the layers, and refreshes
    assert emulated(lambda: gradients(model)) == []


def test_a_model_learns_what_it_learns_without() -> None:
    """Both round to bfloat16. float32 arithmetic with the same weights is the judge."""
    for targets in ({}, ATTENTION):
        plain, model = (make_model(dtype=torch.bfloat16, **targets).train() for _ in range(2))
        judge = gradients(copy.deepcopy(plain).float())
        expected = gradients(plain)
        celora.attach(model, "exact")
        found = gradients(model)
        assert found.keys() == expected.keys() == judge.keys()
        for name, value in judge.items():
            # A sum of many roundings varies; twice as far would be another computation.
            assert (found[name] - value).norm() <= 2 * (expected[name] - value).norm() + 1e-6 * value.norm(), name


def test_evaluation_is_not_emulated_but_for_a_few_tokens() -> None:
    plain, model = (make_model(dtype=torch.bfloat16).eval() for _ in range(2))
    celora.attach(model.train(), "exact")
    model.eval()
    many, few = make_batch(0)["input_ids"], torch.arange(widened._MANY - 1)[None]
    with torch.no_grad():
        expected = {ids: plain(input_ids=ids).logits for ids in (many, few)}
        model(input_ids=many)
        assert emulated(lambda: model(input_ids=many)) == []
        assert len(emulated(lambda: model(input_ids=few))) == 2 * 7 + 1
    with torch.enable_grad():  # then gradients of any order are the model's own
        layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
        x = torch.randn(16, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        assert bool(second.any())
    with torch.no_grad():
        for ids, logits in expected.items():
            found = model(input_ids=ids).logits
            assert (found - logits).float().norm() <= 2 * torch.finfo(torch.bfloat16).eps * logits.float().norm()
        assert model(input_ids=few).logits.equal(expected[few])  # bit for bit


def test_a_float32_model_is_left_as_it_is() -> None:
    plain, model = make_model().train(), make_model().train()
    notes = celora.attach(model, "exact").notes
    assert not [note for note in notes if "no instructions" in note]
    layers = [made.base_model.model.model.layers[0].mlp.up_proj.base_layer for made in (plain, model)]
    x = torch.randn(16, model.config.hidden_size)
    if choose("linear", x).name == "torch":  # some CPUs have a faster product
        expected, found = (layer(x) for layer in layers)
        assert found.equal(expected)
    expected, found = (layer.eval()(x) for layer in layers)
    assert found.equal(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("targets", [{}, ATTENTION], ids=["all layers", "two of seven"])
@pytest.mark.parametrize("preset", ["exact", "paper", "auto", "fast"])
def test_no_product_is_emulated_under_autocast(
    preset: str, targets: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TRL's trainer trains a model in float32, unless told otherwise. With few tokens, too."""
    monkeypatch.setattr(widened, "_MANY", 1)
    monkeypatch.setattr("celora.modeling.fused._FEWEST_TOKENS", 10**9)
    model = make_model(**targets).train()

    def evaluate() -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype):
            model.eval()(**make_batch(0))
        model.train()

    assert emulated(lambda: gradients(model, dtype))
    in_evaluation = len(emulated(evaluate))
    celora.attach(model, preset, head_keep_ratio=0.3)
    gradients(model, dtype)  # tries the layers, and refreshes
    assert emulated(lambda: gradients(model, dtype)) == []
    # Evaluation has PEFT's own adapters, of two products each.
    assert in_evaluation - len(emulated(evaluate)) == 2 * 7 + 1
    celora.detach(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert len(emulated(evaluate)) == in_evaluation


def test_a_base_in_8_bits_is_not_emulated_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "_MANY", 1)
    model = make_model().train()
    celora.quantise_base(model)
    celora.attach(model, "exact")
    gradients(model, torch.bfloat16)
    assert emulated(lambda: gradients(model, torch.bfloat16)) == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_under_autocast(reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model = make_model().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        celora.attach(model, "exact")
        found.append(gradients(model, torch.bfloat16))
    once, twice = found
    assert once.keys() == twice.keys()
    assert all(grad.equal(once[name]) for name, grad in twice.items())


def test_a_head_is_known_whether_or_not_autocast_rounds_its_weight() -> None:
    """Where large terms cancel, rounding a weight moves a logit by more than rounding the logit does."""
    x, weight = torch.randn(4, 64), torch.randn(32, 64)
    weight = torch.cat([weight, weight * (1 + 2**-7 * torch.rand(32, 64))], dim=1)
    x = torch.cat([x, -x], dim=1).bfloat16()
    for rounded in (weight, weight.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(x, rounded)
            assert _is_product(y, x.float(), weight, None)
            assert not _is_product(y, x.float(), weight, torch.ones(32))
            assert not _is_product(y, x.float(), weight.roll(1, 0), None)
            assert not _is_product(y * 1.05, x.float(), weight, None)
    exact, other = linear(x, weight), linear(x, weight.bfloat16())
    assert not _close(exact, other)  # so one of them alone would not do
    assert not _is_product(exact, x, weight.bfloat16(), None)


def test_autocast_rounds_what_it_rounds_without() -> None:
    """A backward inside autocast, too. float32 without autocast is the judge."""
    for targets in ({}, ATTENTION):
        plain, model = (make_model(**targets).train() for _ in range(2))
        judge = gradients(plain)
        with torch.autocast("cpu", torch.bfloat16):
            expected = gradients(plain)
        celora.attach(model, "exact")
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model)
        assert found.keys() == expected.keys() == judge.keys()
        for name, value in judge.items():
            assert (found[name] - value).norm() <= 2 * (expected[name] - value).norm() + 1e-6 * value.norm(), name


def test_a_layer_under_autocast_has_autocast_s_dtype() -> None:
    model = make_model(**ATTENTION).train()
    celora.attach(model, "exact")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with torch.autocast("cpu", torch.bfloat16):
        for dtype, expected in ((torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)):
            x = torch.randn(16, layer.in_features).to(dtype).requires_grad_()
            y = layer(x)
            y.sum().backward()
            assert (y.dtype, x.grad.dtype if x.grad is not None else None) == (expected, dtype)
            judge = x.detach().to(expected).float() @ layer.weight.t()
            # Both roundings to bfloat16, and no other: that of the sum, relative to it.
            assert (y.float() - judge).abs().max() <= torch.finfo(torch.bfloat16).eps * judge.abs().max()
        one = layer(torch.randn(layer.in_features))  # few tokens, and a weight of another dtype
        assert one.dtype == torch.bfloat16


@pytest.mark.parametrize("preset", ["exact", "fast"])
def test_layers_without_adapter_are_given_back(preset: str) -> None:
    model = make_model(dtype=torch.bfloat16, **ATTENTION).train()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    saved = get_peft_model_state_dict(model)
    celora.attach(model, preset)
    gradients(model)
    own = [name for name, module in model.named_modules() if isinstance(vars(module).get("forward"), FloatForward)]
    assert len(own) == 2 * 7 + 1
    copied = copy.deepcopy(model)
    gradients(copied)
    assert emulated(lambda: gradients(copied)) == []
    celora.attach(model, preset)  # again, and what is there is no other's
    gradients(model)
    assert emulated(lambda: gradients(model)) == []
    celora.detach(model)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name
        assert "forward" not in vars(module)
    assert get_peft_model_state_dict(model).keys() == saved.keys()
    celora.attach(model, "off")
    assert not any(isinstance(vars(module).get("forward"), FloatForward) for module in model.modules())
