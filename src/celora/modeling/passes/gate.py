"""Hooks for the activation in a SwiGLU block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from celora.modeling.passes.base import Pass, alone, gives, numbers
from celora.modeling.passes.pending import Activated
from celora.modeling.switch import Switch


class Gate(Pass):
    """Of the activation in a SwiGLU block, whose result is multiplied with another projection's."""

    name, operation = "gates", "gated"

    def __init__(self, switch: Switch) -> None:
        super().__init__(switch)
        self._inside = False  # of a block that multiplies

    def under(self, module: Any) -> None:
        """Hook the activation, and the block around it, whose own forward may be replaced."""
        super().under(module.act_fn)
        module.register_forward_pre_hook(self.entered)

    def entered(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of the block."""
        if torch.compiler.is_compiling():
            return
        self._inside = "forward" not in module.__dict__ and multiplies(type(module).forward)

    def instead(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inside, self._inside = self._inside, False
        if not inside or kwargs or len(args) != 1 or not self.takes(module, args[0]) or not alone(module):
            return None
        self.held = Activated(args[0])
        return (args[0].detach()[:0],), {}


def is_silu(activation: object) -> bool:
    """Whether this is torch's own SiLU, or the one of Transformers."""
    kind = type(activation)
    return kind is nn.SiLU or (kind.__name__ == "SiLUActivation" and kind.__module__.startswith("transformers."))


@functools.cache
def multiplies(forward: Callable[..., Any]) -> bool:
    """Whether this, a block's forward, computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))`."""
    x, gate, up = numbers(3, 2, 4)
    block = SimpleNamespace(gate_proj=lambda _: gate, up_proj=lambda _: up, down_proj=lambda y: y, act_fn=Activated)
    return gives(lambda: forward(block, x), F.silu(gate) * up)
