"""The forward of a SwiGLU block, `down_proj(silu(gate_proj(x)) up_proj(x))`, whose middle is one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from celora.borrowed import borrow
from celora.modeling.adapter import touched
from celora.modeling.passes.own_forward import OwnForward, computable, gives, numbers, single
from celora.numerics.passes import gated


class Gate(OwnForward):
    """The forward of a SwiGLU block. It calls the projections, but not the activation, which nobody may watch then."""

    name = "gates"

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        x, activation = single(args, kwargs, "gated"), module.act_fn
        if (
            x is None
            or not is_silu(activation)
            or _watched(activation)
            or not multiplies(type(module).forward, x.dtype)
        ):
            return type(module).forward(module, *args, **kwargs)
        gate, up = module.gate_proj(x), module.up_proj(x)
        fit = computable(gate, "gated") and type(up) is torch.Tensor
        fit = fit and (up.dtype, up.shape, up.device) == (gate.dtype, gate.shape, gate.device)
        return module.down_proj(gated(gate, up) if fit else activation(gate) * up)


def is_silu(activation: object) -> bool:
    """Whether this is torch's own SiLU, or the one of Transformers."""
    kind = type(activation)
    return kind is nn.SiLU or (kind.__name__ == "SiLUActivation" and kind.__module__.startswith("transformers."))


def _watched(activation: nn.Module) -> bool:
    """Whether a hook, its own or one of all modules, or another forward waits for the activation to be called."""
    everywhere = borrow("torch.nn.modules.module:_has_any_global_hook")
    return touched(activation) or everywhere is None or bool(everywhere())


@functools.cache
def multiplies(forward: Callable[..., Any], dtype: torch.dtype = torch.float32) -> bool:
    """Whether a block's forward computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))` in this dtype.

    The trial is a block that has only these four: a forward that asks for anything else is another one.
    """
    block = SimpleNamespace(gate_proj=torch.sin, up_proj=torch.cos, down_proj=torch.sinh, act_fn=F.silu)
    x = numbers(1, 3, 4).to(dtype)
    return gives(lambda: forward(block, x), (F.silu(x.sin()) * x.cos()).sinh())
