"""The forward of an attention that turns queries and keys by rotary embeddings, each in one pass.

Each family in Transformers has its own attention. Its forward calls a function of the same file, such as
`apply_rotary_pos_emb` (`celora.modeling.families` has the names). Replacing that function would replace it for every
model. So an attention runs a copy of its class's forward, with the same code and line numbers. In the copy, that one
name refers to another function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor

from celora.modeling.families import column
from celora.modeling.own_forward import OwnForward, computable, gives, numbers
from celora.numerics.passes import rotated


class Rotation(OwnForward):
    """The forward of an attention: its class's forward with another rotary function."""

    name = "rotations"

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        forward = type(module).forward
        if calls_turn(forward):
            forward = calling(forward, functools.partial(turned, turn_of(forward)))
        return forward(module, *args, **kwargs)


def turned(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function that replaces an attention's `own` one, with the same arguments: q, k, cosine and sine."""
    if len(args) == 4 and kwargs in ({}, {"unsqueeze_dim": 1}):
        q, k, cosine, sine = args
        if all(_fit(x, cosine, sine) and turns(own, x.dtype, _partly(x, cosine)) for x in (q, k)):
            return _one_pass(q, cosine, sine), _one_pass(k, cosine, sine)
    return own(*args, **kwargs)


def _fit(x: Any, cosine: Any, sine: Any) -> bool:
    """Whether the kernels can turn x: (B, heads, T, d) by a cosine and a sine: (B or 1, T, an even number up to d)."""
    if not computable(x, "rotate") or x.dim() != 4 or type(cosine) is not Tensor or type(sine) is not Tensor:
        return False
    batch, _, tokens, size = x.shape
    if cosine.shape != sine.shape or cosine.shape[:-1] not in ((1, tokens), (batch, tokens)):
        return False
    if cosine.shape[-1] > size or cosine.shape[-1] % 2:
        return False
    same = all((angle.dtype, angle.device) == (x.dtype, x.device) for angle in (cosine, sine))
    return same and all(angle.is_contiguous() and not angle.requires_grad for angle in (cosine, sine))


def _partly(x: Tensor, cosine: Tensor) -> bool:
    """Whether only the first coordinates of a head have angles."""
    return x.shape[-1] > cosine.shape[-1]


def _one_pass(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    size = cosine.shape[-1]
    if not _partly(x, cosine):
        return rotated(x, cosine, sine)
    return torch.cat([rotated(x[..., :size], cosine, sine), x[..., size:]], -1)


@functools.cache
def turns(own: Callable[..., Any], dtype: torch.dtype = torch.float32, partly: bool = False) -> bool:
    """Whether a function turns queries and keys by `q cos + half(q) sin` in this dtype.

    Args:
        partly: whether the last coordinates have no angles; the function must not change them.
    """
    size = 8 if partly else 4
    q, k = numbers(1, 2, 3, size).to(dtype), numbers(1, 1, 3, size).to(dtype)
    cosine, sine = numbers(2, 1, 3, 4).to(dtype)

    def formula(x: Tensor) -> Tensor:
        first, second = x[..., :2], x[..., 2:4]
        turning = x[..., :4] * cosine[:, None] + torch.cat([-second, first], -1) * sine[:, None]
        return torch.cat([turning, x[..., 4:]], -1)

    return gives(lambda: torch.cat(own(q, k, cosine, sine), 1), torch.cat([formula(q), formula(k)], 1))


def turn_of(forward: Callable[..., Any]) -> Any:
    """The rotary function in the file of an attention's forward; None if there is none under a known name."""
    return getattr(inspect.unwrap(forward), "__globals__", {}).get(_name(forward))


@functools.cache
def _name(forward: Callable[..., Any]) -> str:
    """The name of the one rotary function that a forward calls, if some family has it; else ''."""
    called = getattr(getattr(inspect.unwrap(forward), "__code__", None), "co_names", ())
    known = column("rotation")
    rotary = [name for name in called if "rotary" in name or name in known]
    return rotary[0] if len(rotary) == 1 and rotary[0] in known else ""


@functools.cache
def calls_turn(forward: Callable[..., Any]) -> bool:
    """Whether an attention's forward calls exactly one such function, and can be copied."""
    while (inner := getattr(forward, "__wrapped__", None)) is not None:
        cells = getattr(forward, "__closure__", None) or ()
        if not isinstance(forward, FunctionType) or not any(cell.cell_contents is inner for cell in cells):
            return False
        forward = inner
    return isinstance(forward, FunctionType) and turn_of(forward) is not None


def calling(forward: Any, turn: Callable[..., Any]) -> Any:
    """A copy of an attention's forward and of its decorators, which calls `turn` instead of its own function."""
    inner = getattr(forward, "__wrapped__", None)
    if inner is None:
        names, cells = forward.__globals__ | {_name(forward): turn}, forward.__closure__
    else:  # a decorator has the decorated function in a cell
        copied, names = CellType(calling(inner, turn)), forward.__globals__
        cells = tuple(copied if cell.cell_contents is inner else cell for cell in forward.__closure__)
    function = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, cells)
    function.__kwdefaults__ = forward.__kwdefaults__
    return function
