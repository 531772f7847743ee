"""The planner: measure what each way to estimate costs and loses, layer by layer, and choose the cheapest that is good
enough.

1. Observe: exact backward passes give each layer's gradients; every candidate's relative error e is measured on them,
   those that select ahead of time with a selection from an earlier batch.
2. Time: every candidate, on this device, at the real shapes, taking turns with the dense product.
3. Influence: groups of layers are disturbed, and the error s that arrives in the LoRA gradient is measured; a layer's
   influence is `s^2 / sum e^2` of its group by depth, times that of its group by kind.
   The vocabulary projection is one more layer: its gradient goes through a share of the words, and its error is what
   arrives in the LoRA gradient.
4. Choose: minimise `sum time` subject to `sum influence e^2 <= 1 - cosine^2` and to the memory limit, by Lagrange
   multipliers; audit the whole; again, with more or less allowed, by what the audits found.
5. Verify: the cosine of the sum over batches of their own, in which errors that differ from batch to batch average
   out and what every batch loses does not; where it is too low, choose again with less allowed. And the time inside
   whole backward passes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from celora.attach import cannot_estimate, find, fuses, tuner_layers
from celora.audit import Fidelity, gradient, on_device, trainable, training, untouched
from celora.config import LayerConfig
from celora.device import in_float64
from celora.errors import CELoraError
from celora.estimators import Dense, Estimator, make_estimator
from celora.estimators.base import Precision
from celora.forward import ModelGraft, find_language_model, taken_over
from celora.graft import LayerGraft, Mode, Switch
from celora.head import chunk_size, through_the_head
from celora.memory import saved_for_backward
from celora.plan import HEAD, Candidate, Plan, PlannedLayer, measured_on
from celora.products import PRODUCTS, make_product
from celora.recognise import IGNORED
from celora.select import energy_count, rounded_up, squared_row_norms
from celora.sharded import whole
from celora.timing import cannot_time, interleaved, synchronise
from celora.weights import device_of, read, shape_of

# Chosen by training (docs/presets.md). Where 8-bit products pay it costs little, since they alone keep more; beyond it
# their rounding is in the way and the time rises steeply.
DEFAULT_FIDELITY = 0.998

# Shares of the squared gradient norm that `tokens` may keep; 1 leaves out only what is exactly zero.
SHARES = (1.0, 0.9999, 0.9997, 0.999, 0.997, 0.995, 0.99, 0.98, 0.97, 0.95, 0.92, 0.88, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2)
COLUMNS = (0.75, 0.5)
_TIMED_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the tokens; times in between are interpolated
HEAD_SHARES = (0.3, 0.1, 0.03, 0.01)  # of the words, in the gradient of the logits
_DISTURBANCE = 0.88  # the share of the squared norm that disturbed layers keep
_DEPTHS, _MOST_KINDS, _FEW_LAYERS = 6, 8, 24
_ROUNDS, _MOST_ROUNDS = 8, 12  # of choosing, once a choice will do, and until one does
_AIM, _CLOSE = 0.96, 0.8  # of the squared error that is wanted: what to aim for, and what is near enough
_CARE = 0.85  # after each plan that fell short, as what verifies is not what was chosen on
_VERIFICATIONS = 4
_TOLERATED, _ROUNDING = 1.25, 1e-4  # times the squared error that was asked for, and more, after the last of them
_TURNS = 4  # of timing whole backward passes, the first of which does not count
MOST_BATCHES = 10  # to select, to measure, and eight to verify
_MARGIN = 0.97  # an estimate must beat the dense product by more than timing noise, or the layer stays dense

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
Progress = Callable[[str, float], None]
_Kind = tuple[int, int, int, torch.dtype, torch.device]


@dataclass
class _Layer:
    """What is found out about one layer."""

    name: str
    base: nn.Module
    candidates: Sequence[LayerConfig]  # that can be computed for it here
    fused: bool = False  # has a graft anyway, for its adapter
    errors: dict[LayerConfig, list[float]] = field(default_factory=dict)
    # (share of the norm, what the number of tokens is rounded up to) -> share of the tokens kept, error of the others
    kept: dict[tuple[float, int], list[float]] = field(default_factory=dict)
    lost: dict[tuple[float, int], list[float]] = field(default_factory=dict)
    tokens: int = 0
    dtype: torch.dtype = torch.float32
    columns: dict[LayerConfig, Estimator] = field(default_factory=dict)
    disturbance: LayerConfig = field(default_factory=lambda: LayerConfig("dense"))
    disturbed: float = 0.0  # its relative error
    influence: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return shape_of(self.base)

    @property
    def kind(self) -> _Kind:
        """Layers of one kind take the same time; so do, nearly, those with less than twice as many tokens."""
        return (*self.shape, self.tokens.bit_length(), self.dtype, device_of(self.base))

    def error(self, setting: LayerConfig) -> float:
        """What the selection of this setting loses, or, of one without selection, its rounding."""
        if setting.estimator == "tokens":
            errors = self.lost[setting.keep_ratio, self.grain(setting)]
        else:
            errors = self.errors[setting]
        return float(statistics.fmean(e * e for e in errors) ** 0.5)

    def grain(self, setting: LayerConfig) -> int:
        """What the number of tokens that this setting keeps is rounded up to."""
        return make_product(setting.precision, copy=setting.weight_copy).grain(self.tokens, device_of(self.base))


def make_plan(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    fidelity: float = DEFAULT_FIDELITY,
    *,
    memory_limit: int | None = None,
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The cheapest estimator for each layer with which the LoRA gradient keeps a cosine of `fidelity` with the exact.

    Twenty to a hundred and thirty forward and backward passes in training mode, by how much can be estimated. The model
    is left as it was: parameters, `.grad`, buffers, random state, mode. A warning says where a plan clearly misses its
    fidelity on what verifies it.

    Args:
        model: a PEFT model, adapters active.
        batches: what the model takes as keyword arguments, `labels` included, of the size training will use. Up to
            ten are used: to select, to measure, and the others to verify on their sum; with fewer than three, one
            serves for more.
        fidelity: the cosine wanted, 0 < fidelity <= 1; 1 allows only what changes nothing.
        memory_limit: bytes that 8-bit copies of weights may take in all; by default 5 % of the weights and of what a
            forward saves for backward.
        loss: instead of `model(**batch).loss`, a function of (model, batch) that returns a scalar.
        progress: called with what is being done and the share of the work that is done.

    Where no layer can be estimated the plan is empty, and training with it is plain PEFT.

    Raises:
        CELoraError: no adapters, no batches, sharded parameters, a device whose times cannot be trusted, or a fidelity
            or memory limit out of range.
    """
    return make_plans(model, batches, [fidelity], memory_limit=memory_limit, loss=loss, progress=progress)[0]


