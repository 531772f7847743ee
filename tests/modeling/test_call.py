"""Calls of a model inside one another, and calls that were interrupted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import celora
from celora.modeling.attention import ATTENTION
from celora.modeling.hooks import remove
from labelled import masked_batch
from small import make_batch, make_model, train

pytestmark = pytest.mark.filterwarnings("ignore:celora. padding stays in batches")  # for the sake of the hooks


def reference(model: PeftModel) -> None:
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=make_batch(9)["input_ids"][:, :5])


def evaluation(model: PeftModel) -> None:
    with torch.no_grad():
        model(**make_batch(8))


def another_loss(model: PeftModel) -> None:
    model(**make_batch(8)).loss.backward()


@pytest.mark.parametrize("inner", [reference, evaluation, another_loss])
@pytest.mark.parametrize("where", ["layers.1", "layers.1.self_attn.q_proj", "norm"])
def test_a_call_inside_a_call_is_the_models_own(where: str, inner: Callable[[PeftModel], None]) -> None:
    found = {}
    for attached in (False, True):
        model = make_model().train()
        if attached:
            celora.attach(model, "exact")
        inside: list[nn.Module] = []

        def call_again(module: nn.Module, _: Any, inside: list[nn.Module] = inside, model: PeftModel = model) -> None:
            if not inside:
                inside.append(module)
                inner(model)
                inside.clear()

        model.get_base_model().model.get_submodule(where).register_forward_pre_hook(call_again)
        train(model, 3)
        found[attached] = model(**make_batch(0)).loss.detach()
    torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=0)


@pytest.mark.parametrize("where", ["layers.0.self_attn.o_proj", "layers.0.self_attn.k_proj"])
def test_after_an_interruption_the_decoder_alone_sees_its_padding(where: str) -> None:
    """torch calls no hook after `KeyboardInterrupt`. Transformers makes no mask for an attention of another name."""
    model, batch = make_model().train(), masked_batch()
    tokens = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].flip(1)}
    decoder = model.get_base_model().model
    with torch.no_grad():
        expected = decoder.eval()(**tokens)[0]
    model.train()
    celora.attach(model, "exact")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    layer = decoder.get_submodule(where)
    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    handle.remove()
    with torch.no_grad():
        found: Tensor = decoder.eval()(**tokens)[0]
    assert found.equal(expected)
    assert model.config._attn_implementation != ATTENTION


def test_a_copy_of_an_interrupted_model_is_settled_in_any_order() -> None:
    model, batch = make_model().train(), masked_batch()
    celora.attach(model, "exact")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    handle.remove()
    for order in (1, -1):
        copied = copy.deepcopy(model)
        for module in [*copied.modules()][::order]:
            remove(module)
        assert "_loss_function" not in vars(copied.get_base_model())
