"""An input that several layers multiply in 8 bits is rounded once, and saved once for their adapters."""

from __future__ import annotations

import weakref

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import celora
from celora import CELoraConfig
from celora.numerics import reference
from celora.runtime.attachment import require
from machine import refuses
from small import make_batch, make_model
from tiers import paired

pytestmark = pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")


def attached(**model: object) -> PeftModel:
    made = make_model(**model)
    celora.attach(made, CELoraConfig(estimator="int8", forward="int8", refresh_every=3, fused=True))
    return made.train()


def step(model: PeftModel, *, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**make_batch(0)).loss
    loss.backward()


def test_autocast_decides_the_dtype_of_the_result_alone() -> None:
    """The input is rounded once, from its own dtype. Gradients have the dtypes that they have without celora."""
    model, x = attached(base_bias=True), torch.randn(9, 48, requires_grad=True)
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert y.equal(layer(x).bfloat16())
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_share_their_input_and_drop_it_with_it(monkeypatch: pytest.MonkeyPatch, autocast: bool) -> None:
    model, made = attached(), []
    forwards = require(model).forwards
    product = next(iter(forwards.values())).graft.estimator.product
    step(model, autocast=autocast)  # this forward packs the weights
    packed = type(product._packed)
    usual = packed.quantise

    def counted(self: object, x: Tensor) -> object:
        made.append(x.shape)
        return usual(self, x)

    monkeypatch.setattr(packed, "quantise", counted)
    step(model, autocast=autocast)
    assert len(made) == 2 * 4  # two blocks with four each: q, k and v share one, gate and up another
    x = torch.randn(5, 48)
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    before = layer(x)
    x.mul_(2)
    assert torch.allclose(layer(x), 2 * before)
    gone = weakref.ref(x)
    del x
    assert gone() is None


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_inputs_are_saved_in_8_bits_for_the_adapters(dtype: torch.dtype, autocast: bool, dropout: float) -> None:
    """Each number takes a byte, and one saved input serves q, k and v. A's gradient is that of the rounded input."""
    model, saved = attached(dtype=dtype, lora_dropout=dropout), []
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(100, 48).to(dtype).requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        y, _ = attention.q_proj(x), attention.k_proj(x)
    inputs = [tensor for tensor in saved if tensor.shape == x.shape and tensor.dtype != torch.bool]
    assert [tensor.dtype for tensor in inputs] == [torch.int8] * 2
    assert inputs[0].data_ptr() == inputs[1].data_ptr()
    mask = next((tensor for tensor in saved if tensor.dtype == torch.bool), None)
    g = torch.randn_like(y)
    y.backward(g)
    q, scale = reference.quantise(x.detach().double(), 1, paired=paired())
    seen = q * scale * (1 if mask is None else mask / (1 - dropout))
    lora = attention.q_proj
    through = g.double() @ lora.lora_B.default.weight.detach().to(y.dtype).double() * lora.scaling["default"]
    expected, found = through.T @ seen, lora.lora_A.default.weight.grad
    assert (found.double() - expected).norm() < (3e-3 if y.dtype == torch.float32 else 6e-3) * expected.norm()
