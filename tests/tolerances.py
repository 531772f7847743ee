"""How far apart results may be that differ by rounding alone: derived, so that no CPU's own rounding decides a test."""

from __future__ import annotations

import torch

# Roundings on the way to a gradient of the tiny models here, a few products of up to 100 terms: they add up like a
# random walk, and 100 units is far beyond it.
_ROUNDINGS = 100


def after_adam(steps: int, *, lr: float, gradient: float = 1.0) -> float:
    """How far float64 parameters may be apart after `steps` of Adam, where only roundings of their gradients differ.

    A step moves a parameter by `lr m / (sqrt(v) + eps)` with eps = 1e-8, so by at most `lr / eps` times what its
    gradient, of the size `gradient` at most, is off by. This bound says nothing in float32, where it is `10^4 lr`: the
    step is as large for a gradient that is nothing but rounding. So trainings are compared in float64.
    """
    return steps * lr / 1e-8 * _ROUNDINGS * torch.finfo(torch.float64).eps * gradient
