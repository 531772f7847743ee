"""How a layer's input is saved for `grad_A` is a choice of its own, beside any forward."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import celora
from celora import CELoraConfig, CELoraError
from celora.kernels.backends import choose
from celora.kernels.c.library import ask_kernel
from celora.machine.memory import saved_for_backward
from celora.numerics import reference
from celora.runtime.attachment import require
from lora_layer import FUSED, layer, run
from machine import refuses
from small import make_batch, make_model
from tiers import paired

ROUNDED = dataclasses.replace(FUSED, saved_input="int8")
BOTH = CELoraConfig(estimator="int8", forward="int8", refresh_every=3, fused=True)
A = "base_model.model.0.lora_A.default.weight"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(**make_batch(0)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def bytes_saved(config: CELoraConfig, **model: object) -> int:
    made = make_model(**model).train()
    celora.attach(made, config)
    with saved_for_backward(made) as saved:
        loss = made(**make_batch(0)).loss
    del loss
    return saved.nbytes


def through(model: nn.Module, g: Tensor) -> Tensor:
    """`scaling G B`, in float64."""
    lora = model.base_model.model[0]
    matrix: Tensor = lora.lora_B.default.weight.detach().double()
    return g.reshape(-1, g.shape[-1]).double() @ matrix * lora.scaling["default"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(64,), (4, 16)])
def test_in_8_bits_beside_an_exact_forward(dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    """Only A's gradient changes: it is that of the rounded input. Everything else has the same bits."""
    model, x, g = layer(dtype=dtype), torch.randn(*lead, 12).to(dtype), torch.randn(*lead, 20).to(dtype)
    celora.attach(model, FUSED)
    expected = run(model, x, g)
    celora.attach(model, ROUNDED)
    found = run(model, x, g)
    assert all(found[name].equal(expected[name]) for name in expected.keys() - {A})
    q, scale = reference.quantise(x.double().view(-1, 12), 1, paired=False)
    grad = through(model, g).T @ (q * scale)
    assert (found[A].double() - grad).norm() < max(1e-6, torch.finfo(dtype).eps) * grad.norm()
    exact = through(model, g).T @ x.double().view(-1, 12)
    assert 1e-4 < (found[A].double() - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("dropout", [0.3, 1.0])
def test_dropout_masks_the_rounded_input(dropout: float) -> None:
    found = {}
    for config in (FUSED, ROUNDED):
        torch.manual_seed(3)
        model = layer(dtype=torch.float32, lora_dropout=dropout)
        celora.attach(model, config)
        torch.manual_seed(4)
        found[config.saved_input] = run(model, torch.randn(64, 12), torch.randn(64, 20))
    exact, rounded = found["forward"][A], found["int8"][A]
    assert (rounded - exact).norm() <= 0.01 * exact.norm()
    assert found["forward"]["output"].equal(found["int8"]["output"])


def test_in_its_own_dtype_beside_a_forward_in_8_bits() -> None:
    """A's gradient is then that of the input itself."""
    if refuses():
        return
    x, g, found = torch.randn(64, 48), torch.randn(64, 32), {}
    for saved in ("forward", "int8", "native"):
        model = layer(32, 48, dtype=torch.float32)
        report = celora.attach(model, dataclasses.replace(BOTH, saved_input=saved))
        assert ("input saved in its own dtype" in str(report)) is (saved == "native")
        found[saved] = run(model, x, g)
    grad = through(model, g)
    exact = grad.T @ x.double()
    assert (found["native"][A].double() - exact).norm() < 1e-6 * exact.norm()
    q, scale = reference.quantise(x.double(), 1, paired=paired())
    rounded = grad.T @ (q * scale)
    assert (found["forward"][A].double() - rounded).norm() < 1e-3 * rounded.norm()
    assert (rounded - exact).norm() > 1e-3 * exact.norm()
    assert all(found["int8"][name].equal(grad) for name, grad in found["forward"].items())
    assert all(found["native"][name].equal(found["forward"][name]) for name in found["forward"].keys() - {A})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_many_bytes_wait_for_the_backward(dtype: torch.dtype) -> None:
    """33 tokens; 3 x 48 + 80 numbers of inputs in each of 2 blocks, of which 48 are attention's output, saved anyway.

    In 8 bits a number takes a byte, and a token 4 more for its scale.
    """
    size, tokens = dtype.itemsize, 33
    more, gone = tokens * (3 * 48 + 80 + 4 * 4), tokens * (2 * 48 + 80) * size
    exact = bytes_saved(FUSED, dtype=dtype)
    assert bytes_saved(ROUNDED, dtype=dtype) == exact + 2 * (more - gone)
    if not refuses():
        both, native, same = (
            bytes_saved(dataclasses.replace(BOTH, saved_input=saved), dtype=dtype)
            for saved in ("forward", "native", "int8")
        )
        assert both == same
        padding = 0
        if choose("pack_both_ways", torch.device("cpu")).name == "c":  # a kernel pads what it multiplies
            padding = sum(ask_kernel("quantised_bytes", tokens, width) - tokens * width for width in (48, 48, 48, 80))
        assert both == native + 2 * (more - gone + padding)


def test_layers_of_a_model_choose_for_themselves() -> None:
    """An audit measures what the rounding does to LoRA's gradient. It compares with inputs in their own dtype."""
    model = make_model().train()
    celora.attach(model, FUSED)
    exact = gradients(model)
    report = celora.attach(model, dataclasses.replace(FUSED, overrides={"down_proj": {"saved_input": "int8"}}))
    labels = {layer.name.rpartition(".")[2]: layer.label for layer in report.layers}
    assert labels["down_proj"] == "dense, input saved in 8 bits"
    assert labels["up_proj"] == "dense"
    assert "None of 14 frozen layers estimated: only lora_A's gradient is." in str(report)
    found = gradients(model)
    changed = {name for name in exact if not found[name].equal(exact[name])}
    assert changed == {name for name in exact if "down_proj.lora_A" in name}
    audited = celora.audit(model, make_batch(0))
    assert 0.9999 < audited.cosine < 1
    assert 0 < audited.relative_error < 0.01
    with require(model).switch.own_forwards():
        assert all(grad.equal(exact[name]) for name, grad in gradients(model).items())
    copied = copy.deepcopy(model)
    assert all(grad.equal(found[name]) for name, grad in gradients(copied).items())


def test_beside_the_layers_without_zero_tokens() -> None:
    report = celora.attach(make_model(), dataclasses.replace(FUSED, zero_tokens=True, saved_input="int8"))
    assert {layer.label for layer in report.layers} == {
        "dense, input saved in 8 bits",
        "dense, without zero tokens, input saved in 8 bits",
    }
    assert not report.estimated


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model = make_model().train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        celora.attach(model, ROUNDED)
        found.append(gradients(model))
    assert all(grad.equal(found[1][name]) for name, grad in found[0].items())


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
def test_compiled_without_a_break(fresh_dynamo: None) -> None:
    model, x, g = layer(dtype=torch.float32), torch.randn(6, 12), torch.randn(6, 20)
    celora.attach(model, ROUNDED)
    expected = run(model, x, g)
    model.zero_grad()
    compiled = torch.compile(model.base_model.model[0], fullgraph=True, backend="aot_eager")
    compiled(x.requires_grad_()).backward(g)
    torch.testing.assert_close(dict(model.named_parameters())[A].grad, expected[A])


def test_adapters_that_are_not_fused_are_refused() -> None:
    model = make_model(use_dora=True)
    with pytest.raises(CELoraError, match=r"q_proj': saved_input='int8' needs a fused adapter, .*Dora.* override with"):
        celora.attach(model, ROUNDED)
    celora.attach(model, dataclasses.replace(FUSED, saved_input="native"))  # PEFT does so itself
    others = make_model(target_modules=["q_proj", "embed_tokens"])
    report = celora.attach(others, ROUNDED)  # celora leaves the embedding alone
    assert [layer.saved_input for layer in report.layers if layer.reason] == ["forward"]
