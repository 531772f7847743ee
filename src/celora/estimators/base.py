"""What an estimator is: one layer's way to turn `grad_output` and the frozen weight into `grad_input`.

Its life: `estimate` on ordinary steps. On refresh steps the exact product is used, `observe` sees every
gradient of the step, and `select` turns what was seen into the choice that the next steps use. An estimator that
chooses anew on every call is `ready` from the start and ignores the last two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from celora.errors import CELoraError


class Estimator(ABC):
    """Estimates `grad_output @ weight` for one layer of shape (out_features, in_features).

    Args:
        keep_ratio: share of what the estimator selects from that is kept, 0 < keep_ratio <= 1; 1 is the dense product.
        rank: of the frozen factor beside it, 0 for none.
        seed: of the randomised factorisation.

    Raises:
        CELoraError: a keep_ratio or rank out of range.
    """

    name: ClassVar[str]

    def __init__(
        self, out_features: int, in_features: int, *, keep_ratio: float = 1.0, rank: int = 0, seed: int = 0
    ) -> None:
        most = min(out_features, in_features)
        if not 0 < keep_ratio <= 1:
            raise CELoraError(f"keep_ratio={keep_ratio}; expected 0 < keep_ratio <= 1. Use 1.0 for the dense backward.")
        if not 0 <= rank <= most:
            raise CELoraError(
                f"rank={rank} for a {out_features} x {in_features} weight; "
                f"expected 0 <= rank <= {most}. Use 0 for no frozen factor."
            )
        self.out_features = out_features
        self.in_features = in_features
        self.keep_ratio = keep_ratio
        self.rank = rank
        self.seed = seed

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
        return type(self)(
            self.out_features, self.in_features, keep_ratio=self.keep_ratio, rank=self.rank, seed=self.seed
        )

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on as if it had not stopped."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - optional by design
        """Take over a state made by `state_dict`; raises CELoraError if it does not fit this layer."""
