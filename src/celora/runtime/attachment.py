"""The estimators of one model and the clock that refreshes them."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from celora.errors import CELoraError
from celora.machine.processes import largest_of_all, shards
from celora.modeling.graft import LayerGraft
from celora.modeling.model_graft import ModelGraft
from celora.modeling.report import AttachReport
from celora.modeling.switch import Mode, Switch
from celora.numerics.products.base import Product
from celora.runtime.agreement import add_up, largest_errors
from celora.runtime.clock import StepClock
from celora.runtime.forwards import Forwards
from celora.runtime.ladder import Ladder
from celora.runtime.target_error import aim
from celora.settings.config import CELoraConfig
from celora.settings.names import HEAD

ATTRIBUTE = "_celora"
FIRST_ROUND = 10  # optimizer steps over which `spread` distributes the first observations
_TURNS = 20  # of `spread` in a period: no layer refreshes in the steps between them
TOO_OFTEN = 2  # after so many refreshes in a row with a relative error of 1 or more, a layer becomes exact
attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()


class Attachment:
    """The estimators of one model and the clock that refreshes them.

    Attributes:
        relative_errors: the relative error of each layer at its latest refresh; `head` is the vocabulary projection.
        over_bound: for each layer, how many of the latest refreshes in a row had a relative error of 1 or more.
        forward: the graft of the whole language model; None where the model computes its own loss.
        forwards: the forwards in 8 bits of single layers and of the head.
        ladder: the changes that refreshes made to what layers keep (`most_error` of the configuration).
        for_a_training: whether an integration made it. A training that is interrupted does not detach it.
        timed: whether the configuration is preset `auto` or `fast` as times on this machine have settled it.
    """

    for_a_training = timed = False

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
        self.other_steps = 0  # steps of optimizers without any parameter of the model
        self._observations = 0  # observations before the latest such step
        self._refreshed: set[str] = set()  # layers that should have observed a gradient, even if none came
        self._awaited: set[str] = set()  # layers for which another process has no selection yet
        self._together: int | None = None  # from this step on, layers no longer refresh in turns
        self._bind(model, step=0)
        self._chosen_on = self._device().type

    def _bind(self, model: nn.Module, step: int) -> None:
        # Weak, because the model refers to this object. A cycle would keep a deleted model in memory until collection.
        self._model = weakref.ref(model)
        self.clock = StepClock(self.parameters, self._on_step, self._on_other_step, step=step)
        self.clock.start()
        attachments.add(self)

    @property
    def first_steps(self) -> int:
        """After how many steps every layer has been measured. Forwards in 8 bits are, again, with their scales."""
        return FIRST_ROUND * (2 if self.forwards else 1)

    @property
    def refreshes(self) -> int:
        """How many refresh steps are finished."""
        return -(-self.clock.step // self.config.refresh_every)

    @property
    def made_exact(self) -> set[str]:
        """The layers that became exact because their error was too large."""
        return self._given_up | self.ladder.exact

    @property
    def _given_up(self) -> set[str]:
        return {name for name, times in self.over_bound.items() if times >= TOO_OFTEN}

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over the modules of the attached model; empty once the model is gone."""
        model = self._model()
        return iter(()) if model is None else model.modules()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters of the attached model that train; none once the model is gone."""
        model = self._model()
        return iter(()) if model is None else (p for p in model.parameters() if p.requires_grad)

    def _device(self) -> torch.device:
        """Where processes compare what each has seen."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def report(self) -> AttachReport:
        """What `attach` did, and which forwards in 8 bits have become exact since."""
        exact = self.forwards.made_exact
        if not exact:
            return self._report
        said = f"{len(exact)} of {len(self.forwards)} forwards in 8 bits are exact again, because of their error."
        return dataclasses.replace(self._report, notes=(*self._report.notes, said))

    @report.setter
    def report(self, report: AttachReport) -> None:
        self._report = report

    def grafted(self) -> dict[str, Any]:
        """The PEFT layers that still have their graft, by the name that the graft has.

        A user may have removed or merged layers, or put a module around them, since `attach`.
        """
        tuners = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]
        hooks = ((hook, tuner) for tuner in tuners for hook in tuner.get_base_layer()._forward_hooks.values())
        there = {id(hook): tuner for hook, tuner in hooks}
        return {name: there[id(graft)] for name, graft in self.grafts.items() if id(graft) in there}

    def close(self) -> None:
        """Stop the clock. From now on, layers that still have a graft compute the exact backward."""
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

    def products(self) -> Iterator[Product]:
        """The products of all layers, and the head's."""
        yield from (graft.estimator.product for graft in self.grafts.values())
        if self.forward is not None and self.forward.eight_bit is not None:
            yield self.forward.eight_bit.product

    def forget_copies(self) -> None:
        """Make all 8-bit copies of weights anew."""
        for product in self.products():
            product.forget()

    @torch.no_grad()
    def _on_step(self, step: int) -> None:
        """If the finished step was a refresh, end it. Then set every layer's mode for step `step`."""
        already, errors = self._given_up, dict[str, float]()
        modes = set(self.switch.modes)
        self.switch.modes.clear()
        self.switch.name_the_rest()
        if modes == {False} and not self.switch.compiled:
            self.switch.say_once(
                "eval",
                "this model trains in eval mode, where celora leaves forward and backward to PEFT; call model.train().",
            )
        self.switch.step = step  # so that the next forwards look whether weights have changed in place
        of_head = HEAD in self.forwards and self.forwards[HEAD].product
        for product in self.products():
            if self.switch.compiled or product is of_head:  # a graph does not look
                product.notice()
        observing = {name: graft for name, graft in self.grafts.items() if graft.mode is Mode.OBSERVE}
        if self.config.synchronise:
            if (step - 1) % self.config.refresh_every:  # so that a layer without gradients does not ask at every step
                observing = {
                    name: graft
                    for name, graft in observing.items()
                    if graft.estimator.ready or name not in self._refreshed
                }
            bases = {name: tuner.get_base_layer() for name, tuner in self.grafted().items()}
            add_up([(graft, bases[name]) for name, graft in observing.items() if name in bases])
        for name, graft in observing.items():
            if (error := graft.take_error()) is not None:
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
                self.forwards.end_refresh(step, self._device())
            if self.config.most_error is not None:
                self._move(errors, step)
        self.forwards.keep_up()
        self._refreshed |= observing.keys()
        self.agree(list(observing))
        if new := self._given_up - already:
            warnings.warn(
                f"celora: from step {step} on, {', '.join(sorted(new))} "
                f"{'is' if len(new) == 1 else 'are'} exact: the relative error was 1 or more at {TOO_OFTEN} refreshes "
                "in a row. Attach again, with a higher keep_ratio, to estimate again.",
                stacklevel=2,
            )
        if step == (min(self.config.refresh_every, FIRST_ROUND) if self.config.spread else 1):
            if modes != {False} and not self.switch.astray:
                self._check_passed_by()
            self._check_chosen()
        self.set_modes(step)

    def _move(self, errors: dict[str, float], step: int) -> None:
        """Make layers exact and the head keep more, by the largest error of any process at this refresh."""
        names = [*self.grafts, HEAD]
        seen = largest_errors([errors.get(name) for name in names], self._device())
        for name, error in zip(names, seen, strict=True):
            part: Any = self.forward if name == HEAD else self.grafts[name].estimator
            if error is not None and part is not None and name not in self.made_exact:
                keeps = self.ladder.move(name, part.keep_ratio, error, step)
                if name == HEAD:  # the estimator of a layer that becomes exact is not changed
                    part.keep_ratio = keeps

    def agree(self, names: list[str]) -> None:
        """With sharded weights, make a layer exact in every process or in none.

        A process that gathers alone would wait for ever. Collective, with one reduction. Does nothing in a single
        process, or if all processes have observed the same.
        """
        if not names or self.config.synchronise or not shards(self.parameters()):
            return
        grafts, device = [self.grafts[name] for name in names], self._device()
        standing = [
            [self.over_bound.get(name, 0), not graft.estimator.ready, not graft.estimator.product.holds_copy]
            for name, graft in zip(names, grafts, strict=True)
        ]
        for name, graft, (times, awaited, lacking) in zip(names, grafts, largest_of_all(standing, device), strict=True):
            if times:
                self.over_bound[name] = times
            (self._awaited.add if awaited else self._awaited.discard)(name)
            if lacking:  # either all processes make their 8-bit copy of the gathered weight, or none
                graft.estimator.product.forget()

    def _check_passed_by(self) -> None:
        """Warn if adapters of some kind of layer got gradients, but none of their base layers was observed.

        A layer whose input needs no gradient has none to observe: q, k and v of the first block, usually.
        """
        kinds: dict[str, list[str]] = {}
        seen = set()
        for name, tuner in self.grafted().items():
            graft = self.grafts[name]
            if name not in self._refreshed or graft.needed is False:
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

    def _check_chosen(self) -> None:
        """Warn if the model was moved since `attach`."""
        if self.grafts and self._chosen_on not in (here := self._device().type, "meta"):
            warnings.warn(
                f"celora: this model was on {self._chosen_on} when celora was attached and trains on {here}, but its "
                f"estimates were chosen for {self._chosen_on}. Attach after the model is moved: a Trainer moves it.",
                stacklevel=2,
            )

    def _monitor(self, name: str, error: float, step: int) -> None:
        """Record a layer's error. Warn if it is 1 or more: convergence is only proven for errors below 1."""
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
        """Warn if the model seems to be trained by an optimizer of other tensors than its parameters."""
        observations = sum(graft.observed for graft in self.grafts.values())
        # If the model had no backward since then, another model is being trained.
        if self.clock.step > 0 or observations > self._observations:
            self._observations = observations
            self.other_steps += 1
            if self.clock.step == 0 and self.other_steps == 3:
                warnings.warn(
                    "celora: three optimizer steps, none of a parameter of this model, so no layer refreshes. If "
                    "the optimizer holds copies of the parameters, as DeepSpeed's does, give the Trainer "
                    "celora.Callback(), or call require(model).clock.advance() after each step (from "
                    "celora.runtime.attachment import require).",
                    stacklevel=2,
                )

    def _due(self, step: int) -> bool:
        """Whether some layer refreshes at this step by the clock. All processes have the same answer."""
        tau = self.config.refresh_every
        turns = any(step % tau == self._turn(i, tau) for i in range(len(self.grafts)))
        return step < self.first_steps or step % tau == 0 or turns or step == self._together

    def _turn(self, i: int, steps: int) -> int:
        """At which of `steps` steps layer i refreshes."""
        turns = min(steps, _TURNS) if self.config.spread and not self.switch.compiled else 1
        return i * turns // len(self.grafts) * steps // turns

    def set_modes(self, step: int, *, together: bool = False) -> None:
        """Set every layer's mode, and how activations are saved. `together`: all layers refresh at this step.

        Layers refresh at steps 0, tau, 2 tau, ... A layer without a selection goes on refreshing if its input needs a
        gradient. With `spread`, layers take at most 20 turns between two of these steps. Layers that need a first
        observation get it in turns during the first steps, and are exact until then. With `most_error`, all layers are
        measured in turns during the first steps. So are layers with a forward in 8 bits, which learns the scales of its
        input then, and once more in the steps that follow, with these scales. Layers of one module refresh together
        there: those that share an input only share scales of the same batches. Layers made exact stay exact.
        torch.compile would make a graph for each turn. So once layers have run compiled, all of them refresh at once.
        """
        self.switch.ends_with(self.modules)
        tau, made_exact = self.config.refresh_every, self.made_exact
        # A base in 8 bits is chosen to save memory. Its forward's errors are larger than those of what is saved so.
        self.switch.compact = self.forwards.read_stored_bytes
        if together or (self.config.spread and self.switch.compiled and self._together is None):
            self._together = step
        if self.forward is not None:
            due = step % tau == 0 or step == self._together
            self.forward.begin(step)
            self.forward.mode = Mode.EXACT if HEAD in made_exact else Mode.OBSERVE if due else Mode.ESTIMATE
            if (head := self.forward.eight_bit) is not None:
                # Its first steps show whether it needs scales, and if they are enough.
                head.watches = due or step < FIRST_ROUND
        firsts: dict[str, int] = {}  # the first layer of each module
        for i, (name, graft) in enumerate(self.grafts.items()):
            if name in self.forwards:
                i = firsts.setdefault(name.rpartition(".")[0], i)
            first = self._turn(i, min(tau, FIRST_ROUND))
            if name in made_exact:
                graft.mode = Mode.EXACT
                continue
            due = step % tau == self._turn(i, tau) or step == self._together
            if not graft.estimator.ready or name in self._awaited:
                # An input that needs no gradient may need one later. To look at every step would cost.
                graft.mode = Mode.OBSERVE if due or (step >= first and graft.needed is not False) else Mode.EXACT
            else:
                due |= step == first and (self.config.most_error is not None or name in self.forwards)
                due |= step == first + FIRST_ROUND and name in self.forwards  # now with scales
                graft.mode = Mode.OBSERVE if due else Mode.ESTIMATE


def find(model: nn.Module) -> Attachment | None:
    """The attachment of `model`, or None. `attach` may have been called on a part of it, or on what it wraps."""
    return next((m.__dict__[ATTRIBUTE] for m in model.modules() if ATTRIBUTE in m.__dict__), None)


def require(model: nn.Module) -> Attachment:
    """Like `find`, but raises CELoraError if celora is not attached."""
    attachment = find(model)
    if attachment is None:
        raise CELoraError("celora is not attached to this model; call celora.attach(model, 'auto') first.")
    return attachment
