"""What an estimator is: one layer's way to turn `grad_output` and the frozen weight into `grad_input`.

In training, `estimate` serves ordinary steps. On refresh steps the backward is exact: `observe` sees every gradient of
the step, and `select` turns what was seen into the choice that the next steps use. An estimator that chooses anew in
every call is `ready` from the start.

To a planner an estimator answers four questions: which settings to consider (`candidates`), what one of them loses of a
gradient (`judge`), what has to be timed for it (`timed_as`), and how much memory it takes (`memory`).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from celora.errors import CELoraError, unknown
from celora.numerics.estimators.observed import Finding, Observed
from celora.numerics.products.registry import make_product

Selection = Literal["topk", "energy", "sampled"]
Factor = Literal["svd", "gradient"]
Precision = Literal["native", "int8", "fp8"]
Forward = Literal["exact", "int8"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one layer is estimated. An estimator refuses a setting that means nothing to it.

    Attributes:
        keep_ratio: share of the columns (or tokens) that is kept, 0 < keep_ratio <= 1; with `selection="energy"`, the
            share of their squared norm.
        rank: of the frozen factor beside what is kept, 0 for none.
        selection: `topk`, the highest scores; `energy`, as many of the highest as hold the share; `sampled`, drawn with
            probabilities in proportion to the scores and weighted, so that the estimate is unbiased.
        factor: from the weight (`svd`, the paper's) or from the gradients seen on refresh steps (`gradient`).
        precision: of the product: the gradient's own dtype (`native`), `int8` or `fp8`.
        weight_copy: keep an 8-bit copy of the weight (faster, one byte a number), or quantise it for each product.
        forward: `x W^T` by the layer itself (`exact`), or in 8 bits (`int8`) from backward's own copy of the weight.
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
    forward: Forward = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep_ratio(self.keep_ratio)
        choices = ("selection", Selection), ("factor", Factor), ("precision", Precision), ("forward", Forward)
        for name, allowed in choices:
            if getattr(self, name) not in get_args(allowed):
                raise unknown(name, str(getattr(self, name)), get_args(allowed))


def check_keep_ratio(keep: object, name: str = "keep_ratio") -> None:
    """CELoraError unless `keep` is a number in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise CELoraError(f"{name}={keep!r}; expected 0 < {name} <= 1. Use 1.0 for the dense backward.")


