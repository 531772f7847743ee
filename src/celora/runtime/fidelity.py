"""How near an estimated gradient is to the exact one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from celora.errors import CELoraError
from celora.machine.device import in_float64


@dataclass(frozen=True)
class Fidelity:
    """How near an estimated gradient g is to the exact one e.

    Attributes:
        cosine: `<g, e> / (||g|| ||e||)`.
        relative_error: `||g - e|| / ||e||`.
        norm_ratio: `||g|| / ||e||`.
    """

    cosine: float
    relative_error: float
    norm_ratio: float

    @classmethod
    def of(cls, pairs: list[tuple[Tensor, Tensor]]) -> Fidelity:
        """The fidelity of the concatenation of all (estimated, exact) pairs, summed in float64."""
        sums = torch.zeros(4, dtype=torch.float64, device="cpu")
        for estimate, true in ((in_float64(g), in_float64(e)) for g, e in pairs):
            terms = (estimate * true, (estimate - true).square(), estimate.square(), true.square())
            sums += torch.stack([term.sum() for term in terms]).cpu()  # a model may be on several devices
        dot, error, estimated, exact = sums.tolist()
        if not math.isfinite(exact):
            raise CELoraError(
                "the exact gradient of this batch is not finite, so there is nothing to compare with; give another "
                "batch, or compute in bfloat16 or float32."
            )
        if not math.isfinite(error):
            return cls(0.0, math.inf, math.inf)
        if exact == 0 or estimated == 0:
            same = exact == estimated
            return cls(float(same), 0.0 if same else (math.inf if exact == 0 else 1.0), float(same))
        return cls(dot / math.sqrt(estimated * exact), math.sqrt(error / exact), math.sqrt(estimated / exact))


@dataclass(frozen=True)
class FromFloat32:
    """How near gradients are to the float32 gradient of the same weights; all without dropout.

    Attributes:
        plain: the fidelity of PEFT's own gradient, without celora.
        attached: the fidelity of the gradient with the attached celora.
    """

    plain: Fidelity
    attached: Fidelity
