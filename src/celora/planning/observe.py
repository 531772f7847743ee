"""Observe one backward pass: the gradients of every layer, and the errors of candidates on them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from celora.kernels.operations import squared_row_norms
from celora.machine.device import in_float64
from celora.machine.memory import saved_for_backward
from celora.modeling.switch import Mode
from celora.numerics.estimators import Dense, Estimator
from celora.numerics.select import energy_count, rounded_up
from celora.planning.bench import Bench, Layer, candidate_estimator, grafted_with
from celora.planning.candidates import SHARES, tokens_setting
from celora.settings.config import LayerConfig

_DISTURBANCE = 0.88  # the share of the squared norm that disturbed layers keep


class _Observer(Dense):
    """Sees a layer's gradients and measures on them what every candidate would have got wrong."""

    def __init__(self, layer: Layer, *, measure: bool) -> None:
        super().__init__(*layer.shape)
        self.layer, self.measure = layer, measure

    @property
    def ready(self) -> bool:
        return False

    def observe(self, grad_output: Tensor, weight: Tensor, grad_input: Tensor) -> None:
        layer = self.layer
        layer.tokens, layer.dtype = len(grad_output), grad_output.dtype
        for setting in self.layer.candidates:
            if setting.estimator == "columns" and setting.precision == "native":  # 8 bits add their own error to it
                estimator = layer.columns.setdefault(setting, candidate_estimator(layer, setting))
                if not estimator.ready:  # on the first batch: the next is judged with an earlier one's selection
                    estimator.observe(grad_output, weight, grad_input)
                    estimator.select()
                if self.measure and estimator.ready:
                    self._add(setting, estimator.estimate(grad_output, weight), grad_input)
        if self.measure:
            self._measure_rounding(grad_output, weight, grad_input)
            self._measure_tokens(grad_output, grad_input)

    def _add(self, setting: LayerConfig, estimate: Tensor, exact: Tensor) -> None:
        exact = exact.float()
        error = torch.linalg.vector_norm(estimate.float() - exact) / torch.linalg.vector_norm(exact).clamp(min=1e-30)
        self.layer.errors.setdefault(setting, []).append(float(error))

    def _measure_rounding(self, grad_output: Tensor, weight: Tensor, grad_input: Tensor) -> None:
        for setting in self.layer.candidates:
            if setting.estimator in ("int8", "fp8") and setting.weight_copy:
                estimate = candidate_estimator(self.layer, setting).estimate(grad_output, weight)
                self._add(setting, estimate, grad_input)

    def _measure_tokens(self, grad_output: Tensor, grad_input: Tensor) -> None:
        """What leaving tokens out loses is the norm of their exact rows: no estimate has to be computed."""
        layer, squared = self.layer, squared_row_norms(grad_output)
        ordered = in_float64(squared_row_norms(grad_input)[squared.argsort(descending=True)])
        lost = ordered.flip(0).cumsum(0).flip(0)  # lost[k]: with only the first k kept
        total = float(lost[0]) or 1.0
        steps = {layer.grain(setting) for setting in self.layer.candidates if setting.estimator == "tokens"}
        for share in SHARES:
            needed = int(energy_count(squared, share))
            for step in steps:
                count = rounded_up(needed, len(squared), step)
                layer.kept.setdefault((share, step), []).append(count / len(squared))
                error = (float(lost[count]) / total) ** 0.5 if count < len(lost) else 0.0
                layer.lost.setdefault((share, step), []).append(error)
        # By number, which no product rounds up: a layer that is not disturbed would seem to have no influence.
        count = int(energy_count(squared, _DISTURBANCE))
        layer.disturbance = dataclasses.replace(tokens_setting(count / len(squared)), selection="topk")
        layer.disturbed = (float(lost[count]) / total) ** 0.5 if count < len(lost) else 0.0


def observe(bench: Bench, layers: list[Layer]) -> int:
    """Gather gradients and errors; returns the bytes that one forward saves for backward."""
    by_name = {layer.name: layer for layer in layers}
    for number in range(bench.measuring + 1):
        last = number == bench.measuring

        def make(layer: Layer, last: bool = last) -> Estimator:
            return _Observer(layer, measure=last)

        with grafted_with(by_name, make) as grafts, saved_for_backward(bench.model) as saved:
            for graft in grafts.values():
                graft.mode = Mode.OBSERVE
            bench.gradient(number)
    return saved.nbytes
