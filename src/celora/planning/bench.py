"""What a planner works with: a model, its batches, exact gradients, timed backwards."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from celora.machine.timing import synchronise
from celora.modeling.eight_bit import EightBitForward
from celora.modeling.graft import LayerGraft
from celora.modeling.hooks import is_ours
from celora.modeling.language_model import LanguageModel
from celora.modeling.model_graft import ModelGraft
from celora.modeling.switch import Mode, Switch
from celora.numerics.estimators import Estimator, Finding
from celora.planning.candidates import EXACT, make_candidate
from celora.planning.fidelity import Fidelity
from celora.planning.gradients import NotFinite, gradient
from celora.runtime.forwards import Forwards
from celora.settings.config import LayerConfig
from celora.settings.names import HEAD
from celora.weights.read import device_of, shape_of

_TURNS = 4  # how often whole backwards are timed; the first time does not count
Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
Progress = Callable[[str, float], None]
Kind = tuple[int, int, int, torch.dtype, torch.device]


@dataclass
class Layer:
    """What the planner finds out about one layer.

    Attributes:
        base: the frozen layer.
        candidates: the settings that it can have on this machine, each with an estimator; exact first.
        fused: whether it has a graft anyway, for its adapter.
        findings: errors of each candidate on the observed gradients. A candidate without a selection has none.
        tokens, dtype: number of tokens and dtype of its gradients.
        disturbance: the share of the tokens that is kept when the layer is disturbed.
        disturbed: the relative error of the disturbance.
        influence: the share of a squared relative error that arrives in the LoRA gradient.
        tuner: the PEFT layer around it, if a plan may compute its forward in 8 bits.
        forwards: how often its forward runs for one backward: twice if it is checkpointed.
        new_inputs: how many of these have another input than the forward before, which is then rounded anew for 8 bits.
        forward_ms: milliseconds of its own forwards for one backward, and of those in 8 bits; zeros if a plan leaves it
            alone.
        forward_error: the squared relative error of the LoRA gradient that its forward in 8 bits causes.
    """

    name: str
    base: nn.Module
    candidates: Mapping[LayerConfig, Estimator]
    fused: bool = False
    findings: dict[LayerConfig, list[Finding]] = field(default_factory=dict)
    tokens: int = 0
    dtype: torch.dtype = torch.float32
    disturbance: float = 1.0
    disturbed: float = 0.0
    influence: float = 1.0
    tuner: nn.Module | None = None
    forwards: float = 1.0
    new_inputs: float = 1.0
    forward_ms: tuple[float, float] = (0.0, 0.0)
    forward_error: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        return shape_of(self.base)

    @property
    def kind(self) -> Kind:
        """Layers of one kind take the same time. Numbers of tokens within a factor of 2 count as equal."""
        return (*self.shape, self.tokens.bit_length(), self.dtype, device_of(self.base))

    def error(self, setting: LayerConfig) -> float:
        """The root mean square of this candidate's relative errors."""
        return float(statistics.fmean(finding.error**2 for finding in self.findings[setting]) ** 0.5)

    def timed_as(self, setting: LayerConfig) -> list[tuple[LayerConfig, float]]:
        """Pairs (setting, weight). The weighted sum of their times is the time of this candidate."""
        kept = statistics.fmean(finding.kept for finding in self.findings[setting])
        pairs = self.candidates[setting].timed_as(kept)
        return [(dataclasses.replace(setting, **changes), weight) for changes, weight in pairs]

    def make(self, setting: LayerConfig) -> Estimator:
        """A new estimator with this setting."""
        return make_candidate(setting, self.shape, device_of(self.base))


