"""TorchScript traces PEFT's own operators: it cannot see a kernel, and refuses functions that work in place."""

from __future__ import annotations

import pytest
import torch

import celora
from celora import CELoraConfig
from machine import refuses
from small import make_model

BOTH = CELoraConfig(estimator="int8", forward="int8", fused=True)


# TorchScript warns that it is old, and of each number that it takes for a constant.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:`torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("config", ["exact", "paper", BOTH], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_a_trace_is_that_of_peft(config: str | CELoraConfig, training: bool) -> None:
    if config is BOTH and refuses():
        return
    model, plain = (make_model().train(training) for _ in range(2))
    celora.attach(model, config)
    x = torch.randn(2, 5, 48, requires_grad=training)
    for name in ("layers.0.mlp", "layers.1.input_layernorm"):
        traced, expected = (each.get_base_model().model.get_submodule(name) for each in (model, plain))
        found = torch.jit.trace(traced, (x,), check_trace=False)(x)
        torch.testing.assert_close(found, expected(x), rtol=1e-5, atol=1e-6)
