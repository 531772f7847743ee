"""The forward of an RMS norm. The first call in each dtype finds out by trial which variant it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from celora.modeling import families
from celora.modeling.own_forward import OwnForward, numbers, single
from celora.modeling.switch import Switch
from celora.numerics.passes import rms_norm


class Norm(OwnForward):
    """The forward of an RMS norm with a frozen weight."""

    name = "RMS norms"

    def __init__(self, switch: Switch) -> None:
        super().__init__(switch)
        self.tried: dict[torch.dtype, families.Norm | None] = {}
        self._of: Any = None  # the class's forward that was tried

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "tried": {}, "_of": None}  # a function of the user's may not be copied

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        x = single(args, kwargs, "rms_norm", compact=self.switch.compact)
        variant = None if x is None else self._variant(module, x)
        if x is None or variant is None:
            return type(module).forward(module, *args, **kwargs)
        return rms_norm(
            x,
            module.weight.detach(),
            epsilon(module),
            offset=variant.offset,
            rounds=variant.rounds,
            in_8_bits=self.switch.saves_compactly,
        )

    def _variant(self, module: Any, x: Tensor) -> families.Norm | None:
        """Which RMS norm this is for x; None if the pass does not compute it."""
        weight = module.weight
        if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype != x.dtype:
            return None
        if weight.device != x.device or weight.shape != x.shape[-1:] or not weight.is_contiguous():
            return None
        if self._of is not type(module).forward:
            self._of, self.tried = type(module).forward, {}
        if x.dtype not in self.tried:
            self.tried[x.dtype] = recognise(module)
        return self.tried[x.dtype]


def epsilon(module: nn.Module) -> float:
    """The epsilon of an RMS norm; 0 if it has none under a known name."""
    found = next((value for name in ("variance_epsilon", "eps") if (value := getattr(module, name, None))), 0.0)
    return found if isinstance(found, float) else 0.0


@torch.no_grad()
def recognise(module: Any) -> families.Norm | None:
    """Which family's RMS norm this is, found by a trial of its class's forward; None if it is none of them."""
    weight, eps = module.weight.detach(), epsilon(module)
    x = numbers(4, len(weight)).to(weight)
    try:
        expected = type(module).forward(module, x)
    except Exception:  # it does not take this shape
        return None
    if not isinstance(expected, Tensor) or (expected.dtype, expected.shape) != (x.dtype, x.shape):
        return None
    errors: dict[families.Norm, Tensor] = {
        variant: (rms_norm(x, weight, eps, offset=variant.offset, rounds=variant.rounds) - expected).abs()
        for variant in families.column("norm")
    }
    nearest = min(errors, key=lambda variant: float(errors[variant].sum()))
    allowed = 4 * torch.finfo(x.dtype).eps * expected.abs()
    return nearest if bool((errors[nearest] <= allowed).all()) else None