class Estimator(ABC):
    """Estimates `grad_output @ weight` for one layer of shape (out_features, in_features).

    A subclass has a `name` and implements `cost` and `estimate`; everything else has a default. `register_estimator`
    makes it known.

    Keyword arguments are the fields of `Settings`.

    Attributes:
        name: what configurations and plans call it.
        uses: the settings that mean something to it.
        selections: the values of `selection` that the class knows; `make_estimator` finds the class for the others.
        keep_ratio: the share that is kept; `target_error` moves it while training.
        agreed: whether all processes that train together select the same.
        device: of the gradients that it will get.

    Raises:
        CELoraError: a setting out of range, or one that this estimator does not have.
    """

    name: ClassVar[str]
    uses: ClassVar[frozenset[str]] = frozenset({"seed"})
    selections: ClassVar[tuple[Selection, ...]] = ("topk",)

    def __init__(self, out_features: int, in_features: int, **settings: Any) -> None:
        for name, value in settings.items():
            if name not in self.uses and value != getattr(Settings, name, value):
                raise CELoraError(
                    f"{name}={value!r} means nothing to the estimator {self.name!r}; leave it out, or choose another."
                )
        self.settings = Settings(**settings)
        if self.settings.selection not in self.selections:
            raise CELoraError(
                f"{type(self).__name__} has no selection={self.settings.selection!r}; make_estimator finds the class."
            )
        most = min(out_features, in_features)
        if not 0 <= self.settings.rank <= most:
            raise CELoraError(
                f"rank={self.settings.rank} for a {out_features} x {in_features} weight; "
                f"expected 0 <= rank <= {most}. Use 0 for no frozen factor."
            )
        self.out_features = out_features
        self.in_features = in_features
        self.keep_ratio = self.settings.keep_ratio
        self.agreed = False
        self.device = torch.device("cpu")
        if self.settings.forward != "exact" and (self.settings.precision, self.settings.weight_copy) != ("int8", True):
            raise CELoraError(
                f"forward={self.settings.forward!r} beside precision={self.settings.precision!r} and "
                f"weight_copy={self.settings.weight_copy}; both directions multiply with one 8-bit copy: use "
                "precision='int8' with weight_copy=True, or forward='exact'."
            )
        self.product = make_product(
            self.settings.precision, copy=self.settings.weight_copy, forward=self.settings.forward
        )

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
        """Whether torch.compile may trace `estimate`. If not, it is one opaque operator, which is always right.

        Traced tensors must change in place, because compiled graphs hold on to them. An override must not ask
        `super()`: Dynamo gets the property itself there, which is always true.
        """
        return False

    def unavailable(self) -> str:
        """Why this layer cannot be estimated so on its device, or ''. It then stays exact, and the report says why."""
        return self.product.unavailable(self.out_features, self.in_features, self.device)

    def prepare(self, weight: Tensor) -> None:  # noqa: B027 - optional by design
        """Make what the weight alone decides, before the first step. A refresh makes what is still missing."""

    def needs_whole(self, weight: Tensor) -> bool:
        """Whether the next `estimate` needs all of a sharded weight; if not, it gathers only the rows it reads."""
        return not self.product.holds_copy

    @abstractmethod
    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """`(T, out) , (out, in) -> (T, in)`, all in the dtype of `grad_output`."""

    def observe(self, grad_output: Tensor, weight: Tensor, grad_input: Tensor) -> None:
        """Gather statistics from one exact backward pass of a refresh step: `grad_input = grad_output @ weight`."""
        self.product.recheck(weight)

    def select(self) -> None:  # noqa: B027 - optional by design
        """End a refresh: choose from what was observed, and forget it."""

    # What processes that train together tell each other at a refresh.

    @property
    def pooled_size(self) -> int:
        """How many numbers `pooled` gives: the settings decide, so that all processes agree."""
        return 0

    def pooled(self) -> Tensor | None:
        """What was observed since the latest `select`, as numbers that processes can add up; None if nothing was."""
        return None

    def take_pooled(self, total: Tensor, weight: Tensor | None) -> None:  # noqa: B027 - optional by design
        """Replace what was observed by the sum over all processes. `weight` is given where some observed nothing."""

    # What a checkpoint keeps.

    def clone(self) -> Estimator:
        """A new estimator with the same settings and nothing observed or selected."""
        new = type(self)(self.out_features, self.in_features, **dataclasses.asdict(self.settings))
        new.device = self.device
        return new

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on as if it had not stopped."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - optional by design
        """Take over a state made by `state_dict`; raises CELoraError if it does not fit this layer."""

    # What a planner asks.

    @classmethod
    def candidates(cls, out_features: int, in_features: int, device: torch.device) -> Iterable[Mapping[str, Any]]:
        """The settings that a plan considers for a layer of this shape on this device. By default it is never planned.

        The planner leaves out what is `unavailable`, or whose product cannot pay there.
        """
        return ()

    def judge(self, observed: Observed) -> Finding:
        """What `estimate` loses of an observed gradient; its product's rounding counts. Called once it is `ready`."""
        return Finding(observed.relative_error(self.estimate(observed.grad_output, observed.weight)))

    def timed_as(self, kept: float) -> list[tuple[Mapping[str, Any], float]]:
        """How its time follows from what is timed: pairs of changed settings and weights, `time = sum weight * time_i`.

        `kept` is the mean over its findings. By default the estimate itself is timed, with these very settings.
        """
        return [({}, 1.0)]

    def memory(self, dtype: torch.dtype) -> int:
        """Bytes that it keeps beside a weight in `dtype`: an 8-bit copy, factors."""
        copies = self.settings.precision != "native" and self.settings.weight_copy
        return self.out_features * self.in_features if copies else 0
