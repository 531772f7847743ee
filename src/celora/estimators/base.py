"""What an estimator is: one layer's way to turn `grad_output` and the frozen weight into `grad_input`.

Its life: `estimate` on ordinary steps. On refresh steps the exact product is used, `observe` sees every
gradient of the step, and `select` turns what was seen into the choice that the next steps use. An estimator that
chooses anew on every call is `ready` from the start and ignores the last two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Estimator(ABC):
    """Estimates `grad_output @ weight` for one layer of shape (out_features, in_features)."""

    name: ClassVar[str]

    def __init__(self, out_features: int, in_features: int) -> None:
        self.out_features = out_features
        self.in_features = in_features

    @property
    @abstractmethod
    def cost(self) -> float:
        """FLOPs of `estimate` over those of the dense product."""

    @property
    def ready(self) -> bool:
        """Whether `estimate` may be called; until then the layer runs its exact backward."""
        return True

    @abstractmethod
    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """`(T, out) , (out, in) -> (T, in)`, all in the dtype of `grad_output`."""

    def observe(self, grad_output: Tensor, weight: Tensor) -> None:  # noqa: B027 - optional by design
        """Gather statistics from one exact backward pass of a refresh step."""

    def select(self) -> None:  # noqa: B027 - optional by design
        """End a refresh: choose from what was observed, and forget it."""

    def clone(self) -> Estimator:
        """A new estimator with the same settings and nothing observed or selected."""
        return type(self)(self.out_features, self.in_features)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on as if it had not stopped."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - optional by design
        """Take over a state made by `state_dict`; raises CELoraError if it does not fit this layer."""
