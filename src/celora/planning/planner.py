"""The planner: it measures time and error of each candidate in each layer, and chooses the fastest good enough mix.

1. Observe (`observe`). Exact backwards give each layer's gradients. Every candidate judges its relative error e on
   them. A candidate that selects ahead of time does so on an earlier batch.
2. Time (`evidence`). Every candidate is timed on this device, at the real shapes, in turns with the dense product.
3. Influence (`influence`). Groups of layers are disturbed, and the error s that arrives in the LoRA gradient is
   measured. A layer's influence is `s^2 / sum e^2` of its group by depth, times that of its group by kind, divided by
   the mean of the latter over the kinds.
   The vocabulary projection is one more layer (`head_evidence`). Its gradient goes through a share of the words. Its
   error is the error that arrives in the LoRA gradient.
   If forwards in 8 bits are candidates (`forward_evidence`), the squared error that each brings into the LoRA gradient
   is measured on groups of layers, and is added to `influence e^2`.
4. Choose (`choose`). Minimise `sum time` subject to `sum influence e^2 <= 1 - cosine^2` and to the memory limit, by
   Lagrange multipliers. Audit the whole choice, and repeat with more or less allowed error.
5. Verify. Measure the cosine of the sum over batches that were not used to choose. Errors that differ between batches
   average out there; errors that all batches share do not. If the cosine is too low, choose again with less allowed
   error. At last, measure the time inside whole backwards (whole passes, if forwards are candidates).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from celora.errors import CELoraError
from celora.kernels.triton.judge import judge
from celora.machine.device import measured_on
from celora.machine.timing import cannot_time
from celora.modeling.model_graft import taken_over
from celora.modeling.survey import survey
from celora.planning.bench import Bench, Layer, Loss, Progress
from celora.planning.candidates import candidates
from celora.planning.choose import Try, choose_plan, settings_of, squared_error
from celora.planning.evidence import evidence, gains, graft_overhead, time_kinds
from celora.planning.forward_evidence import forward_evidence
from celora.planning.gradients import on_device, trainable, training, untouched
from celora.planning.head_evidence import head_evidence
from celora.planning.influence import probe_influence
from celora.planning.observe import observe
from celora.planning.plan import Candidate, Plan, PlannedLayer
from celora.runtime.attachment import find
from celora.settings.names import HEAD

# Chosen by training runs (docs/use/presets.md). 8-bit products alone keep more, so this costs little if they are fast.
# For a higher fidelity their rounding is too coarse, and the time rises steeply.
DEFAULT_FIDELITY = 0.998
_CARE = 0.85  # the allowed error is multiplied with this, once for each plan that fell short before the last one
_VERIFICATIONS = 4
_TOLERATED, _ROUNDING = 1.25, 1e-4  # a warning comes above 1.25 times the wanted squared error, plus rounding
MOST_BATCHES = 10  # one to select, one to measure, and eight to verify


def make_plan(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    fidelity: float = DEFAULT_FIDELITY,
    *,
    forward: bool = False,
    memory_limit: int | None = None,
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan the fastest estimator for each layer that keeps a cosine of `fidelity` of the LoRA gradient.

    It takes 20 to 130 forwards and backwards in training mode; the more candidates, the more, and about twice as many
    with `forward`. The model is unchanged afterwards: parameters, `.grad`, buffers, random state, mode. A warning says
    if the plan clearly misses its fidelity on the batches that verify it.

    Args:
        model: a PEFT model with active adapters.
        batches: keyword arguments of the model with `labels`, as large as training batches. At most ten are used: one
            to select, one to measure, the others to verify on their sum. With fewer than three, one batch has several
            of these roles.
        fidelity: the wanted cosine, 0 < fidelity <= 1; 1 allows only what changes nothing.
        forward: whether forwards in 8 bits are candidates, too. The cosine is then that with the gradient of exact
            forwards, and the plan says by how much the loss shifts (`Plan.loss_shift`). A second plan, of backwards
            alone, is made beside it, and the faster of those that keep the fidelity is returned.
        memory_limit: bytes that all 8-bit copies of weights together may take; by default 5 % of the weights and of
            what a forward saves for backward, and with `forward` a copy of every layer.
        loss: instead of `model(**batch).loss`, a function of (model, batch) that returns a scalar.
        progress: called with the current stage and the share of the work that is done.

    If no layer can be estimated, the plan is empty, and training with it is plain PEFT.

    Raises:
        CELoraError: no adapters, no batches, sharded parameters, a device whose times cannot be trusted, or a fidelity
            or memory limit out of range.
    """
    return make_plans(
        model, batches, [fidelity], forward=forward, memory_limit=memory_limit, loss=loss, progress=progress
    )[0]


