"""RMS norms and gates by torch's operators, on devices for which celora has no kernel that reads the data once.

They take as long as the model's own. What they give is a choice of what waits for the backward: x, gate and up alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def takes(tensor: Tensor) -> bool:
    """On accelerators. On a CPU without kernels, models keep their own."""
    return tensor.device.type not in ("cpu", "meta")


def rms_norm(x: Tensor, weight: Tensor, *, offset: float, eps: float, rounds: bool) -> tuple[Tensor, Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1) + eps)
    y = wide * inverse[..., None]
    y = y.to(x.dtype).float() if rounds else y
    return y.mul_(weight.float() + offset).to(x.dtype), inverse


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, *, offset: float) -> Tensor:
    r, wide = inverse[..., None], x.float()
    h = grad * (weight.float() + offset)
    shared = (h * wide).mean(-1, keepdim=True).mul_(r.pow(3))
    return h.mul_(r).sub_(wide.mul_(shared) if wide is not x else wide * shared).to(x.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    of_gate: Tensor = torch.ops.aten.silu_backward(grad * up, gate)
    return of_gate, F.silu(gate) * grad
