"""A forward that celora gives a module: when it computes, and how it is copied."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from celora.errors import CELoraError
from celora.kernels.backends import available, choose
from celora.modeling.graft import scripted, selectively_checkpointed
from celora.modeling.hooks import Hook, nothing
from celora.modeling.switch import Switch


class OwnForward(Hook, ABC):
    """A faster forward of one module. It reads the data once.

    It becomes the module's own attribute `forward`, which PyTorch calls instead of the class's forward. Hooks,
    checkpoints and wrappers see the same arguments and the same kind of output as before, and a debugger steps into it.
    When it does not apply, it calls the class's forward.

    Attributes:
        name: what such modules compute, in the plural, for the report.
        evaluates: whether it may compute in evaluation, too.
    """

    name = "passes"
    evaluates = False

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self._module: Callable[[], nn.Module | None] = nothing

    def __getstate__(self) -> dict[str, Any]:
        """The state has the module, so that the forward of a copied module belongs to the copy."""
        return {**self.__dict__, "_module": self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._module = weakref.ref(state["_module"])

    def under(self, module: nn.Module) -> None:
        """Become the module's forward, until `celora.modeling.hooks.remove`."""
        # Weak, because the module refers to this object. A cycle would keep a deleted model in memory until collection.
        self._module = weakref.ref(module)
        module.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        if module is None:
            raise CELoraError("the module that this forward belongs to is gone; copy modules by copy.deepcopy.")
        run = self.forward if self.applies(module) else self.otherwise
        return run(module, *args, **kwargs)

    def otherwise(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The output of the module where this forward does not apply: its class's."""
        return type(module).forward(module, *args, **kwargs)

    def applies(self, module: nn.Module) -> bool:
        """Whether this forward applies: while the module trains, and in evaluation if it `evaluates`."""
        # torch.compile and TorchScript trace the class's forward, and selective checkpointing observes its operators.
        if torch.compiler.is_compiling() or scripted() or not self.switch.on:
            return False
        return (module.training or self.evaluates) and not selectively_checkpointed()

    @abstractmethod
    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The output where this forward `applies`: the fast one, or its class's if the arguments do not fit."""


def may_be_copied() -> bool:
    """Whether `nn.DataParallel` may copy a model here, whose copies would call the forward of the original."""
    return torch.accelerator.device_count() > 1


def single(args: tuple[Any, ...], kwargs: dict[str, Any], operation: str, *, compact: bool) -> Tensor | None:
    """The argument of a call with one argument, if it is `computable`; else None."""
    x = args[0] if len(args) == 1 and not kwargs else None
    return x if computable(x, operation, compact=compact) else None


def computable(x: object, operation: str, *, compact: bool = False) -> bool:
    """Whether this is a plain tensor, not empty, of at least two dimensions, for which this operation `pays`."""
    return type(x) is Tensor and x.dim() >= 2 and x.numel() > 0 and pays(operation, x, compact=compact)


def pays(operation: str, like: Tensor, *, compact: bool) -> bool:
    """Whether a kernel computes this operation, or, where inputs are saved compactly, torch's operators do."""
    return available(operation, like) and (compact or choose(operation, like).name != "torch")


def numbers(*shape: int) -> Tensor:
    """Float32 numbers from -2 to 3, for trials."""
    return torch.linspace(-2, 3, math.prod(shape), dtype=torch.float32, device="cpu").view(shape)


def gives(tried: Callable[[], Any], expected: Tensor) -> bool:
    """Whether the trial succeeds with this result."""
    try:
        found = tried()
    except Exception:  # then it computes something else
        return False
    same = isinstance(found, Tensor) and (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return same and torch.allclose(found, expected)
