"""What a decoder does between its products, each in one pass over its numbers: RMS norms, gates and rotations, on CPU.

Operator by operator, an RMS norm and its backward read and write some twenty times what they are given, and keep
float32 copies of it; a SwiGLU gate and a rotary embedding do so more than ten times. Here, with
`r = 1 / sqrt(mean x^2 + eps)`,

    y = w x r,                  grad_x = r h - r^3 mean(h x) x,  h = w grad_y,
    y = silu(gate) up,          grad_up = silu(gate) grad_y,     grad_gate = silu'(gate) up grad_y,
    y = q cos + half(q) sin,    grad_q = grad_y cos + half^T(grad_y sin),  half(q1, q2) = (-q2, q1),

and of all that is as large as x, only x, gate and up are saved. (On GPUs this is what Liger is for; celora does not do
it there.)

Modules keep their class and their `forward`; hooks do everything:

- The pre-hook of a norm or an activation computes the result, or keeps the input, and lets the forward run on none of
  the tokens. The forward hook then puts the result in the place of what the forward returned.
- For an activation, and for the cosine and sine that an attention is given, what is put in place is a stand-in
  (`_Pending`). Multiplied as in the formulas it becomes the one pass; torch's functions, and whoever asks for an
  attribute, get the tensor that it stands for. (An attention's own `half(q)` is still computed, and not used.)

What a class computes is not known by its name but by trying it; what is none of these formulas is left alone.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from celora.kernels.operations import available
from celora.modeling.passes.base import Pass
from celora.modeling.passes.gate import Gate, is_silu, multiplies
from celora.modeling.passes.norm import Norm, epsilon
from celora.modeling.passes.rotation import Rotation, turn_of, turns


def known(model: nn.Module) -> dict[nn.Module, type[Pass]]:
    """The modules under `model` that can be hooked, each with its hooks; none where there are no compiled kernels."""
    found: dict[nn.Module, type[Pass]] = {}
    for module in model.modules() if available("rms_norm", torch.empty(1, device="cpu")) else ():
        kind = type(module)
        if any(p.device.type != "cpu" for p in itertools.islice(module.parameters(), 1)):
            continue
        if kind.__name__.endswith("RMSNorm") and epsilon(module):
            if [name for name, _ in module.named_parameters()] == ["weight"]:
                found[module] = Norm
        elif is_silu(getattr(module, "act_fn", None)) and multiplies(kind.forward):
            found[module] = Gate
        elif turns(kind.forward, turn_of(kind.forward)):
            found[module] = Rotation
    return found
