"""Tells what this machine cannot do, and checks that celora refuses it: the layer is exact, and the report says why.

A test that needs 8-bit products calls `refuses` first. If that returns true, it has checked the refusal, and the test
is over.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import celora
from celora import CELoraConfig
from celora.numerics.products.registry import make_product

OUT, IN = 32, 48  # every product takes these sizes on every device


def refuses(precision: str = "int8", *, copy: bool = True) -> bool:
    """Whether this machine refuses products of `precision`.

    If so, check that layers asking for them stay exact and say so.
    """
    why = make_product(precision, copy=copy).unavailable(OUT, IN, torch.device("cpu"))
    if why:
        _check_refusal(precision, copy, why)
    return bool(why)


def refuses_config(config: CELoraConfig) -> bool:
    """The same for all arithmetic of a configuration."""
    if config.estimator in ("int8", "fp8"):
        return refuses(config.estimator, copy=config.weight_copy)
    return config.precision != "native" and refuses(config.precision, copy=config.weight_copy)


@functools.cache
def _check_refusal(precision: str, copy: bool, why: str) -> None:
    x, G = torch.randn(6, IN, dtype=torch.float64), torch.randn(6, OUT, dtype=torch.float64)
    expected = _gradients(_layer(), x, G)
    for setting in (
        {"estimator": precision},
        {"precision": precision},
        {"precision": precision, "estimator": "tokens"},
    ):
        model = _layer()
        config = CELoraConfig(**{"weight_copy": copy, "rank": 0, "refresh_every": 1000, **setting})
        with pytest.warns(UserWarning, match="no layer can be estimated"):
            report = celora.attach(model, config)
        assert report.estimated == {}
        assert set(report.skipped.values()) == {why}
        assert why in str(report)
        for _ in range(3):  # the second would be estimated
            for found, exact in zip(_gradients(model, x, G), expected, strict=True):
                torch.testing.assert_close(found, exact)  # equal to rounding in float64
            torch.optim.SGD(model.parameters(), lr=0.0).step()


def _layer() -> PeftModel:
    torch.manual_seed(0)
    base: Any = nn.Sequential(nn.Linear(IN, OUT)).double()
    return get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)).train()


def _gradients(model: PeftModel, x: Tensor, G: Tensor) -> list[Tensor]:
    """The gradients of the input and of every trainable parameter."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).backward(G)
    return [t.grad for t in (x, *model.parameters()) if t.grad is not None]
