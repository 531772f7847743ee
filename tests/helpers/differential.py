"""Trains one drawn case twice, with plain PEFT and with celora's `exact`, and compares all results.


In float32 the two must agree to rounding. If they do not, PEFT in float64 shows whether the case itself is that
sensitive to rounding. In half precision, both are compared with float32 training of the same weights.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.trainer_pt_utils import LabelSmoother

import celora
from celora.runtime.attachment import find
from drawn import Case, make_batch
from drawn_acts import ACTS
from drawn_models import adapt, causal_of, make_base

SMOOTHING = 0.1
ROUNDING = 1e-5  # relative to the norm of a float32 gradient
_own_dropout = nn.functional.dropout


def _kept(columns: int, p: float) -> Tensor:
    """The columns that a dropout of `p` keeps: the same in every call."""
    return (torch.arange(columns) * 37 + 13) % 101 >= 101 * p


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return _own_dropout(x, p, training, inplace)
    return x * _kept(x.shape[-1], p) * (1 / (1 - p))


def _bernoulli_(self: Tensor, p: float) -> Tensor:
    return self.copy_(_kept(self.shape[-1], 1 - p).expand_as(self))


@contextlib.contextmanager
def same_masks() -> Iterator[None]:
    """Let dropout drop the same columns for every token, so that batches with and without padding are comparable."""
    with (
        mock.patch.object(nn.functional, "dropout", _dropout),
        mock.patch.object(Tensor, "bernoulli_", _bernoulli_),
    ):
        yield


@dataclass
class Trace:
    """The results of one training: tensors by name, in order; `gradients` of each round by parameter."""

    model: PeftModel
    values: dict[str, Tensor] = field(default_factory=dict)
    gradients: list[dict[str, Tensor | None]] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)


class NotTrainable(Exception):
    """Plain PEFT cannot do this."""


def build(case: Case) -> PeftModel:
    """The model of the case in its dtype, without any action of the user."""
    base = make_base(case.family, case.config, case.attention, case.seed)
    lora = {
        name: dict(value) if name == "rank_pattern" else list(value) if isinstance(value, tuple) else value
        for name, value in case.lora
    }
    return adapt(base.to(getattr(torch, case.dtype)), case.family, lora, case.seed)


def train(case: Case, model: PeftModel, *, attached: bool, dtype: torch.dtype | None = None) -> Trace:
    """Run all rounds of the case in its own dtype (and autocast), or in `dtype` if the model was converted to it.


    The optimizer's steps change nothing, so rounds do not depend on each other.
    """
    trace = Trace(model)
    with warnings.catch_warnings(record=True) as caught, same_masks():
        warnings.simplefilter("always")
        _act(case, trace.model, 0)
        if attached:
            celora.attach(attachable(case, trace.model), "exact")
        for number in range(max(2, *(when + 1 for _, when, _ in case.acts), 0)):
            if number:
                _act(case, trace.model, number)
                for what in case.between if number == 1 else ():
                    _between(what, case, trace, attached=attached, dtype=dtype)
            _round(case, trace, number, attached=attached, dtype=dtype)
    trace.warned = [str(w.message) for w in caught]
    return trace


def attachable(case: Case, model: PeftModel) -> nn.Module:
    """The argument of `attach`: the model, the tuner inside it, or a module around it."""
    if case.attached_to == "wrapper":
        return nn.ModuleDict({"student": model})
    return model.base_model if case.attached_to == "tuner" else model


def _act(case: Case, model: PeftModel, when: int) -> None:
    for name, time, k in case.acts:
        if time == when:
            torch.manual_seed(7)
            ACTS[name](model, k)


def _round(case: Case, trace: Trace, number: int, *, attached: bool, dtype: torch.dtype | None) -> None:
    named = dict(trace.model.named_parameters())
    for p in named.values():
        p.grad = None
    named = {name: p for name, p in named.items() if p.requires_grad}
    trained = [*named.values()]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    for micro in range(case.accumulate):
        batch = inputs(case, trace.model, 10 * number + micro, dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.autocast and dtype is None):
            loss = loss_of(case, trace, batch, f"round {number}, {micro}", attached=attached)
            if case.backward == "two calls":
                loss = loss + loss_of(case, trace, batch, f"round {number}, {micro} again", attached=attached)
        trace.values[f"round {number}, {micro}: loss"] = loss.detach()
        loss = loss * 3 if case.backward == "scaled" else loss
        if case.backward == "grad":
            found = torch.autograd.grad(loss, trained, allow_unused=True)
            for p, grad in zip(trained, found, strict=True):
                if grad is not None:
                    p.grad = grad if p.grad is None else p.grad + grad
        else:
            loss.backward(retain_graph=case.backward == "twice")
            if case.backward == "twice":
                loss.backward()
        if case.embeds == "grad" and case.backward != "grad":
            trace.values[f"round {number}, {micro}: input gradient"] = batch["inputs_embeds"].grad
    trace.gradients.append({name: None if p.grad is None else p.grad.clone() for name, p in named.items()})
    for p in trained:
        if p.grad is not None:
            p.grad.nan_to_num_(0, 0, 0)  # even a step of size 0 would carry NaN into the weights
    optimizer.step()


def inputs(case: Case, model: PeftModel, number: int, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The arguments of one call, with floating numbers in the model's dtype."""
    batch = make_batch(case, number)
    if case.items:
        batch["num_items_in_batch"] = 7 if case.items == "int" else torch.tensor(7)
    if case.embeds:
        with torch.no_grad():
            embeds = causal_of(model).get_input_embeddings()(batch.pop("input_ids")).detach().clone()
        batch["inputs_embeds"] = embeds.requires_grad_(case.embeds == "grad")
    usual = getattr(torch, case.dtype)
    for name, value in batch.items() if dtype is not None else ():
        plain = name == "inputs_embeds" or (name == "attention_mask" and value.dim() == 2)
        if isinstance(value, Tensor) and value.dtype == usual and not plain:
            batch[name] = value.to(dtype)
    return batch


