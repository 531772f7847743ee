"""RMS norms: a trial finds out which variant each one is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import celora
from celora import CELoraConfig
from celora.kernels.c import library as kernels
from celora.modeling.passes.norm import Norm, recognise
from celora.modeling.switch import Switch
from decoders import logit_gradients, model_of

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
DTYPES = [torch.float32, torch.bfloat16]
FUSED = CELoraConfig(estimator="dense", fused=True)
NORMS = {LlamaRMSNorm: (0.0, True), GemmaRMSNorm: (1.0, False), Olmo2RMSNorm: (0.0, False)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
def test_norms_are_recognised(kind: Any, dtype: torch.dtype) -> None:
    norm = kind(48).to(dtype)
    nn.init.normal_(norm.weight)
    found = recognise(norm)
    assert found is not None
    assert found.offset == NORMS[kind][0]
    assert found.rounds == NORMS[kind][1] or dtype == torch.float32  # in float32 nothing is rounded


def test_a_norm_is_tried_in_each_dtype() -> None:
    norm = Olmo2RMSNorm(32).requires_grad_(False).train()
    nn.init.normal_(norm.weight)
    Norm(Switch()).under(norm)
    for dtype in DTYPES:  # in the first dtype it cannot be told from Llama's
        x = torch.randn(200, 32).to(dtype)
        assert (norm.to(dtype)(x) == norm.eval()(x)).float().mean() > (0.99 if dtype == torch.bfloat16 else 0.3)
        norm.train()


def test_a_norm_whose_class_is_changed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = LlamaRMSNorm(32).requires_grad_(False).train()
    Norm(Switch()).under(norm)
    x = torch.randn(8, 32)
    norm(x)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: 3 * x)
    assert norm(x).equal(3 * x)
    assert copy.deepcopy(norm)(x).equal(3 * x)


def test_padding_of_zeros_tells_nothing_wrong() -> None:
    model = model_of("gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_()
        model.get_input_embeddings().weight[0] = 0
    batch = {"input_ids": torch.randint(3, 64, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    batch["input_ids"][:, :6] = 0
    batch["attention_mask"][:, :6] = 0
    expected = logit_gradients(model, batch)
    celora.attach(model, FUSED)
    torch.testing.assert_close(logit_gradients(model, batch), expected, rtol=1e-3, atol=1e-5)


def test_another_formula_is_left_alone() -> None:
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 0.5

    norm, x = OtherRMSNorm(16).requires_grad_(False).train(), torch.randn(3, 16)
    expected = norm(x)
    Norm(Switch()).under(norm)
    assert norm(x).equal(expected)
    assert norm.forward.tried == {torch.float32: None}
