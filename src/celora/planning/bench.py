"""The workbench of a planner: a model, its batches, exact gradients, timed backward passes."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from celora.machine.timing import synchronise
from celora.modeling.graft import LayerGraft
from celora.modeling.language_model import LanguageModel
from celora.modeling.model_graft import ModelGraft
from celora.modeling.switch import Mode, Switch
from celora.numerics.estimators import Estimator, Finding
from celora.planning.candidates import EXACT, make_candidate
from celora.planning.fidelity import Fidelity
from celora.planning.gradients import gradient
from celora.settings.config import LayerConfig
from celora.settings.names import HEAD
from celora.weights.read import device_of, shape_of

_TURNS = 4  # of timing whole backward passes; the first does not count
Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
Progress = Callable[[str, float], None]
Kind = tuple[int, int, int, torch.dtype, torch.device]


@dataclass
class Layer:
    """What is found out about one layer.

    Attributes:
        base: the frozen layer.
        candidates: the settings that can be computed for it here, each with an estimator; exact first.
        fused: it has a graft anyway, for its adapter.
        findings: what each candidate that could select did to the observed gradients.
        tokens, dtype: of its gradients.
        disturbance: the share of the tokens that is kept when the layer is disturbed.
        disturbed: the relative error of that.
        influence: how much of a squared relative error arrives in the LoRA gradient.
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

    @property
    def shape(self) -> tuple[int, int]:
        return shape_of(self.base)

    @property
    def kind(self) -> Kind:
        """Layers of one kind take the same time; so do, nearly, those with less than twice as many tokens."""
        return (*self.shape, self.tokens.bit_length(), self.dtype, device_of(self.base))

    def error(self, setting: LayerConfig) -> float:
        """The root mean square of the relative errors found for this candidate."""
        return float(statistics.fmean(finding.error**2 for finding in self.findings[setting]) ** 0.5)

    def timed_as(self, setting: LayerConfig) -> list[tuple[LayerConfig, float]]:
        """The settings whose times, with these weights, add up to the time of this candidate."""
        kept = statistics.fmean(finding.kept for finding in self.findings[setting])
        pairs = self.candidates[setting].timed_as(kept)
        return [(dataclasses.replace(setting, **changes), weight) for changes, weight in pairs]

    def make(self, setting: LayerConfig) -> Estimator:
        """A new estimator with this setting."""
        return make_candidate(setting, self.shape, device_of(self.base))


class Bench:
    """The model on the bench: its gradients, exact or with given estimators under given layers."""

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
        self.overhead_ms = 0.0  # that a graft adds to any layer
        self.forward: ModelGraft | None = None  # what computes the loss, if its gradient may be estimated
        self.language_model: LanguageModel | None = None  # whose loss that is
        self._exact: dict[range, dict[str, Tensor]] = {}

    @property
    def measuring(self) -> int:
        """The batch to measure on: the second if there is one, because the first is selected on."""
        return min(1, len(self.batches) - 1)

    @property
    def verifying(self) -> range:
        """The batches to verify on: from the third, if there are so many, because the first two are used otherwise."""
        return range(min(2, len(self.batches) - 1), len(self.batches))

    def gradient(self, *numbers: int) -> dict[str, Tensor]:
        """The gradient of these batches, summed, with the grafts of this moment."""
        self.rewind()
        return gradient(self.model, [self.batches[i] for i in numbers], self.loss, self.parameters)[0]

    def exact(self, numbers: range) -> dict[str, Tensor]:
        """The exact gradient of these batches, computed once."""
        if numbers not in self._exact:
            self._exact[numbers] = self.gradient(*numbers)
        return self._exact[numbers]

    def audit(
        self, layers: Mapping[str, Layer], settings: Mapping[str, LayerConfig], numbers: range | None = None
    ) -> Fidelity:
        """The fidelity with these settings under these layers and everything else exact.

        It is measured on the sum of these batches; by default on the batch to measure on.
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
        """The fidelity with what `make` makes under these layers, and the head's gradient through a share of the words.

        An estimator that is not ready selects on the first batch.
        """
        numbers = numbers or range(self.measuring, self.measuring + 1)
        exact = self.exact(numbers)
        head: AbstractContextManager[None] = nullcontext()
        if self.forward is not None and words is not None:
            head = self.forward.through(words)
        with head, grafted_with(layers, make) as grafts:
            waiting = [graft for graft in grafts.values() if not graft.estimator.ready]
            if waiting:
                for graft in waiting:
                    graft.mode = Mode.OBSERVE
                self.gradient(0)
                for graft in waiting:
                    graft.estimator.select()
                    graft.mode = Mode.ESTIMATE if graft.estimator.ready else Mode.EXACT
            estimated = self.gradient(*numbers)
        return Fidelity.of([(estimated[name], exact[name]) for name in exact])

    def time(self, layers: Mapping[str, Layer], settings: Mapping[str, LayerConfig]) -> float:
        """The time of all `grad_input` products inside whole backward passes, over that of the dense products.

        The time that grafts themselves take counts.
        """
        dense = dict.fromkeys(layers, EXACT)
        contenders = [
            {name: layer.make(chosen[name]) for name, layer in layers.items()}
            for chosen in (dense, {**dense, **settings})
        ]
        ratios = []
        for turn in range(_TURNS):
            seconds = []
            for estimators in contenders:
                with grafted_with(layers, functools.partial(_named, estimators), kind=_TimedGraft) as grafts:
                    for graft in grafts.values():
                        graft.mode = Mode.ESTIMATE if graft.estimator.ready else Mode.OBSERVE
                    self.gradient(self.measuring)
                    seconds.append(float(sum(graft.seconds for graft in grafts.values())))
                    for estimator in estimators.values():
                        estimator.select()
            if turn > 0:  # in the first, estimators make the copies that they keep
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


@contextmanager
def grafted_with(
    layers: Mapping[str, Layer], make: Callable[[Layer], Estimator], *, kind: type[LayerGraft] = LayerGraft
) -> Iterator[dict[str, Any]]:
    """Graft what `make` makes under `layers` for a while, estimating."""
    switch, grafts, handles = Switch(), {}, []
    try:
        for name, layer in layers.items():
            grafts[name] = kind(make(layer), switch)
            grafts[name].mode = Mode.ESTIMATE
            handles.append(grafts[name].under(layer.base))
        yield grafts
    finally:
        switch.on = False
        for handle in handles:
            handle.remove()


def _named(estimators: Mapping[str, Estimator], layer: Layer) -> Estimator:
    return estimators[layer.name]
