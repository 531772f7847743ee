"""The audit: it compares the estimated gradient of the adapter with the exact one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from celora.errors import CELoraError
from celora.machine.device import in_float64
from celora.modeling.switch import Mode
from celora.numerics.measured import Measured
from celora.runtime.attachment import Attachment, require
from celora.runtime.fidelity import Fidelity, FromFloat32
from celora.runtime.gradients import gradient, on_device, trainable, training, untouched
from celora.runtime.upcast import in_float32, without_dropout
from celora.settings.names import HEAD
from celora.weights.sharded import whole


@dataclass(frozen=True)
class AuditReport(Fidelity):
    """Fidelity of the whole adapter gradient, and of each layer's. Prints as a table of the worst layers.

    Attributes:
        per_layer: adapted layer -> fidelity of the gradient of its adapter.
        loss: the loss of the batch, or the mean over batches, with exact forwards.
        loss_shift: by how much 8-bit forwards change the loss; 0 without them.
        probed: how many layers had no selection yet. They were judged with a selection from the judged batch itself.
        float32: how far plain PEFT and celora are from float32; None unless asked for.
        preconditioned: fidelity of the whole gradient as Adam scales it; None unless asked for.
    """

    per_layer: Mapping[str, Fidelity]
    loss: float
    probed: int
    loss_shift: float = 0.0
    float32: FromFloat32 | None = None
    preconditioned: Fidelity | None = None

    def __str__(self) -> str:
        worst = sorted(self.per_layer.items(), key=lambda item: item[1].cosine)[:5]
        lines = [
            f"LoRA gradient, estimated against exact: cosine {self.cosine:.4f}, "
            f"relative error {self.relative_error:.4f}, norm ratio {self.norm_ratio:.4f}; loss {self.loss:.4f}."
        ]
        if self.preconditioned is not None:
            lines.append(
                f"As Adam scales it: cosine {self.preconditioned.cosine:.4f}, "
                f"relative error {self.preconditioned.relative_error:.4f}."
            )
        if self.loss_shift:
            lines.append(f"The forward in 8 bits changes the loss by {self.loss_shift:+.4f}.")
        if self.probed:
            lines.append(
                f"{self.probed} layers had nothing selected yet: judged with a selection made from this batch."
            )
        if self.float32 is not None:
            named = {"plain PEFT": self.float32.plain, "celora as attached": self.float32.attached}
            lines += [
                f"Against float32, {name}: cosine {f.cosine:.4f}, relative error {f.relative_error:.4f}, "
                f"norm ratio {f.norm_ratio:.4f}."
                for name, f in named.items()
            ]
        lines.append("Lowest cosine by layer:")
        lines += [f"  {f.cosine:7.4f}  error {f.relative_error:.4f}  {name}" for name, f in worst]
        return "\n".join(lines)


def audit(
    model: nn.Module,
    batch: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
    reference: Literal["float32"] | None = None,
    optimizer: Optimizer | None = None,
) -> AuditReport:
    """Compare the estimated gradient of the trainable parameters with the exact one, on a batch or the sum of several.

    The sum of several tells more. In training, errors that differ between batches average out; an error that all
    batches share stays. So an estimate can be near the gradient of each batch and far from the gradient of their sum.

    It takes two forwards and backwards for each batch in training mode, with the same random state and so the same
    dropout. Before a training, layers with an 8-bit forward learn the scales of their inputs from one more forward.
    Afterwards parameters, their `.grad`, buffers, random state, mode, clock and selections are unchanged.

    Args:
        model: the model, with celora attached.
        batch: keyword arguments of the model with `labels`, or a list of such. They are moved to the model's device.
        loss: instead of `model(**batch).loss`, a function of (model, batch) that returns a scalar.
        reference: `"float32"` also compares plain PEFT's gradient, and celora's, with the gradient of the same weights
            computed in float32. That shows what the model's own dtype costs. It takes three more forwards and backwards
            for each batch, without dropout, and meanwhile 4 more bytes for each number in bfloat16 or float16.
        optimizer: Adam or AdamW after a step. Both gradients are also compared after each number is divided by
            `sqrt(v / (1 - beta2^t)) + eps` of the optimizer, as Adam does with its mean.

    Raises:
        CELoraError: celora is not attached, the batch has no finite loss or gradient, or nothing is trainable; with a
            reference also if the weights are quantised, sharded or offloaded, or do not fit in float32; with an
            optimizer also if it has no second moments of a parameter.
    """
    if reference not in (None, "float32"):
        raise CELoraError(f"reference={reference!r}; expected 'float32', or None to compare with the exact gradient.")
    attachment = require(model)
    parameters = trainable(model)
    scales = None if optimizer is None else _scales(optimizer, parameters)
    batches = [on_device(each, parameters) for each in ([batch] if isinstance(batch, Mapping) else batch)]
    if not batches:
        raise CELoraError("no batches to audit with; give one, or several.")

    with training(model), untouched(model, parameters) as rewind, _lent(attachment) as probes:
        if _show_inputs(attachment, lambda: model(**batches[0]) if loss is None else loss(model, batches[0])):
            rewind()
        head = attachment.forward
        with nullcontext() if head is None else head.through(1.0), attachment.switch.own_forwards():
            exact, value = gradient(model, batches, loss, parameters)
        for name in probes:
            attachment.grafts[name].estimator.select()
        probed = sum(attachment.grafts[name].estimator.ready for name in probes)
        for graft in attachment.grafts.values():
            graft.mode = Mode.ESTIMATE if graft.estimator.ready else Mode.EXACT
        rewind()
        with nullcontext() if head is None or head.mode is Mode.EXACT else head.through(head.keep_ratio):
            estimated, as_attached = gradient(model, batches, loss, parameters)
        of_float32 = None
        if reference == "float32":
            of_float32 = _from_float32(model, attachment, lambda: gradient(model, batches, loss, parameters)[0])

    pairs = {name: (estimated[name], exact[name]) for name in parameters}
    layers: dict[str, list[tuple[Tensor, Tensor]]] = {}
    adapted = {layer.name for layer in attachment.report.layers}
    for name, pair in pairs.items():
        layers.setdefault(_layer_of(name, adapted), []).append(pair)
    total = Fidelity.of(list(pairs.values()))
    return AuditReport(
        total.cosine,
        total.relative_error,
        total.norm_ratio,
        per_layer={name: Fidelity.of(pairs_of_layer) for name, pairs_of_layer in layers.items()},
        loss=value,
        loss_shift=as_attached - value if attachment.forwards else 0.0,
        probed=probed,
        float32=of_float32,
        preconditioned=None if scales is None else _scaled(pairs, scales),
    )


def _scales(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What Adam divides each number of each parameter's mean gradient by, in float64."""
    settings = {p: group for group in optimizer.param_groups for p in group["params"]}
    scales = {}
    for name, p in parameters.items():
        state, group = optimizer.state.get(p, {}), settings.get(p, {})
        if not ("exp_avg_sq" in state and "step" in state and "betas" in group):
            raise CELoraError(f"the optimizer has no second moments of {name}; give Adam or AdamW, after a step.")
        moments = whole(state.get("max_exp_avg_sq", state["exp_avg_sq"]))  # the largest ones with amsgrad
        unbiased = in_float64(moments) / (1 - group["betas"][1] ** float(state["step"]))
        scales[name] = unbiased.sqrt() + group["eps"]
    return scales


