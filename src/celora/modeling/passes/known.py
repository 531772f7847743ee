"""RMS norms, gates and rotations, on CPU each computed while the data is read once.

With torch's operators, an RMS norm and its backward read and write some twenty times the size of their input, and keep
float32 copies of it. A SwiGLU gate and a rotary embedding do so more than ten times. Here, with
`r = 1 / sqrt(mean x^2 + eps)`,

    y = w x r,                  grad_x = r h - r^3 mean(h x) x,  h = w grad_y,
    y = silu(gate) up,          grad_up = silu(gate) grad_y,     grad_gate = silu'(gate) up grad_y,
    y = q cos + half(q) sin,    grad_q = grad_y cos + half^T(grad_y sin),  half(q1, q2) = (-q2, q1),

and only x, gate and up are saved for backward, in 8 bits if the switch says so. On accelerators celora computes norms
and gates by these formulas only to save them so; Liger reads the data once there.

Modules keep their class. Each gets a `forward` of its own (`OwnForward`), which PyTorch calls instead of its class's:

- The forward of a norm computes the formula.
- The forward of a SwiGLU block calls the block's projections, and computes the formula between them.
- The forward of an attention is a copy of its class's that rotates queries and keys by the formula.

The table of families (`celora.modeling.families`) has their names and variants. A trial finds out what a class
computes. If it is none of these formulas, the module is left alone. So is a module whose `forward` somebody else has
replaced.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from celora.modeling.hooks import has_another_s_forward
from celora.modeling.own_forward import OwnForward, may_be_copied, pays
from celora.modeling.passes.gate import Gate, named_parts
from celora.modeling.passes.norm import Norm, epsilon
from celora.modeling.passes.rotation import Rotation, calls_turn, turn_of, turns


def known(model: nn.Module, *, compact: bool = False) -> dict[nn.Module, type[OwnForward]]:
    """The modules under `model` that get such a forward, each with the class of its forward.

    There are none where models may be copied. Where torch's operators compute it, there are none unless `compact`:
    whether these forwards save in 8 bits. Liger's modules stay Liger's.
    """
    found: dict[nn.Module, type[OwnForward]] = {}
    if may_be_copied():
        return found
    on = functools.cache(lambda operation, device: pays(operation, torch.empty(1, device=device), compact=compact))
    for module in model.modules():
        kind = type(module)
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        if has_another_s_forward(module) or kind.__module__.startswith("liger_kernel.") or not on("rms_norm", device):
            continue
        if kind.__name__.endswith("RMSNorm") and epsilon(module):
            if [name for name, _ in module.named_parameters()] == ["weight"]:
                found[module] = Norm
        elif named_parts(module) is not None:
            found[module] = Gate
        elif on("rotate", device) and calls_turn(kind.forward) and turns(turn_of(kind.forward)):
            found[module] = Rotation
    return found
