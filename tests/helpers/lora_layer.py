"""One linear layer with LoRA: its output and gradients, and whether its adapter was fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from celora import CELoraConfig
from celora.modeling.adapter import Adapter
from celora.modeling.fused import FusedGraft
from small import made_once

FUSED = CELoraConfig(estimator="dense", fused=True)


@made_once
def layer(
    out: int = 20,
    inp: int = 12,
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    adapter_dtype: bool = False,
    **lora: Any,
) -> PeftModel:
    """The layer in a model of its own. The same seed gives the same weights."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(inp, out, bias=bias)).to(dtype)
    lora = {"r": 4, "lora_alpha": 12, "init_lora_weights": False, **lora}
    return get_peft_model(base, LoraConfig(target_modules=["0"], **lora), autocast_adapter_dtype=adapter_dtype).train()


def run(model: PeftModel, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of one forward and backward pass."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.grad = None
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(g)
    return {"output": y.detach(), "x": x.grad} | {name: p.grad for name, p in trained.items()}


def fused_calls(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Adapter]:
    """Record all calls of the fused path from now on."""
    seen: list[Adapter] = []
    before = FusedGraft.takes

    def record(self: FusedGraft, *args: Any) -> bool:
        takes = before(self, *args)
        if takes:
            seen.append(self.taken[0])
        return takes

    monkeypatch.setattr(FusedGraft, "takes", record)
    return seen
