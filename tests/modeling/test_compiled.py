"""Compiled graphs call a layer through custom operators: their results, and the shapes that they promise."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import celora
from celora import CELoraConfig, CELoraError
from celora.modeling.compiled import forward_product, grad_input, quantised, rounded_rows
from celora.modeling.graft import LayerGraft
from celora.modeling.switch import Mode, Switch
from celora.numerics.estimators import Columns
from celora.numerics.products import both_ways
from celora.runtime.attachment import require
from decoders import model_of
from labelled import masked_batch
from layers import make_adapted
from machine import refuses
from small import MEMBERS, make_batch, make_model, train
from without import without

BOTH = CELoraConfig(estimator="int8", forward="int8", refresh_every=3, fused=True)


@pytest.fixture
def layer() -> tuple[nn.Linear, LayerGraft]:
    linear = nn.Linear(8, 12, bias=False).requires_grad_(False)
    return linear, LayerGraft(Columns(12, 8, keep_ratio=0.5, rank=2), Switch())


def test_a_refresh_is_exact_and_observed(layer: tuple[nn.Linear, LayerGraft], monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onednn")
    (linear, graft), gradient = layer, torch.randn(5, 12)
    found = grad_input(gradient, linear.weight, 8, graft.key, Mode.OBSERVE.value)
    assert found.equal(gradient @ linear.weight)
    assert graft.observed == 1
    assert graft.switch.compiled


def test_an_estimate_is_the_layer_s_own(layer: tuple[nn.Linear, LayerGraft]) -> None:
    (linear, graft), gradient = layer, torch.randn(5, 12)
    graft.observe(gradient, linear.weight)
    graft.estimator.select()
    found = grad_input(gradient, linear.weight, 8, graft.key, Mode.ESTIMATE.value)
    assert found.equal(graft.estimator.estimate(gradient, linear.weight))


def test_a_quantised_weight_is_read_by_the_key_of_its_layer(layer: tuple[nn.Linear, LayerGraft]) -> None:
    (linear, graft), gradient = layer, torch.randn(5, 12)
    quantised[graft.key] = linear
    found = grad_input(gradient, None, 8, graft.key, Mode.EXACT.value)
    assert graft.switch.compiled
    torch.testing.assert_close(found, gradient @ linear.weight)
    twin = copy.deepcopy(graft)
    with pytest.raises(CELoraError, match="run it once before you compile it"):
        grad_input(gradient, None, 8, twin.key, Mode.EXACT.value)


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


IN_8_BITS = pytest.param(
    MEMBERS["int8 both ways"],
    id="int8",
    marks=pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products"),
)


@pytest.mark.parametrize("preset", [pytest.param("exact", id="exact"), IN_8_BITS])
def test_a_tool_that_computes_shapes(preset: str | CELoraConfig) -> None:
    """Tensors without numbers pass a model that has trained; afterwards it trains as before."""
    model, batch = model_of("llama"), masked_batch()
    celora.attach(model, preset)
    model.train()
    gradients(model, batch)
    expected = gradients(model, batch)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        # Older versions of Transformers read a mask themselves.
        output = model(**{name: mode.from_tensor(batch[name]) for name in ("input_ids", "labels")})
        assert output.logits.shape == (*batch["input_ids"].shape, model.config.vocab_size)
        output.loss.backward()
    again = gradients(model, batch)
    assert all(ours.equal(theirs) for ours, theirs in zip(again, expected, strict=True))


def test_graphs_are_promised_the_right_shape(layer: tuple[nn.Linear, LayerGraft]) -> None:
    with FakeTensorMode():
        gradient, weight = torch.empty(5, 12, dtype=torch.bfloat16), torch.empty(12, 8)
        for found in (
            grad_input(gradient, weight, 8, layer[1].key, Mode.OBSERVE.value),
            grad_input(gradient, None, 8, layer[1].key, Mode.EXACT.value),
            forward_product(gradient, weight.T, None, 8, layer[1].key, torch.bfloat16, False),
            forward_product(gradient, None, None, 8, layer[1].key, torch.bfloat16, False),
        ):
            assert (found.shape, found.dtype) == ((5, 8), torch.bfloat16)
        for given in (gradient, torch.empty(12, 5).t()):
            q, scale = rounded_rows(given)
            assert (q.shape, q.dtype, scale.shape, scale.dtype) == ((5, 12), torch.int8, (5,), torch.float32)
            assert q.is_contiguous()


def test_rounded_rows_of_any_number_are_one_graph() -> None:
    """`len` of a tensor without numbers would fix their number, and each other one would be another graph."""
    counter = CompileCounter()
    compiled = torch.compile(lambda x: rounded_rows(x)[1] * 2, backend=counter, dynamic=True, fullgraph=True)
    for rows in (3, 5, 7):
        assert compiled(torch.randn(rows, 12)).shape == (rows,)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.fixture
def integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on accelerators, torch multiplies in 8 bits."""
    without(monkeypatch, "c", "onednn")
    if refuses():
        pytest.skip("torch multiplies nothing in 8 bits here, which is tested in test_products")


def on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    monkeypatch.setattr(both_ways, "reads_freely", lambda _: False)
    model = make_model().train()
    celora.attach(model, BOTH)
    return model


@pytest.mark.usefixtures("integers")
@pytest.mark.parametrize("kind", ["GPT-2 Conv1D", "celora int8"])
def test_copies_for_graphs_are_of_the_same_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On accelerators a copy is made anew when a step has ended. GPT-2's square `c_proj` holds its transpose."""
    expected, model = (make_adapted(kind).train() for _ in range(2))
    for trained, here in ((expected, True), (model, False)):
        monkeypatch.setattr(both_ways, "reads_freely", lambda _, here=here: here)
        celora.attach(trained, BOTH)
        for step in range(4):
            trained(**make_batch(step)).loss.backward()
            require(trained).clock.advance()
    products = [forward.product for forward in require(model).forwards.values()]
    assert any(product.traceable for product in products) == (kind == "GPT-2 Conv1D")
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert found.grad is wanted.grad is None or found.grad.equal(wanted.grad)


@pytest.mark.usefixtures("integers")
def test_a_copy_for_graphs_goes_with_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer whose forward is exact again, the backward still multiplies with it."""
    model = on_an_accelerator(monkeypatch)
    train(model, 1)
    forward = require(model).forwards["base_model.model.model.layers.1.mlp.down_proj"]
    layer = model.base_model.model.model.layers[1].mlp.down_proj.base_layer
    forward.give_up()
    forward.keep_up()
    assert forward.product.traceable
    layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    forward.keep_up()
    assert not forward.product.holds_copy


@pytest.mark.usefixtures("integers")
def test_a_loaded_state_needs_no_other_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_an_accelerator(monkeypatch)
    train(model, 1)
    celora.save_state(model, tmp_path)
    celora.load_state(model, tmp_path)
    assert all(forward.product.traceable for forward in require(model).forwards.values())