class Bench:
    """A model with its batches. It gives gradients, exact or with given estimators in given layers."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batches: Sequence[Mapping[str, Any]],
        loss: Loss | None,
        rewind: Callable[[], None],
        progress: Progress,
    ) -> None:
        self.model, self.parameters, self.batches, self.loss = model, parameters, batches, loss
        self.rewind, self.progress = rewind, progress
        self.overhead_ms = 0.0  # the time that a graft adds to a layer
        self.forward: ModelGraft | None = None  # computes the loss, if its gradient may be estimated
        self.language_model: LanguageModel | None = None  # the model of that loss
        self.loss_shift = 0.0  # by how much the forwards of the latest audit changed the loss
        self._exact: dict[range, tuple[dict[str, Tensor], float]] = {}

    @property
    def measuring(self) -> int:
        """The batch to measure on: the second if there is one, because estimators select on the first."""
        return min(1, len(self.batches) - 1)

    @property
    def verifying(self) -> range:
        """The batches to verify on: from the third on, if there are so many. Planning uses the first two."""
        return range(min(2, len(self.batches) - 1), len(self.batches))

    def gradient(self, *numbers: int) -> tuple[dict[str, Tensor], float]:
        """The summed gradient of these batches and their mean loss, with the current grafts."""
        self.rewind()
        return gradient(self.model, [self.batches[i] for i in numbers], self.loss, self.parameters)

    def exact(self, numbers: range) -> tuple[dict[str, Tensor], float]:
        """The exact gradient and the loss of these batches, computed once."""
        if numbers not in self._exact:
            self._exact[numbers] = self.gradient(*numbers)
        return self._exact[numbers]

    def audit(
        self, layers: Mapping[str, Layer], settings: Mapping[str, LayerConfig], numbers: range | None = None
    ) -> Fidelity:
        """The fidelity with these settings in these layers. Everything else is exact.

        It is measured on the sum of `numbers` batches; by default on the batch to measure on.
        """
        estimated = {name: layers[name] for name in settings if name in layers}
        words = settings[HEAD].keep_ratio if HEAD in settings else None
        return self.fidelity(estimated, lambda layer: layer.make(settings[layer.name]), numbers, words=words)

    def fidelity(
        self,
        layers: Mapping[str, Layer],
        make: Callable[[Layer], Estimator],
        numbers: range | None = None,
        *,
        words: float | None = None,
    ) -> Fidelity:
        """The fidelity with the estimators of `make` in these layers, and a share of the words for the head's gradient.

        An estimator that is not ready selects on the first batch. A forward in 8 bits learns the scales of its input
        there. If it makes the loss infinite or NaN, the error is infinite.
        """
        numbers = numbers or range(self.measuring, self.measuring + 1)
        exact, loss = self.exact(numbers)
        try:
            estimated, shifted = self._estimated(layers, make, numbers, words)
        except NotFinite:
            self.loss_shift = 0.0
            return Fidelity(0.0, math.inf, math.inf)
        self.loss_shift = shifted - loss
        return Fidelity.of([(estimated[name], exact[name]) for name in exact])

    def _estimated(
        self, layers: Mapping[str, Layer], make: Callable[[Layer], Estimator], numbers: range, words: float | None
    ) -> tuple[dict[str, Tensor], float]:
        """The estimated gradient and the loss of these batches."""
        head: AbstractContextManager[None] = nullcontext()
        if self.forward is not None and words is not None:
            head = self.forward.through(words)
        with head, grafted_with(layers, make) as (grafts, forwards):
            waiting = [graft for name, graft in grafts.items() if name in forwards or not graft.estimator.ready]
            if waiting:
                for graft in waiting:
                    graft.mode = Mode.OBSERVE
                self.gradient(0)
                forwards.follow_inputs(None)
                for graft in waiting:
                    graft.estimator.select()
                    graft.mode = Mode.ESTIMATE if graft.estimator.ready else Mode.EXACT
            return self.gradient(*numbers)

    def time(self, layers: Mapping[str, Layer], settings: Mapping[str, LayerConfig]) -> float:
        """The time of all `grad_input` products inside whole backwards, relative to the dense products.

        The time of the grafts themselves counts, too; and that of the layers' forwards, if forwards are planned.
        """
        dense = dict.fromkeys(layers, EXACT)
        forwards_too = any(any(layer.forward_ms) for layer in layers.values())
        contenders = [
            {name: layer.make(chosen[name]) for name, layer in layers.items()}
            for chosen in (dense, {**dense, **settings})
        ]
        ratios = []
        for turn in range(_TURNS):
            seconds = []
            for estimators in contenders:
                make, forward = functools.partial(_named, estimators), _TimedForward if forwards_too else _in_8_bits
                with grafted_with(layers, make, kind=_TimedGraft, forward=forward) as (grafts, _):
                    for graft in grafts.values():
                        graft.mode = Mode.ESTIMATE if graft.estimator.ready else Mode.OBSERVE
                    self.gradient(self.measuring)
                    seconds.append(float(sum(graft.seconds for graft in grafts.values())))
                    for estimator in estimators.values():
                        estimator.select()
            if turn > 0:  # in the first turn, estimators make their copies
                overhead = sum(self.overhead_ms for name in settings if not layers[name].fused)
                ratios.append((seconds[1] + 1e-3 * overhead) / seconds[0])
        return float(statistics.median(ratios))


class _TimedGraft(LayerGraft):
    """A graft that adds up the time of its products."""

    seconds = 0.0

    def grad_input(self, grad_output: Tensor, weight: Tensor | None, mode: Mode) -> Tensor:
        synchronise(grad_output.device)
        start = time.perf_counter()
        result = super().grad_input(grad_output, weight, mode)
        synchronise(grad_output.device)
        self.seconds += time.perf_counter() - start
        return result


class _TimedForward(EightBitForward):
    """A forward, in 8 bits or the layer's own, whose time its timed graft adds up, too."""

    def __init__(self, graft: Any) -> None:
        super().__init__(graft)
        self.exact = graft.estimator.settings.forward == "exact"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        graft: Any = self.graft
        synchronise(graft.estimator.device)
        start = time.perf_counter()
        result = super().__call__(*args, **kwargs)
        synchronise(graft.estimator.device)
        graft.seconds += time.perf_counter() - start
        return result


def _in_8_bits(graft: LayerGraft) -> EightBitForward | None:
    return None if graft.estimator.settings.forward == "exact" else EightBitForward(graft)


@contextmanager
def grafted_with(
    layers: Mapping[str, Layer],
    make: Callable[[Layer], Estimator],
    *,
    kind: type[LayerGraft] = LayerGraft,
    forward: Callable[[LayerGraft], EightBitForward | None] = _in_8_bits,
) -> Iterator[tuple[dict[str, Any], Forwards]]:
    """For a while, graft the estimators of `make` onto `layers`. Yields the grafts, and the forwards in 8 bits."""
    switch, grafts, forwards = Switch(), dict[str, Any](), Forwards()
    with ExitStack() as undo:
        undo.callback(setattr, switch, "on", False)
        for name, layer in layers.items():
            grafts[name] = kind(make(layer), switch)
            grafts[name].mode = Mode.ESTIMATE
            if is_ours(attached := layer.base.__dict__.get("forward")):  # of an attachment that is off meanwhile
                del layer.base.__dict__["forward"]
                undo.callback(layer.base.__dict__.__setitem__, "forward", attached)
            undo.callback(grafts[name].under(layer.base).remove)
            if layer.tuner is not None and (own := forward(grafts[name])) is not None:
                forwards[name] = own
                own.between(layer.tuner, layer.base)
                undo.callback(own.leave, layer.base)
        yield grafts, forwards


def _named(estimators: Mapping[str, Estimator], layer: Layer) -> Estimator:
    return estimators[layer.name]
