"""Observes exact backwards: the gradients of every layer, and each candidate's error on them."""

from __future__ import annotations

import functools

from torch import Tensor

from celora.machine.memory import saved_for_backward
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


def observe(bench: Bench, layers: list[Layer]) -> int:
    """Collect gradients and findings. Returns the bytes that one forward saves for backward."""
    by_name = {layer.name: layer for layer in layers}
    for number in range(bench.measuring + 1):
        make = functools.partial(_Observer, measure=number == bench.measuring)
        with grafted_with(by_name, make) as (grafts, _), saved_for_backward(bench.model) as saved:
            for graft in grafts.values():
                graft.mode = Mode.OBSERVE
            bench.gradient(number)
    return saved.nbytes
