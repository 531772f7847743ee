"""The forward of a SwiGLU block, `down_proj(silu(gate_proj(x)) up_proj(x))`, with `silu(gate) up` in one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from celora.modeling import families
from celora.modeling.adapter import touched
from celora.modeling.own_forward import OwnForward, computable, gives, numbers, single
from celora.modeling.trial import watched_everywhere
from celora.numerics.passes import gated

_LLAMA = families.Gate()


class Gate(OwnForward):
    """The forward of a SwiGLU block. It calls the projections, but not the activation, so no hook may wait for that."""

    name = "gates"

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        compact = self.switch.compact
        x = single(args, kwargs, "gated", compact=compact)
        parts = None if x is None else named_parts(module, x.dtype)
        if x is None or parts is None or _watched(getattr(module, parts.activation)):
            return type(module).forward(module, *args, **kwargs)
        gate, up = getattr(module, parts.gate)(x), getattr(module, parts.up)(x)
        fit = computable(gate, "gated", compact=compact) and type(up) is torch.Tensor
        fit = fit and (up.dtype, up.shape, up.device) == (gate.dtype, gate.shape, gate.device)
        if not fit:
            return getattr(module, parts.down)(getattr(module, parts.activation)(gate) * up)
        return getattr(module, parts.down)(gated(gate, up, in_8_bits=self.switch.saves_compactly))


def named_parts(module: nn.Module, dtype: torch.dtype = torch.float32) -> families.Gate | None:
    """The names of a SwiGLU block's parts, if some family has these names; None for any other module."""
    for parts in families.column("gate"):
        if is_silu(getattr(module, parts.activation, None)) and multiplies(type(module).forward, dtype, parts):
            return cast(families.Gate, parts)
    return None


def is_silu(activation: object) -> bool:
    """Whether this is torch's own SiLU, or the one of Transformers."""
    kind = type(activation)
    return kind is nn.SiLU or (kind.__name__ == "SiLUActivation" and kind.__module__.startswith("transformers."))


def _watched(activation: nn.Module) -> bool:
    """Whether a hook of the activation, a global hook, or a replaced forward needs the activation to be called."""
    return touched(activation) or watched_everywhere()


@functools.cache
def multiplies(forward: Callable[..., Any], dtype: torch.dtype = torch.float32, parts: families.Gate = _LLAMA) -> bool:
    """Whether a block's forward computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))` in this dtype.

    The trial uses a block with only these four parts, under the names in `parts`. A forward that asks for anything else
    fails it.
    """
    block = _Parts({parts.gate: torch.sin, parts.up: torch.cos, parts.down: torch.sinh, parts.activation: F.silu})
    x = numbers(1, 3, 4).to(dtype)
    return gives(lambda: forward(block, x), (F.silu(x.sin()) * x.cos()).sinh()) and not block.lacked


class _Parts:
    """A block that notes what it was asked for beside its parts."""

    def __init__(self, parts: dict[str, Callable[[Tensor], Tensor]]) -> None:
        self.lacked: list[str] = []
        vars(self).update(parts)

    def __getattr__(self, name: str) -> Any:
        self.lacked.append(name)
        raise AttributeError(name)
