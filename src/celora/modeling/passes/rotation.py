"""Hooks for an attention that turns queries and keys by rotary embeddings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from celora.kernels.operations import available
from celora.modeling.passes.base import Pass, gives, numbers
from celora.modeling.passes.pending import make_angles

_TURN = "apply_rotary_pos_emb"  # in every decoder of Transformers that has rotary embeddings


class Rotation(Pass):
    """Of an attention, whose queries and keys are turned by the angles that it is given."""

    name, operation = "rotations", "rotate"

    def under(self, module: Any) -> None:
        """Hook the attention; its output stays what it is."""
        module.register_forward_pre_hook(self.before, with_kwargs=True)

    def instead(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        angles, x = kwargs.get("position_embeddings"), kwargs.get("hidden_states")
        if not isinstance(angles, tuple) or len(angles) != 2 or not self.takes(module, x):
            return None
        if len(module._forward_pre_hooks_with_kwargs) > 1 or module._forward_hooks_with_kwargs:
            return None  # who else is given the angles
        if not all(_usable(of) for of in angles) or not turns(type(module).forward, turn_of(type(module).forward)):
            return None
        return args, kwargs | {"position_embeddings": make_angles(*angles)}


def _usable(angle: Any) -> bool:
    """Whether the kernels can turn by this cosine or sine, if it fits the queries."""
    if type(angle) is not Tensor or angle.dim() != 3 or angle.requires_grad or angle.shape[-1] % 2:
        return False
    return angle.is_contiguous() and available("rotate", angle)


@functools.cache
def turns(forward: Callable[..., Any], turn: Callable[..., Any] | None) -> bool:
    """Whether this, an attention's forward, is given angles, and by `turn` turns queries and keys by them as above."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None or turn is None or "position_embeddings" not in code.co_varnames[: code.co_argcount]:
        return False
    if [name for name in code.co_names if "rotary" in name] != [_TURN]:
        return False
    q, k = numbers(1, 2, 3, 4), numbers(1, 1, 3, 4)
    cosine, sine = numbers(2, 1, 3, 4)
    angles = make_angles(cosine, sine)
    try:
        expected = torch.cat(turn(q, k, cosine, sine), 1)
    except Exception:  # of another kind than this
        return False
    return gives(lambda: torch.cat(turn(q, k, *angles), 1), expected) and angles[0].of.taken == 2


def turn_of(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function by which an attention turns, if it is one that is not a part of it."""
    found: Callable[..., Any] | None = getattr(inspect.unwrap(forward), "__globals__", {}).get(_TURN)
    return found