def make_plans(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    fidelities: Sequence[float],
    *,
    forward: bool = False,
    memory_limit: int | None = None,
    loss: Loss | None = None,
    progress: Progress | None = None,
    head: bool = True,
) -> list[Plan]:
    """`make_plan` for several fidelities from one set of measurements: a frontier of time against fidelity.

    With `head=False` the gradient of the logits stays exact.
    """
    for fidelity in fidelities:
        if isinstance(fidelity, bool) or not isinstance(fidelity, int | float) or not 0 < fidelity <= 1:
            raise CELoraError(f"fidelity={fidelity!r}; expected a cosine, 0 < fidelity <= 1.")
    number = isinstance(memory_limit, int | float) and not isinstance(memory_limit, bool)
    if memory_limit is not None and not (number and 0 <= memory_limit < math.inf):
        raise CELoraError(f"memory_limit={memory_limit!r}; expected 0 or more bytes, or None for the default.")
    parameters = trainable(model)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise CELoraError(
            "a sharded model cannot be measured; make the plan before it is sharded, in one process for all of them."
        )
    devices = {parameter.device for parameter in model.parameters()}
    for device in devices:
        if reason := cannot_time(device):
            raise CELoraError(
                f"cannot plan on {device.type!r}: {reason}. Choose preset exact or paper, which time nothing."
            )
    progress = progress or (lambda what, share: None)
    for device in devices:
        verdict = judge(device, lambda operation: progress(f"trying Triton's {operation}", 0.0))
        for operation, reason in verdict.wrong.items():
            warnings.warn(f"celora: Triton's kernel {operation} {reason}; torch's operators are used.", stacklevel=3)
    used = [on_device(batch, parameters) for _, batch in zip(range(MOST_BATCHES), batches, strict=False)]
    if not used:
        raise CELoraError("no batches to plan with; give at least one, and three to verify on one that was not used.")
    found = survey(model)
    layers = [
        Layer(
            layer.name,
            layer.base,
            candidates(layer.shape, layer.device),
            fused=not layer.cannot_fuse,
            tuner=layer.module if forward and layer.takes_forward else None,
        )
        for layer in found.layers.values()
        if not layer.cannot_estimate
    ]
    attached = find(model)
    # Preset auto trains like this: without padding, and with the loss over labelled tokens only.
    with (
        nullcontext() if attached is None else attached.switch.off(),
        training(model),
        untouched(model, parameters) as rewind,
        taken_over(found.language_model) as taken,
    ):
        bench = Bench(model, parameters, used, loss, rewind, progress)
        bench.forward, bench.language_model = (taken, found.language_model) if head else (None, None)
        return _make_plans(bench, layers, fidelities, memory_limit)


