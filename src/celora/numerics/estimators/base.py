"""What an estimator is: one layer's way to turn `grad_output` and the frozen weight into `grad_input`.

Its life: `estimate` on ordinary steps. On refresh steps the exact product is used, `observe` sees every
gradient of the step, and `select` turns what was seen into the choice that the next steps use. An estimator that
chooses anew on every call is `ready` from the start.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from celora.errors import CELoraError, unknown
from celora.numerics.products.registry import make_product

Selection = Literal["topk", "energy", "sampled"]
Factor = Literal["svd", "gradient"]
Precision = Literal["native", "int8", "fp8"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one layer is estimated. An estimator refuses what it has no use for.

    Attributes:
        keep_ratio: share of what is selected from that is kept, 0 < keep_ratio <= 1; with `selection="energy"`, the
            share of its squared norm.
        rank: of the frozen factor beside it, 0 for none.
        selection: `topk`, the highest scores; `energy`, as many of the highest as hold the share; `sampled`, drawn with
            probabilities in proportion to the scores and weighted, so that the estimate is unbiased.
        factor: from the weight (`svd`, the paper's) or from the gradients seen on refresh steps (`gradient`).
        precision: of the product: the gradient's own dtype (`native`), `int8` or `fp8`.
        weight_copy: keep an 8-bit copy of the weight (faster, one byte a number), or quantise it for each product.
        seed: of the randomised factorisation and of sampling.

    Raises:
        CELoraError: for a value out of range or an unknown name.
    """

    keep_ratio: float = 1.0
    rank: int = 0
    selection: Selection = "topk"
    factor: Factor = "svd"
    precision: Precision = "native"
    weight_copy: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep_ratio(self.keep_ratio)
        for name, allowed in (("selection", Selection), ("factor", Factor), ("precision", Precision)):
            if getattr(self, name) not in get_args(allowed):
                raise unknown(name, str(getattr(self, name)), get_args(allowed))


def check_keep_ratio(keep: object, name: str = "keep_ratio") -> None:
    """CELoraError unless `keep` is a number in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise CELoraError(f"{name}={keep!r}; expected 0 < {name} <= 1. Use 1.0 for the dense backward.")


class Estimator(ABC):
    """Estimates `grad_output @ weight` for one layer of shape (out_features, in_features).

    Keyword arguments are the fields of `Settings`.

    Raises:
        CELoraError: a setting out of range, or one that this estimator does not have.
    """

    name: ClassVar[str]
    uses: ClassVar[frozenset[str]] = frozenset({"seed"})  # the settings that mean something to it

    def __init__(self, out_features: int, in_features: int, **settings: Any) -> None:
        for name, value in settings.items():
            if name not in self.uses and value != getattr(Settings, name, value):
                raise CELoraError(
                    f"{name}={value!r} means nothing to the estimator {self.name!r}; leave it out, or choose another."
                )
        self.settings = Settings(**settings)
        most = min(out_features, in_features)
        if not 0 <= self.settings.rank <= most:
            raise CELoraError(
                f"rank={self.settings.rank} for a {out_features} x {in_features} weight; "
                f"expected 0 <= rank <= {most}. Use 0 for no frozen factor."
            )
        self.out_features = out_features
        self.in_features = in_features
        self.keep_ratio = self.settings.keep_ratio  # may move while training, under a controller
        self.agreed = False  # whether all processes that train together select the same
        self.device = torch.device("cpu")  # of the gradients that it will get
        self.product = make_product(self.settings.precision, copy=self.settings.weight_copy)

    @property
    @abstractmethod
    def cost(self) -> float:
        """Multiplications of `estimate` over those of the dense product, at most; 8-bit ones count half."""

    @property
    def ready(self) -> bool:
        """Whether `estimate` may be called; until then the layer runs its exact backward."""
        return True

    @property
    def traceable(self) -> bool:
        """Whether torch.compile can trace `estimate`; otherwise it is one opaque operator to it.

        An override must not ask `super()`: Dynamo gets the property itself there, which is always true.
        """
        return self.product.traceable

    def prepare(self, weight: Tensor) -> None:  # noqa: B027 - optional by design
        """Make what the weight alone decides, ahead of the first step; what is not made here, a refresh makes."""

    def needs_whole(self, weight: Tensor) -> bool:
        """Whether the next `estimate` needs all of a sharded weight, rather than gathering what it reads of it."""
        return not self.product.holds_copy

    @abstractmethod
    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """`(T, out) , (out, in) -> (T, in)`, all in the dtype of `grad_output`."""

    def observe(self, grad_output: Tensor, weight: Tensor, grad_input: Tensor) -> None:
        """Gather statistics from one exact backward pass of a refresh step: `grad_input = grad_output @ weight`."""
        self.product.recheck(weight)

    @property
    def pooled_size(self) -> int:
        """How many numbers `pooled` gives: the settings decide, so that all processes agree."""
        return 0

    def pooled(self) -> Tensor | None:
        """What was observed since the latest `select`, as numbers that processes can add up; None if nothing was."""
        return None

    def take_pooled(self, total: Tensor, weight: Tensor | None) -> None:  # noqa: B027 - optional by design
        """Take the sum over all processes for what was observed. `weight` is given where some observed nothing."""

    def select(self) -> None:  # noqa: B027 - optional by design
        """End a refresh: choose from what was observed, and forget it."""

    def clone(self) -> Estimator:
        """A new estimator with the same settings and nothing observed or selected."""
        new = type(self)(self.out_features, self.in_features, **dataclasses.asdict(self.settings))
        new.device = self.device
        return new

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on as if it had not stopped."""
        moved = self.keep_ratio != self.settings.keep_ratio
        return {"keep_ratio": torch.tensor(self.keep_ratio, dtype=torch.float64, device="cpu")} if moved else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state made by `state_dict`; raises CELoraError if it does not fit this layer."""
        self.keep_ratio = float(state.get("keep_ratio", self.settings.keep_ratio))

    def aim(self, relative_error: float, target: float) -> None:
        """Move `keep_ratio` so that the error, which was `relative_error`, comes nearer to `target`.

        What is dropped grows or shrinks with the error wanted over the error had: with its square where the share of
        the squared norm is what is chosen. At most to twice (four times) or half (a quarter) at once.
        """
        if "keep_ratio" not in self.uses or math.isnan(relative_error):
            return
        energy = self.settings.selection == "energy"
        ratio = target / relative_error if relative_error > 0 else math.inf
        change = min(2.0, max(0.5, ratio)) ** (2 if energy else 1)
        least = 1e-6 if energy else 1e-2
        self.keep_ratio = 1 - min(1 - least, max(least, (1 - self.keep_ratio) * change))
