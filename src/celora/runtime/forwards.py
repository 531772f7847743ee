"""The 8-bit forwards of one model: what each was measured to lose, and which went back to their layer's own forward."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from celora.machine.processes import in_company, largest_of_all
from celora.modeling.eight_bit import MOST_ERROR, EightBitForward

_ERROR, _EXACT = "forward_error", "forward_exact"
_STEPS = 10**6  # errors are told to other processes in millionths


class Forwards(dict[str, EightBitForward]):
    """Layer -> its forward in 8 bits.

    Attributes:
        errors: of each layer's output, relative, as measured at its latest refresh.
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, float] = {}

    @property
    def made_exact(self) -> set[str]:
        """The layers that lost too much and compute their own forward from then on."""
        return {name for name, forward in self.items() if forward.exact}

    def end_refresh(self, step: int, device: torch.device) -> None:
        """Take what was measured since the latest call. A layer that lost `MOST_ERROR` or more is exact from now on.

        Where several processes train together all of them call it at the same steps, and decide by the largest error
        that one has seen: one reduction.
        """
        seen = [forward.graft.of_forward.take_error() for forward in self.values()]
        if in_company():
            told = [[-1 if error is None else min(round(error * _STEPS), 10**9)] for error in seen]
            seen = [None if most < 0 else most / _STEPS for (most,) in largest_of_all(told, device)]
        found = {name: error for name, error in zip(self, seen, strict=True) if error is not None}
        self.errors |= found
        lossy = [name for name, error in found.items() if error >= MOST_ERROR and not self[name].exact]
        for name in lossy:
            self[name].exact = True
        if lossy:
            worst = max(lossy, key=lambda name: found[name])
            names = ", ".join(sorted(lossy))
            warnings.warn(
                f"celora: from step {step} on, the forward of {names} is exact: in 8 bits the output of {worst} was "
                f"off by {found[worst]:.0%}, and less than {MOST_ERROR:.0%} is accepted.",
                stacklevel=2,
            )

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """What a checkpoint keeps of one layer."""
        if name not in self:
            return {}
        state = {_EXACT: torch.tensor(self[name].exact)}
        if name in self.errors:
            state[_ERROR] = torch.tensor(self.errors[name], dtype=torch.float64, device="cpu")
        return state

    def load_state_dict(self, name: str, state: dict[str, Tensor]) -> None:
        """Take one layer's part out of a checkpoint's state."""
        exact, error = state.pop(_EXACT, None), state.pop(_ERROR, None)
        if name not in self:
            return
        self[name].exact = exact is not None and bool(exact)
        self[name].graft.of_forward.take_error()
        self.errors.pop(name, None)
        if error is not None:
            self.errors[name] = float(error)