def make_plans(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    fidelities: Sequence[float],
    *,
    memory_limit: int | None = None,
    loss: Loss | None = None,
    progress: Progress | None = None,
    head: bool = True,
) -> list[Plan]:
    """`make_plan` for several fidelities, from one set of measurements: a frontier of time against fidelity.

    Without `head` the gradient of the logits stays exact.
    """
    for fidelity in fidelities:
        if isinstance(fidelity, bool) or not isinstance(fidelity, int | float) or not 0 < fidelity <= 1:
            raise CELoraError(f"fidelity={fidelity!r}; expected a cosine, 0 < fidelity <= 1.")
    if memory_limit is not None and (isinstance(memory_limit, bool) or not isinstance(memory_limit, int | float)):
        raise CELoraError(f"memory_limit={memory_limit!r}; expected a number of bytes, or None for the default.")
    parameters = trainable(model)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise CELoraError(
            "a sharded model cannot be measured; make the plan before it is sharded, in one process for all of them."
        )
    for device in {parameter.device for parameter in model.parameters()}:
        if reason := cannot_time(device):
            raise CELoraError(
                f"cannot plan on {device.type!r}: {reason}. Choose preset exact or paper, which time nothing."
            )
    used = [on_device(batch, parameters) for _, batch in zip(range(MOST_BATCHES), batches, strict=False)]
    if not used:
        raise CELoraError("no batches to plan with; give at least one, and three to verify on one that was not used.")
    considered = candidates(next(iter(parameters.values())).device)
    layers = [
        _Layer(name, base := module.get_base_layer(), _possible(base, considered), fused=fuses(module))
        for name, module in tuner_layers(model).items()
        if not cannot_estimate(module)
    ]
    attached = find(model)
    was_on = attached is not None and attached.switch.on
    if attached is not None:
        attached.switch.on = False
    try:
        # As preset auto will train: without padding, and with the loss over labelled tokens.
        with training(model), untouched(model, parameters) as rewind, taken_over(model) as forward:
            bench = _Bench(model, parameters, used, loss, rewind, progress or (lambda what, share: None))
            bench.forward = forward if head else None
            return _make_plans(bench, layers, fidelities, memory_limit)
    finally:
        if attached is not None:
            attached.switch.on = was_on


