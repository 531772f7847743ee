"""Tells celora's hooks and forwards from others, and removes them."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn


class Hook:
    """The base class of everything that celora puts onto a module as a hook or forward."""

    def settle(self, module: nn.Module) -> None:
        """Repair what an interrupted forward has left in this module."""


def nothing() -> None:
    """Like a dead weak reference, but it can be copied and pickled."""


def is_ours(hook: Any) -> bool:
    """Whether this hook, or forward, is celora's."""
    return isinstance(getattr(hook, "__self__", hook), Hook)


def hooks_of(module: nn.Module) -> list[Any]:
    """All hooks of this one module's forward and backward."""
    tables = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return [hook for hooks in tables for hook in hooks.values()]


def has_another_s_forward(module: nn.Module) -> bool:
    """Whether somebody else has replaced the forward of this one module."""
    own = module.__dict__.get("forward")
    return own is not None and not is_ours(own)


def remove(module: nn.Module) -> None:
    """Remove every hook and forward of celora from this one module."""
    settle(module)
    tables: list[list[dict[int, Any]]] = [
        [module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs],
        [module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called],
    ]
    for hooks, *marks in tables:
        for key in [key for key, hook in hooks.items() if is_ours(hook)]:
            for table in (hooks, *marks):
                table.pop(key, None)
    own = module.__dict__
    if is_ours(own.get("forward")):
        del own["forward"]
    if is_ours(own.get("_old_forward")):  # accelerate's hooks keep the replaced forward there
        own["_old_forward"] = MethodType(type(module).forward, module)


def settle(module: nn.Module) -> None:
    """Repair what an interrupted forward has left in this one module."""
    for hook in module._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Hook):
            owner.settle(module)


def settle_all(model: nn.Module) -> None:
    """`settle` for every module of a model."""
    for module in model.modules():
        settle(module)
