"""What the hooks of norms, gates and rotations have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from celora.borrowed import borrow
from celora.kernels.operations import available
from celora.modeling.graft import in_dispatch_mode
from celora.modeling.hooks import Hook
from celora.modeling.switch import Switch


class Pass(Hook, ABC):
    """The hooks of one module, which give its forward nothing to do where they know better.

    Attributes:
        name: what the module computes, in the plural.
        held: what takes the place of the output of the forward that is under way, if anything does.
    """

    name = "passes"
    operation: ClassVar[str]  # of `celora.kernels.operations`

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self.held: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": None}

    def under(self, module: Any) -> None:
        """Hook the module."""
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        module.register_forward_hook(self.after)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook (with kwargs)."""
        if torch.compiler.is_compiling():
            return None
        self.held = None
        return self.instead(module, args, kwargs)

    @abstractmethod
    def instead(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments that the forward is given instead of these; None for these."""

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook; returns None for the output as it is."""
        if torch.compiler.is_compiling():
            return None
        held, self.held = self.held, None
        return held

    def takes(self, module: nn.Module, x: object) -> bool:
        """Whether the module trains, and the kernels can work on x."""
        if type(x) is not Tensor or x.dim() < 2 or not x.numel() or not available(self.operation, x):
            return False
        # Modes look at every operator, and selective checkpointing counts them.
        return self.switch.on and module.training and "forward" not in module.__dict__ and not in_dispatch_mode()


def alone(module: nn.Module) -> bool:
    """Whether no hook but ours looks at what the module gets and returns."""
    everywhere = borrow("torch.nn.modules.module:_has_any_global_hook")
    others = module._backward_hooks or module._backward_pre_hooks or everywhere is None or everywhere()
    return not others and len(module._forward_hooks) == len(module._forward_pre_hooks) == 1


def numbers(*shape: int) -> Tensor:
    return torch.linspace(-2, 3, math.prod(shape), dtype=torch.float32, device="cpu").view(shape)


def gives(tried: Callable[[], Any], expected: Tensor) -> bool:
    """Whether the trial ends, with this result."""
    try:
        found = tried()
    except Exception:  # what it computes is then something else
        return False
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected)
