"""Derived tolerances for results that differ by rounding only, so that one CPU's own rounding decides no test."""

from __future__ import annotations

import torch

# A gradient of these tiny models is a few products of up to 100 terms. Their roundings add up like a random walk, to
# far less than 100 units.
_ROUNDINGS = 100


def after_adam(steps: int, *, lr: float, gradient: float = 1.0) -> float:
    """How far float64 parameters may differ after `steps` of Adam, if gradients differ only by rounding.

    A step moves a parameter by `lr m / (sqrt(v) + eps)` with eps = 1e-8. An error of the gradient is multiplied by at
    most `lr / eps`. `gradient` is the largest size of a gradient. In float32 this bound says nothing, because it is
    `10^4 lr`: Adam makes a whole step even if the gradient is nothing but rounding. So trainings are compared in
    float64.
    """
    return steps * lr / 1e-8 * _ROUNDINGS * torch.finfo(torch.float64).eps * gradient


# Relative to the norm of a float32 gradient of the tiny models here. Seven products in each of two blocks, forward and
# backward, with up to 80 terms each, are 2,240 roundings on the longest path. Independent roundings add up like a
# random walk, to sqrt(2240) eps = 47 eps. Both of the compared results are rounded.
OF_GRADIENT = 2 * 2240**0.5 * torch.finfo(torch.float32).eps


def no_further(found: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether `found` is as near to the float64 `truth` as `plain`, the result in a smaller dtype without celora.

    Distances are norms over many numbers with independent roundings. Of two equally good results, neither is twice as
    far as the other on any CPU. If `plain` happens to be exact, one rounding of at most eps is still allowed.
    """
    allowed = 2 * (plain.double() - truth).norm() + torch.finfo(plain.dtype).eps * truth.norm()
    return bool((found.double() - truth).norm() <= allowed)
