"""Hooks for an RMS norm. The first call in each dtype finds out by trial which variant it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from celora.modeling.passes.base import Pass, alone, numbers
from celora.modeling.switch import Switch
from celora.numerics.passes import rms_norm


@dataclass(frozen=True)
class _NormKind:
    """One of the RMS norms there are: the arguments of `rms_norm`."""

    offset: float
    rounds: bool


_NORMS = (_NormKind(0.0, rounds=True), _NormKind(0.0, rounds=False), _NormKind(1.0, rounds=False))


class Norm(Pass):
    """Of an RMS norm; which one it is, the first call in each dtype tries."""

    name, operation = "RMS norms", "rms_norm"

    def __init__(self, switch: Switch) -> None:
        super().__init__(switch)
        self._tried: dict[torch.dtype, _NormKind | None] = {}

    def instead(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs or len(args) != 1 or not self.takes(module, args[0]) or not alone(module):
            return None
        x, weight = args[0], module.weight
        if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype != x.dtype:
            return None
        if weight.device != x.device or weight.shape != x.shape[-1:] or not weight.is_contiguous():
            return None
        weight, eps = weight.detach(), epsilon(module)
        if x.dtype not in self._tried:
            self._tried[x.dtype] = _recognise(module, weight, eps)
        kind = self._tried[x.dtype]
        if kind is None:
            return None
        self.held = rms_norm(x, weight, eps, offset=kind.offset, rounds=kind.rounds)
        return (x.detach()[:0],), {}


def epsilon(module: nn.Module) -> float:
    """Of an RMS norm; 0 if it has none that is known."""
    found = next((value for name in ("variance_epsilon", "eps") if (value := getattr(module, name, None))), 0.0)
    return found if isinstance(found, float) else 0.0


def _recognise(module: nn.Module, weight: Tensor, eps: float) -> _NormKind | None:
    """Which RMS norm this is, by its own forward; None if it is none of those that are known."""
    x = numbers(4, len(weight)).to(weight.dtype)
    with torch.no_grad():
        try:
            expected, nothing = module.forward(x), module.forward(x[:0])
        except Exception:  # not of such a shape
            return None
        if not isinstance(expected, Tensor) or (expected.dtype, expected.shape) != (x.dtype, x.shape) or len(nothing):
            return None
        found = {kind: rms_norm(x, weight, eps, offset=kind.offset, rounds=kind.rounds) for kind in _NORMS}
        errors = {kind: (of - expected).abs() for kind, of in found.items()}
        nearest = min(_NORMS, key=lambda kind: float(errors[kind].sum()))
        allowed = 4 * torch.finfo(x.dtype).eps * expected.abs()
        return nearest if bool((errors[nearest] <= allowed).all()) else None
