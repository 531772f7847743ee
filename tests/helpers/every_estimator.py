"""One LoRA layer, all estimators that it can train under, and gradients sent through it."""

from __future__ import annotations

import itertools

import torch
from peft import PeftModel
from torch import Tensor

import celora
from celora import CELoraConfig
from celora.modeling.graft import LayerGraft
from celora.runtime.attachment import require
from lora_layer import layer, run
from machine import IN, OUT, refuses_config

TOKENS = 40
MEMBERS = {
    **{name: {"estimator": name} for name in ("int8", "fp8")},
    "int8, no copy": {"estimator": "int8", "weight_copy": False},
    **{
        f"{estimator}, {selection}, {factor or 'no factor'}, {precision}": {
            "estimator": estimator,
            "selection": selection,
            "precision": precision,
            "rank": 4 if factor else 0,
            "factor": factor or "svd",
        }
        for estimator, selection, factor, precision in itertools.product(
            ("columns", "tokens"), ("topk", "energy", "sampled"), ("", "svd", "gradient"), ("native", "int8", "fp8")
        )
    },
}


def possible() -> list[str]:
    """The estimators that this machine does not refuse."""
    return [name for name, member in MEMBERS.items() if not refuses_config(CELoraConfig(**{"rank": 0, **member}))]


def plain_layer(dtype: torch.dtype, weight: Tensor | None = None) -> PeftModel:
    """The layer without celora. `weight: (out, in)` replaces its base weight, if given."""
    model = layer(OUT, IN, seed=0, dtype=dtype, bias=False, adapter_dtype=True, lora_alpha=8)
    if weight is not None:
        model.base_model.model[0].base_layer.weight.data = weight.to(dtype)
    return model


def run_through(model: PeftModel, G: Tensor) -> dict[str, Tensor]:
    """Send `G: (T, out)` back through the layer; return the output and the gradients of the input and the adapter."""
    return run(model, torch.randn(len(G), IN, generator=torch.Generator().manual_seed(1)).to(G.dtype), G)


def attach_ready(member: str, model: PeftModel, seen: Tensor, *, fused: bool) -> LayerGraft:
    """Attach an estimator and refresh it once, from the gradient `seen`; return the layer's graft."""
    celora.attach(model, CELoraConfig(**{"rank": 0, **MEMBERS[member]}, fused=fused, refresh_every=10**6))
    run_through(model, seen)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    (graft,) = require(model).grafts.values()
    return graft


def ordinary(dtype: torch.dtype) -> Tensor:
    return torch.randn(TOKENS, OUT, generator=torch.Generator().manual_seed(2)).to(dtype)
