"""The measured error of an estimate, summed over a refresh step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from celora.numerics.select import measurable


class Measured:
    """Sums of the squared error of an estimate and of the squared norm of the exact product, until `take_error`."""

    def __init__(self) -> None:
        self.squared_error: Tensor | None = None
        self.squared_norm: Tensor | None = None

    def measure(self, estimate: Tensor, exact: Tensor) -> None:
        """Add the tokens of one backward: (T, n) each."""
        error = norm = torch.zeros((), device=exact.device)
        # In blocks of rows, so that a refresh step needs no more memory than other steps.
        for e, x in zip(estimate.split(1024), exact.split(1024), strict=True):
            x = x.float()
            norm = norm + x.square().sum()
            error = error + (e.float() - x).square().sum()
        # If the exact gradient overflowed, nothing is known. If only the estimate did, its error is infinite.
        told = measurable(norm)
        error, norm = torch.where(told, error.nan_to_num(math.inf), 0), torch.where(told, norm, 0)
        if self.squared_error is None or self.squared_norm is None:
            self.squared_error, self.squared_norm = error, norm
        else:
            self.squared_error += error
            self.squared_norm += norm

    def take_error(self) -> float | None:
        """The relative error since the latest call, None if nothing was measured. It may wait for an accelerator."""
        error, norm, self.squared_error, self.squared_norm = self.squared_error, self.squared_norm, None, None
        if error is None or norm is None:
            return None
        relative = torch.where(norm > 0, (error / norm).sqrt(), math.nan).item()
        return None if math.isnan(relative) else relative