def _scaled(pairs: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, Tensor]) -> Fidelity:
    return Fidelity.of([(in_float64(g) / scales[name], in_float64(e) / scales[name]) for name, (g, e) in pairs.items()])


def _from_float32(model: nn.Module, attachment: Attachment, gradients: Callable[[], dict[str, Tensor]]) -> FromFloat32:
    """Compare the gradients of plain PEFT, and of celora as attached, with the gradient in float32."""
    head, switch = attachment.forward, attachment.switch
    with without_dropout(model):
        with nullcontext() if head is None or head.mode is Mode.EXACT else head.through(head.keep_ratio):
            attached = gradients()
        with switch.off():
            plain = gradients()
            with in_float32(model):
                true = gradients()
    return FromFloat32(*(Fidelity.of([(found[name], true[name]) for name in true]) for found in (plain, attached)))


@contextmanager
def _lent(attachment: Attachment) -> Iterator[list[str]]:
    """For a while, make all grafts exact, with copies of their estimators. Yields the layers without a selection.

    Such a layer gets a new estimator, which observes the first backward.
    """
    layers = {name: dict(vars(graft)) for name, graft in attachment.grafts.items()}
    of_head, forwards = None if attachment.forward is None else attachment.forward.eight_bit, attachment.forwards
    probes = [name for name, graft in attachment.grafts.items() if not graft.estimator.ready]
    try:
        for graft in attachment.grafts.values():
            graft.estimator, graft.mode = copy.copy(graft.estimator), Mode.EXACT
        for name in probes:
            attachment.grafts[name].estimator = attachment.grafts[name].estimator.clone()
            attachment.grafts[name].mode = Mode.OBSERVE
        for name in forwards.keys() & attachment.grafts.keys():
            graft = attachment.grafts[name]
            product: Any = graft.estimator.product
            graft.of_forward = Measured()
            if product.levels is None:
                graft.estimator.product = copy.copy(product)
        if attachment.forward is not None and of_head is not None:
            forwards[HEAD] = attachment.forward.eight_bit = of_head.lent()
        yield probes
    finally:
        if attachment.forward is not None and of_head is not None:
            forwards[HEAD] = attachment.forward.eight_bit = of_head
        for name, graft in attachment.grafts.items():
            vars(graft).update(layers[name])


def _show_inputs(attachment: Attachment, forward: Callable[[], object]) -> bool:
    """Let forwards in 8 bits learn the scales of their inputs here, as from the first steps of a training.

    Returns whether `forward` was needed.
    """
    waiting = [name for name, each in attachment.forwards.items() if each.product.levels is None]
    if not waiting:
        return False
    grafts = [graft for name, graft in attachment.grafts.items() if name in waiting]
    modes, graft_of_head = [graft.mode for graft in grafts], attachment.forward
    head = None if graft_of_head is None else graft_of_head.eight_bit
    for graft in grafts:
        graft.mode = Mode.OBSERVE
    if head is not None:
        head.watches = True
    own_draws = nullcontext() if graft_of_head is None else graft_of_head.through(graft_of_head.keep_ratio)
    with torch.enable_grad(), own_draws:
        forward()
    attachment.forwards.follow_inputs(None)
    for graft, mode in zip(grafts, modes, strict=True):
        graft.mode = mode
    if head is not None:
        head.watches = False
    return True


def _layer_of(parameter: str, adapted: set[str]) -> str:
    """The adapted layer that a parameter belongs to; the parameter's own name if there is none."""
    parts = parameter.split(".")
    return next((p for i in range(len(parts), 0, -1) if (p := ".".join(parts[:i])) in adapted), parameter)
