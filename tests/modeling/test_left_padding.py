"""Batches where padding before a sequence predicts a label: no layer estimates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import ModelOutput

import celora
from celora import CELoraConfig
from celora.modeling.switch import Mode
from celora.runtime.attachment import require
from decoders import model_of
from labelled import gradients, ragged
from tolerances import OF_GRADIENT

CONFIG = {"estimator": "tokens", "keep_ratio": 0.5}


def estimate(model: nn.Module, config: CELoraConfig) -> None:
    """Attach, and estimate without an observation before."""
    celora.attach(model, config)
    for graft in require(model).grafts.values():
        graft.mode = Mode.ESTIMATE


@contextmanager
def is_said(said: bool) -> Iterator[None]:
    with pytest.warns(UserWarning, match="padding on the left predicts a label") if said else nullcontext():
        yield


@pytest.mark.parametrize("packs", [True, False])
def test_where_padding_predicts_a_label_nothing_is_estimated(packs: bool) -> None:
    """A norm makes the gradient of a position without any token huge. It must not decide which tokens are kept."""
    model = model_of("llama")
    config = CELoraConfig(**CONFIG, labelled_head=True, padding_free=packs)
    left, right = (ragged([9, 4, 7], prompt=0, left=left) for left in (True, False))
    right["labels"] = right["input_ids"].clone()  # padding has labels, too, and attends to the sequence
    for batch, estimated in ((left, False), (ragged([9, 4, 7], prompt=1, left=True), True), (right, True)):
        celora.detach(model)
        _, expected = gradients(model, batch)
        estimate(model, config)
        with is_said(not estimated):
            _, found = gradients(model, batch)
        assert bool((found - expected).norm() > OF_GRADIENT * expected.norm()) is estimated


def smoothed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss as Trainer computes it with `label_smoothing_factor`: the model gets no labels."""
    batch = dict(batch)
    labels = batch.pop("labels")
    loss: Tensor = LabelSmoother(0.1)(model(**batch), labels, shift_labels=True)
    return loss


@pytest.mark.parametrize("labelled_head", [True, False])
def test_the_gradient_tells_where_the_model_computes_its_own_loss(labelled_head: bool) -> None:
    """Two forwards before two backwards: each backward is told by its own batch."""
    model = model_of("llama")
    batches = [ragged([9, 4, 7], prompt=prompt, left=True) for prompt in (0, 1)]

    def found() -> list[Tensor]:
        losses = [smoothed(model, batch) for batch in batches]
        every = []
        for loss in losses:
            model.zero_grad()
            loss.backward()
            every.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        return every

    expected = found()
    estimate(model, CELoraConfig(**CONFIG, labelled_head=labelled_head))
    with is_said(True):
        gradients_found = found()
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(gradients_found, expected, strict=True)]
    assert errors[0] < OF_GRADIENT < errors[1]
    celora.detach(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("labelled_head", [True, False])
def test_the_batch_after_such_a_one_is_estimated(labelled_head: bool) -> None:
    model, batches = model_of("llama"), [ragged([9, 4, 7], prompt=prompt, left=True) for prompt in (0, 1)]
    found = []
    for attached in (False, True):
        if attached:
            estimate(model, CELoraConfig(**CONFIG, labelled_head=labelled_head))
        with is_said(attached):
            for batch in batches:
                model.zero_grad()
                smoothed(model, batch).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (found[1] - found[0]).norm() > OF_GRADIENT * found[0].norm()


class Around(PreTrainedModel):
    """A model around a whole language model, as BLIP-2: its own forward computes the loss."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.language_model = LlamaForCausalLM(config)

    def get_decoder(self) -> nn.Module:
        return self.language_model.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> ModelOutput:
        logits = self.language_model(input_ids=input_ids, attention_mask=attention_mask).logits
        return ModelOutput(loss=nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def test_a_decoder_deeper_inside_is_watched() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(Around(config), lora).train()
    for prompt, estimated in ((0, False), (1, True)):
        batch = ragged([9, 4, 7], prompt=prompt, left=True)
        celora.detach(model)
        _, expected = gradients(model, batch)
        estimate(model, CELoraConfig(**CONFIG))
        with is_said(not estimated):
            _, found = gradients(model, batch)
        assert bool((found - expected).norm() > OF_GRADIENT * expected.norm()) is estimated


class Bare(PreTrainedModel):
    """A model of a user's own: without a decoder under it, and with a plain dictionary as its output."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 32)
        self.project = nn.Linear(32, config.vocab_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.project(self.embed(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_a_model_that_returns_a_dictionary() -> None:
    model = get_peft_model(Bare(LlamaConfig(vocab_size=64)), LoraConfig(target_modules=["project"])).train()
    estimate(model, CELoraConfig(**CONFIG))
    model(**ragged([9, 4, 7], left=True))["loss"].backward()