class _Bench:
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
        self.overhead_ms = 0.0  # of a graft, whatever it computes
        self.forward: ModelGraft | None = None  # what computes the loss, if its gradient may be estimated
        self._exact: dict[range, dict[str, Tensor]] = {}

    @property
    def measuring(self) -> int:
        """The batch to measure on: not the one that was selected on, where there are two."""
        return min(1, len(self.batches) - 1)

    @property
    def verifying(self) -> range:
        """The batches to verify on: those that are not used otherwise, where there are more than two."""
        return range(min(2, len(self.batches) - 1), len(self.batches))

    def gradient(self, *numbers: int) -> dict[str, Tensor]:
        """The gradient of these batches, summed, with whatever is grafted now."""
        self.rewind()
        return gradient(self.model, [self.batches[i] for i in numbers], self.loss, self.parameters)[0]

    def exact(self, numbers: range) -> dict[str, Tensor]:
        """The exact gradient of these batches, computed once."""
        if numbers not in self._exact:
            self._exact[numbers] = self.gradient(*numbers)
        return self._exact[numbers]

    def audit(
        self, layers: Mapping[str, _Layer], settings: Mapping[str, LayerConfig], numbers: range | None = None
    ) -> Fidelity:
        """The fidelity with these settings under these layers, everything else exact, on the sum of these batches;
        without, on the one to measure on."""
        numbers = numbers or range(self.measuring, self.measuring + 1)
        exact = self.exact(numbers)
        estimated_layers = {name: layers[name] for name in settings if name in layers}
        grafted = _grafted(estimated_layers, lambda layer: _estimator(layer, settings[layer.name]))
        head: AbstractContextManager[None] = nullcontext()
        if self.forward is not None and HEAD in settings:
            head = self.forward.through(settings[HEAD].keep_ratio)
        with head, grafted as grafts:
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

    def time(self, layers: Mapping[str, _Layer], settings: Mapping[str, LayerConfig]) -> float:
        """The time of all `grad_input` products inside whole backward passes, over that of the dense ones; what the
        grafts themselves take counts."""
        dense = dict.fromkeys(layers, LayerConfig("dense"))
        contenders = [
            {name: _estimator(layer, of[name]) for name, layer in layers.items()}
            for of in (dense, {**dense, **settings})
        ]
        ratios = []
        for turn in range(_TURNS):
            seconds = []
            for estimators in contenders:
                with _grafted(layers, functools.partial(_of, estimators), kind=_TimedGraft) as grafts:
                    for graft in grafts.values():
                        graft.mode = Mode.ESTIMATE if graft.estimator.ready else Mode.OBSERVE
                    self.gradient(self.measuring)
                    seconds.append(float(sum(graft.seconds for graft in grafts.values())))
                    for estimator in estimators.values():
                        estimator.select()
            if turn > 0:  # the first makes what estimators keep
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
def _grafted(
    layers: Mapping[str, _Layer], make: Callable[[_Layer], Estimator], *, kind: type[LayerGraft] = LayerGraft
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


def _of(estimators: Mapping[str, Estimator], layer: _Layer) -> Estimator:
    return estimators[layer.name]


def _estimator(layer: _Layer, setting: LayerConfig) -> Estimator:
    estimator = make_estimator(setting.estimator, *layer.shape, dataclasses.asdict(setting))
    estimator.device = device_of(layer.base)
    return estimator


class _Observer(Dense):
    """Sees a layer's gradients and measures on them what every candidate would have got wrong."""

    def __init__(self, layer: _Layer, *, measure: bool) -> None:
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
                estimator = layer.columns.setdefault(setting, _estimator(layer, setting))
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
                estimate = _estimator(self.layer, setting).estimate(grad_output, weight)
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
        layer.disturbance = dataclasses.replace(_tokens(count / len(squared)), selection="topk")
        layer.disturbed = (float(lost[count]) / total) ** 0.5 if count < len(lost) else 0.0


def _tokens(share: float, precision: Precision = "native", *, copy: bool = True) -> LayerConfig:
    return LayerConfig("tokens", keep_ratio=share, rank=0, selection="energy", precision=precision, weight_copy=copy)


def candidates(device: torch.device) -> list[LayerConfig]:
    """Everything the planner considers on this kind of device, dense first."""
    found = [LayerConfig("dense")]
    found += [_tokens(share) for share in SHARES]
    found += [LayerConfig("columns", keep_ratio=keep, rank=0) for keep in COLUMNS]
    formats: tuple[Precision, ...] = ("int8", "fp8")
    for precision, copy in itertools.product(formats, (True, False)):
        if make_product(precision, copy=copy).slow(device):
            continue
        found.append(LayerConfig(precision, rank=0, weight_copy=copy))
        found += [_tokens(share, precision, copy=copy) for share in SHARES]
        if copy:
            found += [LayerConfig("columns", keep_ratio=keep, rank=0, precision=precision) for keep in COLUMNS]
    return found


def _possible(base: nn.Module, considered: Sequence[LayerConfig]) -> list[LayerConfig]:
    """Those of the candidates whose products exist for this layer's shape on its device."""
    shape, device = shape_of(base), device_of(base)
    lacking = {
        (name, copy)
        for name, copy in itertools.product(PRODUCTS, (True, False))
        if make_product(name, copy=copy).unavailable(*shape, device)
    }
    return [setting for setting in considered if (_bits(setting), setting.weight_copy) not in lacking]


def _bits(setting: LayerConfig) -> str:
    """The arithmetic of a setting: `int8` is one, and what others are computed in."""
    return setting.precision if setting.precision != "native" else setting.estimator


def _make_plans(
    bench: _Bench, layers: list[_Layer], fidelities: Sequence[float], memory_limit: int | None
) -> list[Plan]:
    bench.progress("observing gradients", 0.0)
    saved = _observe(bench, layers)
    # The first layers' inputs may need no gradient: there is no product to estimate.
    layers = [layer for layer in layers if layer.lost]
    if memory_limit is None:
        weights = sum(p.numel() * p.element_size() for p in bench.model.parameters())
        memory_limit = (weights + saved) // 20
    bench.progress("timing candidates", 0.15)
    times = _time_kinds(layers)
    device = next(iter(bench.parameters.values())).device
    bench.overhead_ms = _graft_overhead(device, layers[0].dtype) if layers else 0.0
    bench.progress("probing influence", 0.25)
    if layers:
        _probe_influence(bench, layers)
    planned = [_evidence(layer, times[layer.kind], bench.overhead_ms) for layer in layers]
    planned += _head_evidence(bench) if layers else []
    plans = []
    tries: list[_Try] = []  # what was found for one fidelity helps with the next
    for i, fidelity in enumerate(fidelities):
        bench.progress("choosing", 0.65 + 0.35 * i / len(fidelities))
        plans.append(_finish(bench, layers, planned, fidelity, memory_limit, tries))
    bench.progress("done", 1.0)
    return plans


def _finish(
    bench: _Bench,
    layers: list[_Layer],
    planned: list[PlannedLayer],
    fidelity: float,
    memory_limit: int,
    tries: list[_Try],
) -> Plan:
    """Choose, verify on the batches kept for it, and choose more carefully where they show less than was asked for."""
    by_name = {layer.name: layer for layer in layers}
    chosen, settings, audited, found, allowed = planned, {}, 1.0, 0.0, 1 - fidelity**2
    for turn in range(_VERIFICATIONS if planned else 0):
        chosen, found = _choose(bench, by_name, planned, allowed, memory_limit, tries)
        settings = _settings(chosen)
        audited = bench.audit(by_name, settings, bench.verifying).cosine if settings else 1.0
        if audited >= fidelity:
            break
        allowed = _CARE**turn * found * (1 - fidelity**2) / _squared_error(audited)
    predicted = math.sqrt(1 - found)
    head = next((p for p in chosen if p.name == HEAD), None)
    chosen = [p for p in chosen if p is not head]
    of_head = {HEAD: setting} if (setting := settings.pop(HEAD, None)) else {}
    measured = bench.time(by_name, settings) if settings else 1.0
    if measured >= 1 and settings:  # each estimate was faster alone; in a whole backward pass they are not
        chosen, measured = [dataclasses.replace(p, chosen=0) for p in chosen], 1.0
        predicted, audited = (
            bench.audit(by_name, of_head, on).cosine if of_head else 1.0 for on in (None, bench.verifying)
        )
    if _squared_error(audited) > _TOLERATED * (1 - fidelity**2) + _ROUNDING:
        warnings.warn(
            f"celora: of {_VERIFICATIONS} plans for a cosine of {fidelity:g} none kept it; this one keeps "
            f"{audited:.4f} on the batches that verify it. A higher fidelity is planned more carefully.",
            stacklevel=3,
        )
    adapter = next(iter(bench.parameters.values()))
    dense_ms = sum(p.dense_ms for p in chosen)
    return Plan(
        layers=tuple(chosen),
        head=head,
        fidelity=float(fidelity),
        predicted_cosine=round(predicted, 6),
        audited_cosine=round(audited, 6),
        audited_batches=len(bench.verifying),
        predicted_time=round(sum(p.choice.time_ms for p in chosen) / dense_ms, 4) if dense_ms else 1.0,
        audited_time=round(measured, 4),
        tokens=max((layer.tokens for layer in layers), default=0),
        dtype=str(layers[0].dtype if layers else adapter.dtype).removeprefix("torch."),
        device=measured_on(adapter.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        memory_limit=int(memory_limit),
    )


def _observe(bench: _Bench, layers: list[_Layer]) -> int:
    """Gather gradients and errors; returns the bytes that one forward saves for backward."""
    by_name = {layer.name: layer for layer in layers}
    for number in range(bench.measuring + 1):
        last = number == bench.measuring

        def make(layer: _Layer, last: bool = last) -> Estimator:
            return _Observer(layer, measure=last)

        with _grafted(by_name, make) as grafts, saved_for_backward(bench.model) as saved:
            for graft in grafts.values():
                graft.mode = Mode.OBSERVE
            bench.gradient(number)
    return saved.nbytes


def _time_kinds(layers: list[_Layer]) -> dict[_Kind, dict[tuple[str, bool, float], float]]:
    """For each kind of layer: (what, whether it keeps a copy, share kept) -> milliseconds."""
    found: dict[_Kind, dict[tuple[str, bool, float], float]] = {}
    for layer in layers:
        if layer.kind in found:
            continue
        precisions = sorted({(s.precision, s.weight_copy) for s in layer.candidates if s.estimator == "tokens"})
        weight = read(layer.base, layer.dtype)
        # What is in the gradient does not matter to the time, except that zeros would not be kept.
        grad = torch.randn(layer.tokens, layer.shape[0], device=weight.device).to(layer.dtype)
        contenders: dict[tuple[str, bool, float], Estimator] = {("dense", True, 1.0): Dense(*layer.shape)}
        for setting in layer.candidates:
            if setting.estimator in ("int8", "fp8"):
                contenders[setting.estimator, setting.weight_copy, 1.0] = _estimator(layer, setting)
            elif setting.estimator == "columns":
                estimator = _estimator(layer, setting)
                estimator.observe(grad, weight, grad @ weight.to(grad.dtype))
                estimator.select()
                contenders[f"columns {setting.precision}", True, setting.keep_ratio] = estimator
        for precision, copy in precisions:
            for share in _TIMED_SHARES:
                setting = dataclasses.replace(_tokens(share, precision, copy=copy), selection="topk")
                if share == 1:  # where topk would not even look
                    setting = _tokens(1.0, precision, copy=copy)
                contenders[f"tokens {precision}", copy, share] = _estimator(layer, setting)
        calls = {
            "/".join(map(str, key)): functools.partial(estimator.estimate, grad, weight)
            for key, estimator in contenders.items()
        }
        measured = interleaved(calls, repeats=7, device=weight.device)
        found[layer.kind] = {key: measured["/".join(map(str, key))]["time_ms"] for key in contenders}
    return found


def _graft_overhead(device: torch.device, dtype: torch.dtype) -> float:
    """Milliseconds that a graft adds to a layer's forward and backward: a layer left alone does not have them."""
    linears = [nn.Linear(16, 16, device=device, dtype=dtype).requires_grad_(False) for _ in range(2)]
    layer = LayerGraft(Dense(16, 16), Switch())
    layer.mode = Mode.ESTIMATE
    linears[1].register_forward_hook(layer)
    x = torch.ones(1, 16, device=device, dtype=dtype, requires_grad=True)

    def run(linear: nn.Linear) -> None:
        with torch.enable_grad():
            linear(x).sum().backward()

    calls = {name: functools.partial(run, linear) for name, linear in zip(("bare", "grafted"), linears, strict=True)}
    times = interleaved(calls, repeats=50, device=device)
    return max(0.0, times["grafted"]["time_ms"] - times["bare"]["time_ms"])


def _time(setting: LayerConfig, kept: float, times: Mapping[tuple[str, bool, float], float]) -> float:
    """Milliseconds of a candidate that keeps this share of the tokens: between the two shares that were timed."""
    if setting.estimator in ("dense", "int8", "fp8"):
        return times[setting.estimator, setting.weight_copy, 1.0]
    if setting.estimator == "columns":
        return times[f"columns {setting.precision}", True, setting.keep_ratio]
    at = [times[f"tokens {setting.precision}", setting.weight_copy, share] for share in _TIMED_SHARES]
    low = next((i for i in range(len(at) - 2) if kept <= _TIMED_SHARES[i + 1]), len(at) - 2)
    along = (kept - _TIMED_SHARES[low]) / (_TIMED_SHARES[low + 1] - _TIMED_SHARES[low])
    return max(0.0, at[low] + along * (at[low + 1] - at[low]))


def _evidence(layer: _Layer, times: Mapping[tuple[str, bool, float], float], overhead_ms: float) -> PlannedLayer:
    """All candidates of one layer that are faster than dense, with dense first."""
    out_features, in_features = layer.shape
    dense = times["dense", True, 1.0]
    found = [Candidate(LayerConfig("dense"), dense, 0.0)]
    for setting in layer.candidates[1:]:
        bits = _bits(setting)
        if setting.estimator == "columns" and dataclasses.replace(setting, precision="native") not in layer.errors:
            continue  # never saw a gradient to select from
        kept = 1.0
        if setting.estimator == "tokens":
            kept = statistics.fmean(layer.kept[setting.keep_ratio, layer.grain(setting)])
        milliseconds = _time(setting, kept, times) + (0.0 if layer.fused else overhead_ms)
        rounding = layer.error(LayerConfig(bits, rank=0)) if bits in ("int8", "fp8") else 0.0
        if setting.estimator in ("int8", "fp8"):
            selected = 0.0
        elif setting.estimator == "tokens":
            selected = layer.error(setting)
        else:
            selected = layer.error(dataclasses.replace(setting, precision="native"))
        memory = out_features * in_features if bits in ("int8", "fp8") and setting.weight_copy else 0
        if setting.estimator == "columns":
            memory = round(memory * setting.keep_ratio * (1 + read(layer.base, layer.dtype).dtype.itemsize))
        if milliseconds < _MARGIN * dense:
            error = (selected**2 + rounding**2) ** 0.5
            found.append(Candidate(setting, round(milliseconds, 5), round(error, 6), memory))
    return PlannedLayer(layer.name, out_features, in_features, layer.influence, tuple(found), 0)


def _head_evidence(bench: _Bench) -> list[PlannedLayer]:
    """The vocabulary projection and what its shares of the words take and lose; nothing where celora does not do it."""
    causal, batch = find_language_model(bench.model)[0], bench.batches[bench.measuring]
    labels = batch.get("labels")
    if bench.forward is None or causal is None or not isinstance(labels, Tensor) or labels.dim() != 2:
        return []
    settings = {share: LayerConfig("columns", keep_ratio=share, rank=0) for share in HEAD_SHARES}
    errors = {share: bench.audit({}, {HEAD: of}).relative_error for share, of in settings.items()}
    if errors[HEAD_SHARES[-1]] == 0:  # a hundredth of the words loses nothing: the loss of this batch is not ours
        return []
    weight = whole(cast(Tensor, causal.get_output_embeddings().weight)).detach()
    tokens = int((labels[:, 1:] != IGNORED).sum())
    size = chunk_size(tokens, len(weight))
    grad = torch.randn(size, len(weight), device=weight.device).to(weight.dtype)
    out = grad.new_empty(size, weight.shape[1])
    calls = {
        str(share): functools.partial(through_the_head, grad, weight, share, out, 0) for share in (1.0, *HEAD_SHARES)
    }
    ms = {call: of["time_ms"] * tokens / size for call, of in interleaved(calls, repeats=5, device=grad.device).items()}
    found = [Candidate(LayerConfig("dense"), round(ms["1.0"], 5), 0.0)]
    for share, setting in settings.items():
        if ms[str(share)] < _MARGIN * ms["1.0"]:
            found.append(Candidate(setting, round(ms[str(share)], 5), round(errors[share], 6)))
    return [PlannedLayer(HEAD, len(weight), weight.shape[1], 1.0, tuple(found), 0)]


def _probe_influence(bench: _Bench, layers: list[_Layer]) -> None:
    """Disturb groups of layers, by depth and by kind, and see how much of it arrives in the LoRA gradient.

    Every layer by itself where they are few.
    """
    size = 1 if len(layers) <= _FEW_LAYERS else -(-len(layers) // _DEPTHS)
    depths = [layers[i : i + size] for i in range(0, len(layers), size)]
    kinds: dict[str, list[_Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    groups = depths + (list(kinds.values()) if size > 1 and 1 < len(kinds) <= _MOST_KINDS else [])
    arrived = []
    for i, group in enumerate(groups):
        members = {layer.name: layer for layer in group}
        error = bench.audit(members, {layer.name: layer.disturbance for layer in group}).relative_error
        caused = sum(layer.disturbed**2 for layer in group)
        arrived.append(error**2 / caused if caused > 0 else 1.0)
        bench.progress("probing influence", 0.25 + 0.4 * (i + 1) / len(groups))
    mean = statistics.fmean(arrived[len(depths) :]) if len(groups) > len(depths) else 0.0
    for group, rate in zip(depths, arrived, strict=False):
        for layer in group:
            layer.influence = rate
    if mean > 0:
        for group, rate in zip(kinds.values(), arrived[len(depths) :], strict=True):
            for layer in group:
                layer.influence *= rate / mean
    for layer in layers:
        layer.influence = round(layer.influence, 8)


@dataclass(frozen=True)
class _Try:
    """A choice, what squared error the table was to allow for it, and what its audit found."""

    allowed: float
    choice: tuple[int, ...]
    found: float


def _choose(
    bench: _Bench,
    layers: Mapping[str, _Layer],
    planned: list[PlannedLayer],
    wanted: float,
    memory_limit: int,
    tries: list[_Try],
) -> tuple[list[PlannedLayer], float]:
    """The cheapest choice whose audit finds a squared error of at most `wanted`, and what is found for it.

    What a table allows and what an audit finds differ by a factor that is not constant: the next allowance is taken
    from the `tries` so far. All is dense where none will do.
    """
    table, found_of = Table(planned), {of.choice: of.found for of in tries}
    for round_ in range(_MOST_ROUNDS if wanted > 0 else 1):
        good = [of.found for of in tries if of.found <= wanted]
        if good and (round_ >= _ROUNDS or max(good) > _CLOSE * wanted):
            break
        allowed = _next_allowance(tries, wanted)
        choice = tuple(table.cheapest(allowed, memory_limit))
        if choice not in found_of:
            settings = _settings(_chosen(planned, choice))
            found_of[choice] = _squared_error(bench.audit(layers, settings).cosine) if settings else 0.0
        tries.append(_Try(allowed, choice, found_of[choice]))
    fitting = (of for of in tries if of.found <= wanted)
    best = min(fitting, key=lambda of: table.time(of.choice), default=_Try(0.0, (0,) * len(planned), 0.0))
    return _chosen(planned, best.choice), best.found


def _next_allowance(tries: Sequence[_Try], wanted: float) -> float:
    """What to allow next so that an audit finds somewhat less than `wanted`.

    What is found grows with some power of what is allowed, which two tries tell: the nearest ones on either side, where
    there are any, and what comes next lies between them; else the furthest one and the next to it.
    """
    tries = [of for of in tries if of.allowed > 0]  # powers of nothing tell nothing
    if not tries or wanted == 0:
        return wanted

    def beyond(of: _Try) -> float:
        return math.log(max(of.found, 1e-6 * wanted) / (_AIM * wanted))

    good = max((of for of in tries if of.found <= wanted), key=lambda of: of.allowed, default=None)
    above = [of for of in tries if of.found > wanted and (good is None or of.allowed > good.allowed)]
    bad = min(above, key=lambda of: of.allowed, default=None)
    if good is not None and bad is not None:
        along = beyond(good) / (beyond(good) - beyond(bad))
        return good.allowed * math.pow(bad.allowed / good.allowed, min(0.9, max(0.1, along)))
    last = cast(_Try, good or bad)
    others = [of for of in tries if of.allowed != last.allowed]
    power = 1.0
    if others:
        other = min(others, key=lambda of: abs(math.log(of.allowed / last.allowed)))
        power = (beyond(other) - beyond(last)) / math.log(other.allowed / last.allowed)
    return last.allowed * min(100.0, max(0.01, math.exp(-beyond(last) / min(2.0, max(0.25, power)))))


def _squared_error(cosine: float) -> float:
    """`1 - cosine^2`, of which rounding takes nothing below 0, and 1 where the cosine is negative."""
    return 1 - min(1.0, max(0.0, cosine)) ** 2


def _chosen(planned: Sequence[PlannedLayer], choice: Sequence[int]) -> list[PlannedLayer]:
    return [dataclasses.replace(p, chosen=i) for p, i in zip(planned, choice, strict=True)]


def _settings(planned: Sequence[PlannedLayer]) -> dict[str, LayerConfig]:
    """What was chosen for the layers that are not left dense."""
    return {p.name: p.choice.setting for p in planned if p.choice.setting.estimator != "dense"}


class Table:
    """Times, errors by influence and memory of all candidates of all layers, to choose from."""

    def __init__(self, planned: Sequence[PlannedLayer]) -> None:
        width = max(len(p.candidates) for p in planned)
        padded = [list(p.candidates) + [p.candidates[0]] * (width - len(p.candidates)) for p in planned]
        numbers = functools.partial(torch.tensor, dtype=torch.float64, device="cpu")
        self._times = numbers([[c.time_ms for c in of] for of in padded])
        errors = numbers([[c.relative_error**2 for c in of] for of in padded])
        self._errors = numbers([p.influence for p in planned])[:, None] * errors
        self._memory = numbers([[float(c.memory) for c in of] for of in padded])

    def error(self, choice: Sequence[int]) -> float:
        """The squared error that the choice is expected to cause in the LoRA gradient: `sum s e^2` over the layers."""
        return self._sum(self._errors, choice)

    def time(self, choice: Sequence[int]) -> float:
        """Milliseconds of one backward pass's products."""
        return self._sum(self._times, choice)

    def cheapest(self, error: float, memory: float) -> list[int]:
        """The choice of least time with `sum s e^2 <= error`, and within the memory; a Lagrange multiplier for each.

        s: a layer's influence; e: the relative error of its candidate; for a fidelity, `error = 1 - cosine^2`.
        Multipliers find the best choices for some allowances only; what the best of these leaves of this one is spent
        layer by layer, each time on what saves most.
        """

        def at(price: float, rent: float) -> list[int]:
            chosen: list[int] = (self._times + price * self._errors + rent * self._memory).argmin(1).tolist()
            return chosen

        def with_error(rent: float) -> list[int]:
            return _bisect(lambda price: at(price, rent), lambda choice: self.error(choice) <= error)

        choice = _bisect(with_error, lambda choice: self._sum(self._memory, choice) <= memory)
        while True:
            at_hand = torch.tensor(choice, device="cpu")[:, None]
            saved, lost, held = (
                of - of.gather(1, at_hand) for of in (-self._times, self._errors, self._memory)
            )  # by moving one layer to one candidate
            fits = (lost <= error - self.error(choice)) & (held <= memory - self._sum(self._memory, choice))
            saved = torch.where(fits, saved, 0)
            layer, candidate = divmod(int(saved.argmax()), saved.shape[1])
            if saved[layer, candidate] <= 0:
                return choice
            choice[layer] = candidate

    def _sum(self, of: Tensor, choice: Sequence[int]) -> float:
        return float(of.gather(1, torch.tensor(choice, device="cpu")[:, None]).sum())


def _bisect(choose: Callable[[float], list[int]], fits: Callable[[list[int]], bool]) -> list[int]:
    """The choice at the lowest multiplier with which it fits; everything fits at the highest, where all is dense."""
    if fits(choice := choose(0.0)):
        return choice
    low, high = -20.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(choose(10**middle)) else (middle, high)
    return choose(10**high)
