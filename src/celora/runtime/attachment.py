"""The estimators of one model and the clock that refreshes them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from celora.errors import CELoraError
from celora.machine.processes import largest_of_all, shards
from celora.modeling.graft import LayerGraft
from celora.modeling.model_graft import ModelGraft
from celora.modeling.report import AttachReport
from celora.modeling.switch import Mode, Switch
from celora.runtime.agreement import add_up, largest_errors
from celora.runtime.clock import StepClock
from celora.runtime.forwards import Forwards
from celora.runtime.ladder import Ladder
from celora.runtime.target_error import aim
from celora.settings.config import CELoraConfig
from celora.settings.names import HEAD

ATTRIBUTE = "_celora"
_FIRST_ROUND = 10  # optimizer steps over which `spread` distributes the first observations
TOO_OFTEN = 2  # refreshes in a row at which a relative error of 1 or more makes a layer exact
attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()


class Planned(Protocol):
    """What an attachment asks of the plan that its configuration was made from."""

    def other_batches(self, tokens: int, dtype: str) -> str:
        """Why the plan was made for other batches than those with so many tokens in this dtype, or ''."""


class Attachment:
    """The estimators of one model and the clock that refreshes them.

    Attributes:
        relative_errors: of each layer's estimate, as measured at its latest refresh; `head` is the vocabulary
            projection's.
        over_bound: how many refreshes in a row, up to the latest, a layer's relative error was 1 or more.
        forwards: of layers whose forward is computed in 8 bits.
        ladder: what refreshes changed of what layers keep (`most_error` of the configuration).
        plan: what the configuration was made from, if it was.
    """

    def __init__(self, model: nn.Module, config: CELoraConfig, report: AttachReport) -> None:
        self.config = config
        self.report = report
        self.switch = Switch()
        self.grafts: dict[str, LayerGraft] = {}
        self.forwards = Forwards()
        self.ladder = Ladder(config.most_error)
        self.forward: ModelGraft | None = None
        self.relative_errors: dict[str, float] = {}
        self.over_bound: dict[str, int] = {}
        self.plan: Planned | None = None
        self.other_steps = 0  # of optimizers that hold none of the model's parameters
        self._observations = 0  # when the latest of those was
        self._refreshed: set[str] = set()  # layers that were to observe a gradient, whether or not one came
        self._awaited: set[str] = set()  # layers that another process has nothing selected for yet
        self._together: int | None = None  # the step from which on layers no longer refresh in turns
        self._bind(model, step=0)

    def _bind(self, model: nn.Module, step: int) -> None:
        # Weak, because the model holds this object: a cycle would keep a dropped model's memory until collection.
        self._model = weakref.ref(model)
        self.clock = StepClock(self.parameters, self._on_step, self._on_other_step, step=step)
        self.clock.start()
        attachments.add(self)

    @property
    def refreshes(self) -> int:
        """How many refresh steps have been finished."""
        return -(-self.clock.step // self.config.refresh_every)

    @property
    def made_exact(self) -> set[str]:
        """The layers whose estimate proved to be none, or lost too much, and which are exact from then on."""
        return self._given_up | self.ladder.exact

    @property
    def _given_up(self) -> set[str]:
        return {name for name, times in self.over_bound.items() if times >= TOO_OFTEN}

    def modules(self) -> Iterator[nn.Module]:
        """Those of the model that was attached to, while it lives."""
        model = self._model()
        return iter(()) if model is None else model.modules()

    def parameters(self) -> Iterator[nn.Parameter]:
        model = self._model()
        return iter(()) if model is None else (p for p in model.parameters() if p.requires_grad)

    def close(self) -> None:
        """Stop the clock; layers that still hold a graft compute their exact backward from now on."""
        self.switch.on = False
        self.clock.stop()

    def __del__(self) -> None:
        if "switch" in self.__dict__:
            self.switch.on = False

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key not in ("clock", "_model")}
        return {**state, "model": self._model(), "step": self.clock.step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model, step = state.pop("model"), state.pop("step")
        self.__dict__.update(state)
        self.switch.on = True
        self._bind(model, step)

    @torch.no_grad()
    def _on_step(self, step: int) -> None:
        """End the refresh that the finished step was, if it was one, and set every layer's mode for step `step`."""
        already, errors = self._given_up, dict[str, float]()
        modes = set(self.switch.modes)
        self.switch.modes.clear()
        self.switch.name_the_rest()
        if modes == {False} and not self.switch.compiled:
            self.switch.say_once(
                "eval",
                "this model trains in eval mode, where celora leaves forward and backward to PEFT; call model.train().",
            )
        observing = {name: graft for name, graft in self.grafts.items() if graft.mode is Mode.OBSERVE}
        if self.config.synchronise and (model := self._model()) is not None:
            if (step - 1) % self.config.refresh_every:  # a layer that never sees a gradient does not ask at every step
                observing = {
                    name: graft
                    for name, graft in observing.items()
                    if graft.estimator.ready or name not in self._refreshed
                }
            tuners: dict[str, Any] = {name: model.get_submodule(name) for name in observing}
            add_up([(graft, tuners[name].get_base_layer()) for name, graft in observing.items()])
        for name, graft in observing.items():
            error = graft.take_error()
            if error is not None:
                errors[name] = error
                if self.config.target_error is not None:
                    aim(graft.estimator, error, self.config.target_error)
                self._monitor(name, error, step)
            graft.estimator.select()
            if graft.observed and not graft.estimator.ready:
                self.switch.say_once(
                    "nothing to select from",
                    f"by step {step}, {name} has seen no gradient to select from: they were zero, not finite, or "
                    "too small or too large for their squares. It stays exact until it sees one.",
                )
        if self.forward is not None and (error := self.forward.take_error()) is not None:
            errors[HEAD] = error
            self._monitor(HEAD, error, step)
        if self._due(step - 1):
            if self.forwards:
                self.forwards.end_refresh(step, next(self.parameters()).device)
            if self.config.most_error is not None:
                self._move(errors, step)
        self._refreshed |= observing.keys()
        self.agree(list(observing))
        if new := self._given_up - already:
            warnings.warn(
                f"celora: from step {step} on, {', '.join(sorted(new))} "
                f"{'is' if len(new) == 1 else 'are'} exact: the relative error was 1 or more at {TOO_OFTEN} refreshes "
                "in a row. Attach again, with a higher keep_ratio, to estimate again.",
                stacklevel=2,
            )
        if step == (min(self.config.refresh_every, _FIRST_ROUND) if self.config.spread else 1):
            if modes != {False}:
                self._check_passed_by()
            self._check_planned()
        self.set_modes(step)

    def _move(self, errors: dict[str, float], step: int) -> None:
        """Let layers keep more or less by what this refresh measured; all processes by the largest error of any."""
        names = [*self.grafts, HEAD]
        seen = largest_errors([errors.get(name) for name in names], next(self.parameters()).device)
        for name, error in zip(names, seen, strict=True):
            part: Any = self.forward if name == HEAD else self.grafts[name].estimator
            if error is not None and part is not None and name not in self.made_exact:
                keeps = self.ladder.move(name, part.keep_ratio, error, step)
                if name == HEAD or keeps < 1:  # an estimator whose layer becomes exact stays what it was
                    part.keep_ratio = keeps

    def agree(self, names: list[str]) -> None:
        """Make layers exact in all processes or in none where the weights are sharded: who gathers one waits for all.

        Collective, one reduction. Does nothing in a process of its own, and where all have observed the same.
        """
        if not names or self.config.synchronise or not shards(self.parameters()):
            return
        grafts, device = [self.grafts[name] for name in names], next(self.parameters()).device
        standing = [
            [self.over_bound.get(name, 0), not graft.estimator.ready, not graft.estimator.product.holds_copy]
            for name, graft in zip(names, grafts, strict=True)
        ]
        for name, graft, (times, awaited, lacking) in zip(names, grafts, largest_of_all(standing, device), strict=True):
            if times:
                self.over_bound[name] = times
            (self._awaited.add if awaited else self._awaited.discard)(name)
            if lacking:  # all make their 8-bit copy of the same gathered weight, or none does
                graft.estimator.product.forget()

    def _check_passed_by(self) -> None:
        """Say so if the first observations have seen no layer of some kind whose adapters have got a gradient."""
        model = self._model()
        kinds: dict[str, list[str]] = {}
        seen = set()
        for name, graft in self.grafts.items():
            tuner = None if model is None else model.get_submodule(name)
            if tuner is None or name not in self._refreshed:
                continue
            if not any(p.grad is not None and bool(p.grad.any()) for p in tuner.parameters()):
                continue
            kind = f"{type(tuner).__module__}.{type(tuner).__qualname__}"
            kinds.setdefault(kind, []).append(name)
            if graft.observed:
                seen.add(kind)
        for kind, names in kinds.items():
            if kind not in seen:
                warnings.warn(
                    f"celora: no backward came through the base layer of any {kind} ({len(names)} layers, first "
                    f"{names[0]!r}), so nothing is estimated there. Either something computes past its forward, or its "
                    "input needs no gradient.",
                    stacklevel=2,
                )

    def _check_planned(self) -> None:
        """Say so if the first observations were not of the kind of batches that the plan was made for."""
        seen = max(((graft.tokens, graft.dtype) for graft in self.grafts.values() if graft.observed), default=None)
        if self.plan is not None and seen is not None and (reason := self.plan.other_batches(*seen)):
            warnings.warn(f"celora: {reason}. Make a new plan.", stacklevel=2)

    def _monitor(self, name: str, error: float, step: int) -> None:
        """Keep the error, and notice where an estimate is none: convergence is only proven for errors below 1."""
        self.relative_errors[name] = error
        if error < 1:
            self.over_bound.pop(name, None)
            return
        self.over_bound[name] = self.over_bound.get(name, 0) + 1
        if self.over_bound[name] < TOO_OFTEN:
            other = "raise keep_ratio, refresh more often, or make this layer dense by an override"
            self.switch.say_once(
                "over the bound",
                f"at step {step} the relative error of {name} is {error:.2f}. Convergence is proven for errors below 1 "
                f"only; {'raise head_keep_ratio' if name == HEAD else other}. Layers whose error is no lower at "
                f"{TOO_OFTEN} refreshes in a row become exact.",
            )

    def _on_other_step(self) -> None:
        """Say so if the model is trained by an optimizer that holds other tensors than the model's parameters."""
        observations = sum(graft.observed for graft in self.grafts.values())
        # A model that has had no backward since is not what is being trained.
        if self.clock.step > 0 or observations > self._observations:
            self._observations = observations
            self.other_steps += 1
            if self.clock.step == 0 and self.other_steps == 3:
                warnings.warn(
                    "celora: three optimizer steps, none of a parameter of this model, so every backward is exact. If "
                    "the optimizer holds copies of the parameters, as DeepSpeed's does, give the Trainer "
                    "celora.Callback(), or call require(model).clock.advance() after each step (from "
                    "celora.runtime.attachment import require).",
                    stacklevel=2,
                )

    def _due(self, step: int) -> bool:
        """Whether something refreshes at this step by the clock alone, which is the same in all processes."""
        tau = self.config.refresh_every
        turns = any(step % tau == self._turn(i, tau) for i in range(len(self.grafts)))
        return step < _FIRST_ROUND or step % tau == 0 or turns or step == self._together

    def _turn(self, i: int, steps: int) -> int:
        """At which of so many steps layer i refreshes."""
        return i * steps // len(self.grafts) if self.config.spread and not self.switch.compiled else 0

    def set_modes(self, step: int) -> None:
        """Refresh at steps 0, tau, 2 tau, ..., and wherever a layer has nothing selected yet.

        With `spread`, layer i of n refreshes `i tau / n` steps later, and those that need a first observation get it in
        turns during the first steps, exact until then. Not so under torch.compile, which would make a graph for each
        turn: once that has been seen, all layers refresh at once, from that step on. With `most_error` all layers are
        measured in turns during the first steps. What was made exact stays so.
        """
        tau, made_exact = self.config.refresh_every, self.made_exact
        if self.config.spread and self.switch.compiled and self._together is None:
            self._together = step
        if self.forward is not None:
            due = step % tau == 0 or step == self._together
            self.forward.begin(step)
            self.forward.mode = Mode.EXACT if HEAD in made_exact else Mode.OBSERVE if due else Mode.ESTIMATE
        for i, (name, graft) in enumerate(self.grafts.items()):
            first = self._turn(i, min(tau, _FIRST_ROUND))
            if name in made_exact:
                graft.mode = Mode.EXACT
            elif not graft.estimator.ready or name in self._awaited:
                graft.mode = Mode.OBSERVE if step >= first else Mode.EXACT
            else:
                due = step % tau == self._turn(i, tau) or step == self._together
                due |= self.config.most_error is not None and step == first
                graft.mode = Mode.OBSERVE if due else Mode.ESTIMATE


def find(model: nn.Module) -> Attachment | None:
    """The attachment of `model`, wherever under it (or under its wrappers) `attach` was called."""
    return next((m.__dict__[ATTRIBUTE] for m in model.modules() if ATTRIBUTE in m.__dict__), None)


def require(model: nn.Module) -> Attachment:
    """`find`, or a CELoraError that says what to call."""
    attachment = find(model)
    if attachment is None:
        raise CELoraError("celora is not attached to this model; call celora.attach(model) first.")
    return attachment
