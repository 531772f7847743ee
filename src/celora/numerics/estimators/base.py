"""The interface of an estimator: it turns `grad_output` and the frozen weight of one layer into `grad_input`.

In ordinary training steps, `estimate` computes the backward. In refresh steps the backward is exact. There `observe`
sees every gradient, and `select` makes the selection for the next steps from them. An estimator that selects in every
call is `ready` from the start.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from celora.errors import CELoraError, unknown
from celora.numerics.products.registry import make_product

Selection = Literal["topk", "energy", "sampled"]
Factor = Literal["svd", "gradient"]
Precision = Literal["native", "int8", "fp8"]
Forward = Literal["exact", "int8"]
SavedInput = Literal["forward", "native", "int8"]  # of an adapter, so no estimator has this setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one layer is estimated. An estimator refuses a setting that means nothing to it.

    Attributes:
        keep_ratio: share of the columns (or tokens) that is kept, 0 < keep_ratio <= 1; with `selection="energy"`, the
            share of their squared norm.
        rank: rank of the frozen factor that is added; 0 for none.
        selection: `topk` keeps the highest scores; `energy` keeps the fewest that have the share; `sampled` draws with
            probabilities in proportion to the scores, and weights the draw, so that the estimate is unbiased.
        factor: computed from the weight (`svd`, the paper's) or from the gradients of refresh steps (`gradient`).
        precision: precision of the product: the gradient's own dtype (`native`), `int8` or `fp8`.
        weight_copy: keep an 8-bit copy of the weight (faster, one byte a number), or quantise it for each product.
        forward: the layer itself computes `x W^T` (`exact`), or backward's 8-bit copy of the weight does (`int8`).
        seed: seed of the randomised factorisation and of sampling.

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
        name: its name in configurations.
        uses: the settings that it uses.
        selections: the values of `selection` that the class implements; `make_estimator` finds the class for others.
        keep_ratio: the share that is kept; `target_error` changes it while training.
        agreed: whether all processes that train together select the same.
        device: the device of its gradients.

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
        if self.settings.forward != "exact" and not self.multiplies_forwards:
            raise CELoraError(
                f"forward={self.settings.forward!r} beside precision={self.settings.precision!r} and "
                f"weight_copy={self.settings.weight_copy}; both directions multiply with one 8-bit copy: use "
                "precision='int8' with weight_copy=True, or forward='exact'."
            )
        self.product = make_product(
            self.settings.precision, copy=self.settings.weight_copy, forward=self.settings.forward
        )

    @property
    def multiplies_forwards(self) -> bool:
        """Whether the forward may multiply with the same 8-bit copy of the weight."""
        return "forward" in self.uses and (self.settings.precision, self.settings.weight_copy) == ("int8", True)

    @property
    @abstractmethod
    def cost(self) -> float:
        """Multiplications of `estimate`, relative to the dense product, at most. 8-bit multiplications count half."""

    @property
    def ready(self) -> bool:
        """Whether `estimate` may be called. Until then the layer's backward is exact."""
        return True

    @property
    def traceable(self) -> bool:
        """Whether torch.compile may trace `estimate`. If not, it is one opaque operator, which is always right.

        Traced tensors must change in place, because compiled graphs hold on to them. An override must not ask
        `super()`: Dynamo gets the property itself there, which is always true.
        """
        return False

    def unavailable(self) -> str:
        """Why it cannot estimate this layer on its device; '' if it can. If not, the layer stays exact."""
        return self.product.unavailable(self.out_features, self.in_features, self.device)

    def prepare(self, weight: Tensor) -> None:  # noqa: B027 - optional by design
        """Compute what depends on the weight alone, before the first step. If it is not called, a refresh does so."""

    def needs_whole(self, weight: Tensor) -> bool:
        """Whether the next `estimate` needs a whole sharded weight. If not, it gathers only the rows it reads."""
        return not self.product.holds_copy

    @abstractmethod
    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """`(T, out) , (out, in) -> (T, in)`, all in the dtype of `grad_output`."""

    def observe(self, grad_output: Tensor, weight: Tensor, grad_input: Tensor) -> None:
        """Collect statistics from one exact backward of a refresh step: `grad_input = grad_output @ weight`."""
        self.product.recheck(weight)

    def select(self) -> None:  # noqa: B027 - optional by design
        """End a refresh: select by what was observed, and forget the observations."""

    # For processes that train together, at a refresh.

    @property
    def pooled_size(self) -> int:
        """How many numbers `pooled` returns. Only the settings decide it, so that all processes agree."""
        return 0

    def pooled(self) -> Tensor | None:
        """The observations since the latest `select`, as numbers that processes can add up; None if there are none."""
        return None

    def take_pooled(self, total: Tensor, weight: Tensor | None) -> None:  # noqa: B027 - optional by design
        """Replace the observations by the sum over all processes. `weight`: given if a process observed nothing."""

    # For checkpoints.

    def clone(self) -> Estimator:
        """A new estimator with the same settings and nothing observed or selected."""
        new = type(self)(self.out_features, self.in_features, **dataclasses.asdict(self.settings))
        new.device = self.device
        return new

    def state_dict(self) -> dict[str, Tensor]:
        """The state that a resumed run needs to continue exactly."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - optional by design
        """Restore a state from `state_dict`. Raises CELoraError if it does not fit this layer."""

    def memory(self, dtype: torch.dtype) -> int:
        """Bytes that it stores in addition to a weight in `dtype`: an 8-bit copy, factors."""
        copies = self.settings.precision != "native" and self.settings.weight_copy
        return self.out_features * self.in_features if copies else 0
