"""Observes exact backwards: every layer's gradients, each candidate's error on them, and how often forwards run."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch import Tensor

from celora.machine.memory import saved_for_backward
from celora.modeling.eight_bit import EightBitForward
from celora.modeling.switch import Mode
from celora.numerics.estimators import Dense, Observed
from celora.planning.bench import Bench, Layer, grafted_with

_DISTURBANCE = 0.88  # the share of the squared norm that disturbed layers keep


class _Observer(Dense):
    """Computes exactly, and lets every candidate of its layer judge the gradient."""

    def __init__(self, layer: Layer, *, measure: bool) -> None:
        super().__init__(*layer.shape)
        self.layer, self.measure = layer, measure

    @property
    def ready(self) -> bool:
        return False

    def observe(self, grad_output: Tensor, weight: Tensor, grad_input: Tensor) -> None:
        layer, observed = self.layer, Observed(grad_output, weight, grad_input)
        layer.tokens, layer.dtype = len(grad_output), grad_output.dtype
        for setting, estimator in layer.candidates.items():
            if not estimator.ready:  # it selects on the first batch, and is judged on the next
                estimator.observe(grad_output, weight, grad_input)
                estimator.select()
            if self.measure and estimator.ready:
                layer.findings.setdefault(setting, []).append(estimator.judge(observed))
                estimator.product.forget()  # copies for all candidates of all layers would not fit into memory
        if self.measure:
            kept = observed.needed(_DISTURBANCE)
            layer.disturbance, layer.disturbed = kept / len(grad_output), observed.lost(kept)


class _CountedForward(EightBitForward):
    """The layer's own forward. It counts its calls, and those with another input than the call of any layer before."""

    def __init__(self, graft: Any, latest: list[weakref.ref[Any]]) -> None:
        super().__init__(graft)
        self.exact = True
        self.latest, self.calls, self.new_inputs = latest, 0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.new_inputs += not any(known() is args[0] for known in self.latest)
        self.latest[:] = [weakref.ref(args[0])]
        return super().__call__(*args, **kwargs)


def observe(bench: Bench, layers: list[Layer]) -> int:
    """Collect gradients and findings. Returns the bytes that one forward saves for backward.

    If forwards are planned, also count how often each runs for one backward: twice if it is checkpointed.
    """
    by_name = {layer.name: layer for layer in layers}
    for number in range(bench.measuring + 1):
        make = functools.partial(_Observer, measure=number == bench.measuring)
        counted = functools.partial(_CountedForward, latest=[])
        with (
            grafted_with(by_name, make, forward=counted) as (grafts, forwards),
            saved_for_backward(bench.model) as saved,
        ):
            for graft in grafts.values():
                graft.mode = Mode.OBSERVE
            bench.gradient(number)
        for name, forward in forwards.items():
            backwards = max(1, grafts[name].observed)
            assert isinstance(forward, _CountedForward)
            by_name[name].forwards = forward.calls / backwards
            by_name[name].new_inputs = forward.new_inputs / backwards
    return saved.nbytes