def call(case: Case, model: PeftModel, batch: dict[str, Any]) -> Any:
    """One forward in the way that the case calls it."""
    given = dict(batch)
    if case.call == "positional" and "input_ids" in given:
        return causal_of(model)(given.pop("input_ids"), **given)
    if case.call == "checkpointed":
        return checkpoint(lambda: model(**given), use_reentrant=False)
    if case.call == "counted":
        with FlopCounterMode(display=False):
            return model(**given)
    if case.call == "offloaded":
        with torch.autograd.graph.save_on_cpu():
            return model(**given)
    if case.call == "functional":
        trained = {name: p * 1.0 for name, p in model.named_parameters() if p.requires_grad}
        return torch.func.functional_call(model, trained, (), given)
    called = {"tuner": model.base_model, "causal": causal_of(model)}.get(case.call, model)
    return called(**given)


def loss_of(case: Case, trace: Trace, batch: dict[str, Any], where: str, *, attached: bool) -> Tensor:
    """The loss to train, whether the model, a trainer or the test computes it. Other results are recorded."""
    batch, labels = dict(batch), batch.get("labels")
    attachment = find(trace.model) if attached else None
    smooths = case.smoothing and isinstance(labels, Tensor) and case.family not in ("bert", "t5")
    own = smooths and case.smoothing == "celora" and attachment is not None and attachment.forward is not None
    if own:
        attachment.forward.smoothing = SMOOTHING  # type: ignore[union-attr]
    elif smooths:
        del batch["labels"]
    output = call(case, trace.model, batch)
    if isinstance(output, tuple):
        keys = ["loss", *range(1, len(output))] if "labels" in batch else list(range(len(output)))
        output = dict(zip(keys, output, strict=True))
    for name in ("hidden_states", "attentions", "aux_loss"):
        found = output.get(name)
        for i, part in enumerate(found if isinstance(found, tuple) else [found]):
            if isinstance(part, Tensor):
                trace.values[f"{where}: {name} {i}"] = part.detach()
    if output.get("past_key_values") is not None and dict(case.extra).get("use_cache"):
        trace.values[f"{where}: cached"] = torch.tensor(1.0)
    if smooths and not own:
        loss: Tensor = LabelSmoother(SMOOTHING)(output, labels, shift_labels=True)
        return loss
    if "loss" in output and output["loss"] is not None:
        return output["loss"]  # type: ignore[no-any-return]
    logits = output["logits"] if "logits" in output else output[0]
    return logits.float().square().mean()  # type: ignore[no-any-return]


def _between(what: str, case: Case, trace: Trace, *, attached: bool, dtype: torch.dtype | None) -> None:
    """Do what users do between two steps, and record its results."""
    model, batch = trace.model, inputs(case, trace.model, 5, dtype)
    trains = model.training
    if what in ("attach", "reattach") and attached:
        if what == "reattach":
            celora.detach(model)
        celora.attach(attachable(case, model), "exact")
    elif what == "copy" and not any(name.startswith(("patch", "prune")) for name, *_ in case.acts):
        # A patched forward would call the original model's.
        trace.model = copy.deepcopy(model)
    elif what == "state":
        model.load_state_dict(model.state_dict())
    elif what in ("evaluate", "no_grad", "predict", "disabled"):
        model.train(what != "evaluate" and trains)
        if what == "predict":
            batch.pop("labels", None)
        with torch.no_grad(), model.disable_adapter() if what == "disabled" else contextlib.nullcontext():
            output = call(case, model, batch)
        for name, value in output.items() if not isinstance(output, tuple) else enumerate(output):
            if isinstance(value, Tensor):
                trace.values[f"{what}: {name}"] = value
        model.train(trains)
    elif what == "generate" and case.family != "bert":
        model.eval()
        given = {k: v for k, v in batch.items() if k in ("input_ids", "pixel_values")}
        if "input_ids" in given:
            tokens = model.generate(**given, max_new_tokens=2, do_sample=False)
            if case.dtype == "float32" and not case.autocast:
                trace.values["generated"] = tokens
        model.train(trains)
    elif what == "saliency" and "input_ids" in batch and case.family != "t5":
        model.eval()
        embeds = causal_of(model).get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
        if not {"llava", "gemma3"} & {case.family}:
            if case.smoothing:  # if the head smooths labels, smoothing is part of the loss
                batch.pop("labels", None)
            output = call(case, model, {**batch, "inputs_embeds": embeds})
            first = output[0] if isinstance(output, tuple) or output.get("loss") is None else output["loss"]
            (found,) = torch.autograd.grad(first.float().square().mean(), embeds)
            trace.values["saliency"] = found
        model.train(trains)