def _make_plans(bench: Bench, layers: list[Layer], fidelities: Sequence[float], memory_limit: int | None) -> list[Plan]:
    bench.progress("observing gradients", 0.0)
    saved = observe(bench, layers)
    # The inputs of the first layers may need no gradient. Then there is no product to estimate.
    layers = [layer for layer in layers if layer.findings]
    bench.progress("timing candidates", 0.15)
    times = time_kinds(layers)
    device = next(iter(bench.parameters.values())).device
    bench.overhead_ms = graft_overhead(device, layers[0].dtype) if layers else 0.0
    bench.progress("probing influence", 0.25)
    if layers:
        probe_influence(bench, layers)
    if any(layer.tuner is not None for layer in layers):
        forward_evidence(bench, layers)
    planned = [evidence(layer, times[layer.kind], bench.overhead_ms) for layer in layers]
    planned += head_evidence(bench) if layers else []
    if memory_limit is None:
        weights = sum(p.numel() * p.element_size() for p in bench.model.parameters())
        memory_limit = (weights + saved) // 20
        if any(gains(layer.forward_ms) for layer in layers):  # each forward in 8 bits needs a copy, as in preset fast
            memory_limit = max(memory_limit, sum(max(c.memory for c in layer.candidates) for layer in planned))
    plans = []
    tries: list[Try] = []  # tries for one fidelity help with the next
    of_backwards: list[Try] = []
    for i, fidelity in enumerate(fidelities):
        bench.progress("choosing", 0.65 + 0.35 * i / len(fidelities))
        plan = _finish(bench, layers, planned, fidelity, memory_limit, tries)
        if plan.forwards:  # they are kept if they pay: their errors may have made the whole plan too careful
            plain = _finish(bench, layers, _own_forwards(planned), fidelity, memory_limit, of_backwards)
            both = plan, _with_candidates(plain, planned)
            plan = min(both, key=lambda made: (made.audited_cosine < made.fidelity, made.audited_time))
        plans.append(plan)
    bench.progress("done", 1.0)
    return plans


def _own_forwards(planned: list[PlannedLayer]) -> list[PlannedLayer]:
    """The same layers, where no forward in 8 bits can be chosen."""

    def kept(c: Candidate) -> Candidate:
        return c if c.setting.forward == "exact" else dataclasses.replace(c, forward_error=math.inf)

    return [dataclasses.replace(p, candidates=tuple(map(kept, p.candidates))) for p in planned]


def _with_candidates(plan: Plan, planned: list[PlannedLayer]) -> Plan:
    """The plan with the candidates as they were measured."""
    measured = {p.name: p.candidates for p in planned}
    layers = tuple(dataclasses.replace(p, candidates=measured[p.name]) for p in plan.layers)
    return dataclasses.replace(plan, layers=layers)


def _finish(
    bench: Bench,
    layers: list[Layer],
    planned: list[PlannedLayer],
    fidelity: float,
    memory_limit: int,
    tries: list[Try],
) -> Plan:
    """Choose, verify on other batches, and choose with less allowed error if the cosine is too low there."""
    by_name = {layer.name: layer for layer in layers}
    chosen, settings, audited, found, allowed = planned, {}, 1.0, 0.0, 1 - fidelity**2
    for turn in range(_VERIFICATIONS if planned else 0):
        chosen, found = choose_plan(bench, by_name, planned, allowed, memory_limit, tries)
        settings = settings_of(chosen)
        audited = bench.audit(by_name, settings, bench.verifying).cosine if settings else 1.0
        if audited >= fidelity:
            break
        allowed = _CARE**turn * found * (1 - fidelity**2) / squared_error(audited)
    predicted = math.sqrt(1 - found)
    shift = bench.loss_shift if settings else 0.0  # nothing was audited then, or a try that is not taken
    head = next((p for p in chosen if p.name == HEAD), None)
    chosen = [p for p in chosen if p is not head]
    of_head = {HEAD: setting} if (setting := settings.pop(HEAD, None)) else {}
    measured = bench.time(by_name, settings) if settings else 1.0
    if measured >= 1 and settings:  # each estimate is faster alone, but not inside whole backwards
        chosen, measured, shift = [dataclasses.replace(p, chosen=0) for p in chosen], 1.0, 0.0
        predicted, audited = (
            bench.audit(by_name, of_head, on).cosine if of_head else 1.0 for on in (None, bench.verifying)
        )
    if squared_error(audited) > _TOLERATED * (1 - fidelity**2) + _ROUNDING:
        warnings.warn(
            f"celora: none of {_VERIFICATIONS} plans kept a cosine of {fidelity:g}; this one keeps {audited:.4f} on "
            "the batches that verify it. Ask for a higher fidelity, which allows less error.",
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
        loss_shift=round(shift, 6),
    )
