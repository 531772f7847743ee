"""The forward of an attention that turns queries and keys by rotary embeddings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from celora.kernels.operations import available
from celora.modeling.passes.angles import make_angles
from celora.modeling.passes.own_forward import OwnForward, computable, gives, numbers

_TURN = "apply_rotary_pos_emb"  # in every decoder of Transformers that has rotary embeddings


class Rotation(OwnForward):
    """The class's forward of an attention, with stand-ins for the cosine and the sine that it is given.

    Each family of models has an attention of its own, which calls a function of its own module to turn. Neither can be
    replaced for one model alone.
    """

    name = "rotations"

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        forward = type(module).forward
        angles: Any = kwargs.get("position_embeddings")
        x = kwargs.get("hidden_states")
        fit = isinstance(angles, tuple) and len(angles) == 2 and computable(x, "rotate") and all(map(_usable, angles))
        if fit and turns(forward, turn_of(forward)):
            kwargs["position_embeddings"] = make_angles(*angles)
        return forward(module, *args, **kwargs)


def _usable(angle: Any) -> bool:
    """Whether the kernels can turn by this cosine or sine, if it fits the queries."""
    if type(angle) is not Tensor or angle.dim() != 3 or angle.requires_grad or angle.shape[-1] % 2:
        return False
    return angle.is_contiguous() and available("rotate", angle)


@functools.cache
def turns(forward: Callable[..., Any], turn: Callable[..., Any] | None) -> bool:
    """Whether an attention's forward is given angles, and turns queries and keys by them with `turn`, in one pass."""
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
    return gives(lambda: torch.cat(turn(q, k, *angles), 1), expected) and angles[0].angles.taken == 2


def turn_of(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function by which an attention turns, if it is one that is not a part of it."""
    found: Callable[..., Any] | None = getattr(inspect.unwrap(forward), "__globals__", {}).get(_TURN)
    return found
