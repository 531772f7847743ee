"""Which hooks and forwards of a module are celora's, and how they are taken off."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn


class Hook:
    """The owner of celora's hooks, or a forward of celora's. This class tells them from a user's."""

    def settle(self, module: nn.Module) -> None:
        """Put back what an interrupted forward has left half-way in this module."""


def nothing() -> None:
    """A reference to nothing. Unlike a weak reference, it can be copied and pickled."""


def is_ours(hook: Any) -> bool:
    """Whether this hook, or forward, is celora's."""
    return isinstance(getattr(hook, "__self__", hook), Hook)


def remove(module: nn.Module) -> None:
    """Take every hook and forward of celora's off this one module."""
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
    if is_ours(own.get("_old_forward")):  # where accelerate's hooks keep the forward that they replaced
        own["_old_forward"] = MethodType(type(module).forward, module)


def settle(module: nn.Module) -> None:
    """Put back what an interrupted forward has left half-way in this one module."""
    for hook in module._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Hook):
            owner.settle(module)


def settle_all(model: nn.Module) -> None:
    """`settle` for every module of a model."""
    for module in model.modules():
        settle(module)
