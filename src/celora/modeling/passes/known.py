"""What a decoder does between its products, each in one pass over its numbers: RMS norms, gates and rotations, on CPU.

Operator by operator, an RMS norm and its backward read and write some twenty times what they are given, and keep
float32 copies of it; a SwiGLU gate and a rotary embedding do so more than ten times. Here, with
`r = 1 / sqrt(mean x^2 + eps)`,

    y = w x r,                  grad_x = r h - r^3 mean(h x) x,  h = w grad_y,
    y = silu(gate) up,          grad_up = silu(gate) grad_y,     grad_gate = silu'(gate) up grad_y,
    y = q cos + half(q) sin,    grad_q = grad_y cos + half^T(grad_y sin),  half(q1, q2) = (-q2, q1),

and of all that is as large as x, only x, gate and up are saved. (On GPUs this is what Liger is for; celora does not do
it there.)

Modules keep their class. Each gets a `forward` of its own (`OwnForward`), in front of its class's:

- A norm's computes the formula.
- A SwiGLU block's calls the block's projections, and computes the formula between them.
- An attention's is a copy of the class's that turns queries and keys by the formula.

The table of families (`celora.modeling.families`) says by which names and in which variants they come. What a class
computes is found by trying it. What is none of these formulas is left alone. So is a module whose `forward` somebody
else has replaced.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from celora.kernels.operations import available
from celora.modeling.hooks import is_ours
from celora.modeling.own_forward import OwnForward
from celora.modeling.passes.gate import Gate, parts_of
from celora.modeling.passes.norm import Norm, epsilon
from celora.modeling.passes.rotation import Rotation, calls_turn, turn_of, turns


def known(model: nn.Module) -> dict[nn.Module, type[OwnForward]]:
    """The modules under `model` that can be computed so, each with its pass.

    There are none without compiled kernels. Nor are there any on machines with several accelerators, where
    `nn.DataParallel` may copy the model: its copies of a module would call the forward of the original.
    """
    found: dict[nn.Module, type[OwnForward]] = {}
    if not available("rms_norm", torch.empty(1, device="cpu")) or torch.accelerator.device_count() > 1:
        return found
    for module in model.modules():
        kind = type(module)
        if any(p.device.type != "cpu" for p in itertools.islice(module.parameters(), 1)):
            continue
        if "forward" in module.__dict__ and not is_ours(module.forward):
            continue
        if kind.__name__.endswith("RMSNorm") and epsilon(module):
            if [name for name, _ in module.named_parameters()] == ["weight"]:
                found[module] = Norm
        elif parts_of(module) is not None:
            found[module] = Gate
        elif calls_turn(kind.forward) and turns(turn_of(kind.forward)):
            found[module] = Rotation
    return found
