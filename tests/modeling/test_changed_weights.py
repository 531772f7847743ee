"""8-bit copies of weights that change while celora is attached: no product is computed with an old copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

import celora
from celora import CELoraConfig
from celora.runtime.attachment import require
from machine import refuses
from small import make_batch, make_model, train

pytestmark = pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")
# Every layer in both directions, and the logits.
BOTH = CELoraConfig(
    estimator="int8", forward="int8", refresh_every=1000, fused=True, labelled_head=True, head_forward="int8"
)
LAYER = "base_model.model.model.layers.1.mlp.up_proj"


def steps(model: PeftModel, count: int) -> None:
    """Steps that change no parameter."""
    train(model, count, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0))


def trained(model: PeftModel) -> PeftModel:
    """Attached, and trained for two steps, so that all copies are made."""
    celora.attach(model, BOTH)
    model.train()
    steps(model, 2)
    return model


def results(model: PeftModel, batch: dict[str, Tensor] | None = None) -> list[Tensor]:
    model.zero_grad()
    loss = model(**(make_batch(0) if batch is None else batch)).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def with_new_copies(model: PeftModel, batch: dict[str, Tensor] | None = None) -> list[Tensor]:
    require(model).forget_copies()
    return results(model, batch)


def weight(model: PeftModel) -> torch.nn.Parameter:
    found: torch.nn.Parameter = model.get_submodule(LAYER).get_base_layer().weight
    return found


def replaced(model: PeftModel) -> None:
    weight(model).data = torch.randn_like(weight(model))


def of_the_head(model: PeftModel) -> None:
    head = model.get_output_embeddings().weight
    head.data = torch.randn_like(head)


def another_adapter(model: PeftModel) -> None:
    """PiSSA takes the largest part of each base weight into the adapter."""
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa"))
    model.set_adapter("other")


def added_in_place(model: PeftModel) -> None:
    """OLoRA does the same in place, so neither memory nor version tells."""
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights="olora"))


def another_in_place(model: PeftModel) -> None:
    added_in_place(model)
    model.set_adapter("other")


@pytest.mark.parametrize("change", [replaced, of_the_head, another_adapter, added_in_place, another_in_place])
def test_a_weight_with_other_memory_is_noticed_at_once(change: Callable[[PeftModel], None]) -> None:
    model = trained(make_model())
    before = results(model)[0]
    change(model)
    after, expected = results(model), with_new_copies(model)
    assert not torch.allclose(after[0], before)
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("words", [40, 61 + 32])
def test_a_vocabulary_of_another_size(words: int) -> None:
    """Transformers puts other memory under the same parameter. An old copy would write beside the logits."""
    model = trained(make_model())
    model.resize_token_embeddings(words, mean_resizing=False)
    batch = make_batch(0)
    batch = {name: value.clamp(max=words - 1) for name, value in batch.items()}
    torch.testing.assert_close(results(model, batch), with_new_copies(model, batch))


def test_a_change_in_place_is_noticed_at_once_after_a_step() -> None:
    """PEFT merges like this, without a new version. ReLoRA resets the adapter afterwards, and goes on."""
    model = trained(make_model())
    before = results(model)[0]
    steps(model, 1)
    weight(model).data.add_(1.0)
    after = results(model)
    assert not torch.allclose(after[0], before)
    torch.testing.assert_close(after, with_new_copies(model))


def test_a_head_that_changed_in_place_is_noticed_at_the_next_step() -> None:
    model = trained(make_model())
    model.get_output_embeddings().weight.data.add_(1.0)
    steps(model, 1)
    torch.testing.assert_close(results(model), with_new_copies(model))


def test_attaching_again_makes_all_copies_anew() -> None:
    model = trained(make_model())
    weight(model).data.add_(1.0)
    celora.attach(model, BOTH)
    torch.testing.assert_close(results(model), with_new_copies(model))
