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


# Of the norm of a float32 gradient of the tiny models here: seven products in each of two blocks, and as many backward,
# of up to 80 terms each, are 2,240 roundings on the longest path. Independent ones add up like a random walk, to
# sqrt(2240) eps = 47 eps; and both of the results that are compared are rounded.
OF_GRADIENT = 2 * 2240**0.5 * torch.finfo(torch.float32).eps


def no_further(found: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether `found` is as near to the float64 `truth` as `plain`, the same in a smaller dtype without celora.

    Distances are norms over many numbers whose roundings are independent, so no CPU's make one of two equally good
    results twice as far. Where `plain` happens to be exact, one rounding, at most eps, is allowed all the same.
    """
    allowed = 2 * (plain.double() - truth).norm() + torch.finfo(plain.dtype).eps * truth.norm()
    return bool((found.double() - truth).norm() <= allowed)
