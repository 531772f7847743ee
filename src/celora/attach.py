"""Put estimators under the frozen layers of a PEFT model, take them off, and say what was skipped and why.

An `Attachment` belongs to one model instance and lives in that instance; the layers hold only their forward hook.
No class is touched, no module replaced, no state_dict key changed.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from celora import passes
from celora.bypass import own_product, refuse_patched
from celora.clock import StepClock
from celora.config import PRESETS, CELoraConfig, LayerConfig, balanced_rank, matches, resolve
from celora.errors import CELoraError
from celora.estimators import Dense, Estimator, estimator_class, make_estimator
from celora.forward import ModelGraft, find_language_model, install, remove
from celora.fused import Adapter, FusedGraft, Lender, vanilla_adapter
from celora.graft import LayerGraft, Mode, Switch
from celora.packing import cannot_pack
from celora.plan import HEAD, Plan
from celora.sharded import is_split
from celora.synchronise import add_up, from_first, gathers, largest_of_all, same_in_all, shards
from celora.timing import slower_than_float32
from celora.trial import tampered, unlike
from celora.weights import device_of, held, shape_of, trains

_ATTRIBUTE = "_celora"
_FIRST_ROUND = 10  # optimizer steps over which `spread` distributes the first observations
_TOO_OFTEN = 2  # refreshes in a row at which a relative error of 1 or more makes a layer exact
_HALF = (torch.bfloat16, torch.float16)
_EXACT_AT_1 = {("topk", "native"), ("sampled", "native")}
# A preset names the layers of common models; a model need not have all of them.
# Leaves out the tokens whose gradient is zero, and nothing else.
_LOSSLESS = LayerConfig("tokens", keep_ratio=1.0, rank=0, selection="energy")
_PRESET_PATTERNS = {pattern for preset in PRESETS.values() for pattern in preset.overrides}


@dataclass(frozen=True)
class LayerReport:
    """One frozen layer: what its backward is, at which cost relative to dense, and why if it is not estimated."""

    name: str
    out_features: int
    in_features: int
    estimator: str
    cost: float
    keep_ratio: float = 1.0
    rank: int = 0
    reason: str = ""
    selection: str = ""
    precision: str = "native"

    @property
    def label(self) -> str:
        """The estimator in words: `tokens (energy) x int8`."""
        how = f" ({self.selection})" if self.selection not in ("", "topk") else ""
        bits = f" x {self.precision}" if self.precision not in ("native", self.estimator) else ""
        return "dense, without zero tokens" if self._lossless else f"{self.estimator}{how}{bits}"

    @property
    def exact(self) -> bool:
        """Whether the gradient is the dense product's: computed as that, or without tokens whose gradient is zero."""
        return self.estimator == "dense" or self._lossless

    @property
    def _lossless(self) -> bool:
        names = "estimator", "keep_ratio", "rank", "selection", "precision"
        return all(getattr(self, name) == getattr(_LOSSLESS, name) for name in names)


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did, layer by layer. Prints as a table."""

    layers: tuple[LayerReport, ...]
    refresh_every: int
    notes: tuple[str, ...] = ()  # what else is done, what cannot be and why, and settings that cost time

    @property
    def estimated(self) -> dict[str, LayerReport]:
        """The layers whose backward is estimated, by name."""
        return {layer.name: layer for layer in self.layers if not layer.exact}

    @property
    def dense(self) -> dict[str, LayerReport]:
        """The layers left exact because the configuration says so."""
        return {layer.name: layer for layer in self.layers if layer.exact and not layer.reason}

    @property
    def skipped(self) -> dict[str, str]:
        """The layers that cannot be estimated, each with the reason."""
        return {layer.name: layer.reason for layer in self.layers if layer.reason}

    @property
    def cost(self) -> float:
        """FLOPs of all frozen `grad_input` products relative to exact LoRA, refresh steps apart."""
        size = [layer.out_features * layer.in_features for layer in self.layers]
        return sum(s * layer.cost for s, layer in zip(size, self.layers, strict=True)) / max(1, sum(size))

    def __str__(self) -> str:
        groups: dict[tuple[Any, ...], list[LayerReport]] = {}
        for layer in self.layers:
            kind = layer.name.rpartition(".")[2]
            key = (kind, layer.label, layer.keep_ratio, layer.rank, layer.reason, layer.out_features)
            groups.setdefault(key, []).append(layer)
        rows = [("layers", "", "shape", "estimator", "keep", "rank", "FLOPs / dense")]
        rows += [
            (kind, f"x{len(of)}", f"{of[0].out_features} x {of[0].in_features}", estimator, f"{keep:.4g}",
             str(rank), f"{of[0].cost:.2f}" + (f"  ({reason})" if reason else ""))
            for (kind, estimator, keep, rank, reason, _), of in groups.items()
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.estimated:
            summary = (
                f"{len(self.estimated)} of {len(self.layers)} frozen layers estimated; their products cost "
                f"{self.cost:.2f} of exact LoRA's FLOPs, refreshed every {self.refresh_every} optimizer steps."
            )
        else:
            summary = f"None of {len(self.layers)} frozen layers estimated: the gradient is exact LoRA's."
        return "\n".join([*lines, summary, *self.notes])


_attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()


class Attachment:
    """The estimators of one model and the clock that refreshes them.

    Attributes:
        relative_errors: of each layer's estimate, as measured at its latest refresh; `head` is the vocabulary
            projection's.
        over_bound: how many refreshes in a row, up to the latest, a layer's relative error was 1 or more.
        plan: what the configuration was made from, if it was.
    """

    def __init__(self, model: nn.Module, config: CELoraConfig, report: AttachReport) -> None:
        self.config = config
        self.report = report
        self.switch = Switch()
        self.grafts: dict[str, LayerGraft] = {}
        self.forward: ModelGraft | None = None
        self.relative_errors: dict[str, float] = {}
        self.over_bound: dict[str, int] = {}
        self.plan: Plan | None = None
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
        _attachments.add(self)

    @property
    def refreshes(self) -> int:
        """How many refresh steps have been finished."""
        return -(-self.clock.step // self.config.refresh_every)

    @property
    def made_exact(self) -> set[str]:
        """The layers whose estimate proved to be none, and which are exact from then on."""
        return {name for name, times in self.over_bound.items() if times >= _TOO_OFTEN}

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
        already = self.made_exact
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
                if self.config.target_error is not None:
                    graft.estimator.aim(error, self.config.target_error)
                self._monitor(name, error, step)
            graft.estimator.select()
            if graft.observed and not graft.estimator.ready:
                self.switch.say_once(
                    "nothing to select from",
                    f"by step {step}, {name} has seen no gradient to select from: they were zero, not finite, or "
                    "too small or too large for their squares. It stays exact until it sees one.",
                )
        if self.forward is not None and (error := self.forward.take_error()) is not None:
            self._monitor(HEAD, error, step)
        self._refreshed |= observing.keys()
        self.agree(list(observing))
        if new := self.made_exact - already:
            warnings.warn(
                f"celora: from step {step} on, {', '.join(sorted(new))} "
                f"{'is' if len(new) == 1 else 'are'} exact: the relative error was 1 or more at {_TOO_OFTEN} refreshes "
                "in a row. Attach again, with a higher keep_ratio, to estimate again.",
                stacklevel=2,
            )
        if step == (min(self.config.refresh_every, _FIRST_ROUND) if self.config.spread else 1):
            if modes != {False}:
                self._check_passed_by()
            self._check_planned()
        self.set_modes(step)

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
        if self.over_bound[name] < _TOO_OFTEN:
            other = "raise keep_ratio, refresh more often, or make this layer dense by an override"
            self.switch.say_once(
                "over the bound",
                f"at step {step} the relative error of {name} is {error:.2f}. Convergence is proven for errors below 1 "
                f"only; {'raise head_keep_ratio' if name == HEAD else other}. Layers whose error is no lower at "
                f"{_TOO_OFTEN} refreshes in a row become exact.",
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
                    "celora.Callback(), or call require(model).clock.advance() after each step (from celora.attach "
                    "import require).",
                    stacklevel=2,
                )

    def set_modes(self, step: int) -> None:
        """Refresh at steps 0, tau, 2 tau, ..., and wherever a layer has nothing selected yet.

        With `spread`, layer i of n refreshes `i tau / n` steps later, and those that need a first observation get it in
        turns during the first steps, exact until then. Not so under torch.compile, which would make a graph for each
        turn: once that has been seen, all layers refresh at once, from that step on. What was made exact stays so.
        """
        tau, layers, made_exact = self.config.refresh_every, len(self.grafts), self.made_exact
        spread = self.config.spread and not self.switch.compiled
        if self.config.spread and self.switch.compiled and self._together is None:
            self._together = step
        if self.forward is not None:
            due = step % tau == 0 or step == self._together
            self.forward.begin(step)
            self.forward.mode = Mode.EXACT if HEAD in made_exact else Mode.OBSERVE if due else Mode.ESTIMATE
        for i, (name, graft) in enumerate(self.grafts.items()):
            first = i * min(tau, _FIRST_ROUND) // layers if spread else 0
            if name in made_exact:
                graft.mode = Mode.EXACT
            elif not graft.estimator.ready or name in self._awaited:
                graft.mode = Mode.OBSERVE if step >= first else Mode.EXACT
            else:
                due = step % tau == (i * tau // layers if spread else 0) or step == self._together
                graft.mode = Mode.OBSERVE if due else Mode.ESTIMATE


def attach(
    model: nn.Module,
    config: str | CELoraConfig | Plan = "paper",
    *,
    batches: Iterable[Mapping[str, Any]] | None = None,
    **changes: Any,
) -> AttachReport:
    """Estimate the backward of the frozen layers under `model`'s PEFT adapters.

    The forward stays exact, and so does what is saved: an ordinary adapter. Attaching the same configuration
    again changes nothing; another one replaces the first. Nothing else has to be called: the clock counts the
    optimizer's steps by itself.

    Args:
        model: a PEFT model, or any module that contains PEFT tuner layers. Not merged.
        config: a preset (`"auto"`, `"exact"`, `"paper"`, `"off"`), a `CELoraConfig`, or a `Plan`.
        batches: for `"auto"`, which measures before it chooses: a few batches as training will see them.
        **changes: of the configuration's fields that concern all layers: `labelled_head=False` keeps `outputs.logits`
            while training, `padding_free=False` the padding, `refresh_every=50` refreshes more often. Plans are made
            without padding and logits.

    Returns:
        What is estimated with what, and which layers are not and why. Printed, it is a table.

    Of several processes that train together all call this; with `"auto"`, all take the plan of the first.

    Raises:
        CELoraError: unknown preset or field, no adapters, merged adapters, a model patched by Unsloth, a rank larger
            than a layer, a plan for another model or device, `"auto"` without batches, or processes of a sharded model
            that give different configurations.
    """
    tuners = tuner_layers(model)
    if config == "auto":
        resolve(config, changes)  # a mistake is to be known before anything is measured
        from celora.planner import make_plan

        if batches is None:
            raise CELoraError(
                "preset 'auto' measures before it chooses: give batches=, a few batches as training will see them."
            )
        config = Plan.from_dict(from_first(make_plan(model, batches).to_dict()))
    plan = config if isinstance(config, Plan) else None
    if isinstance(config, Plan):
        config.check(model)
        config = config.config()
    config = resolve(config, changes)
    if gathers(model) and not same_in_all(config.to_dict()):
        raise CELoraError(
            "the processes attach different configurations, and would wait for each other for ever; a plan has to be "
            "made by one of them, for all."
        )
    for pattern in _unmatched(config, tuners):
        warnings.warn(f"celora: the override {pattern!r} matches no adapted layer", stacklevel=2)

    last = _last_block(tuners) if config.zero_tokens else set()
    planned = [_plan_layer(name, module, config, last=name in last) for name, module in tuners.items()]
    slow = {of.product.slow(of.device) for _, of in planned if of is not None} - {""}
    known = passes.known(model) if config.fused else {}
    notes = (
        *_whole_model(model, tuners, config, known.values()),
        *advice(model, tuners, config),
        *(f"Dense layers are faster here: {reason}." for reason in sorted(slow)),
    )
    report = AttachReport(tuple(layer for layer, _ in planned), config.refresh_every, notes)
    existing = find(model)
    if existing is not None and existing.report.layers == report.layers and existing.config == config:
        existing.report = report
        return report
    detach(model)

    attachment = Attachment(model, config, report)
    attachment.plan = plan
    for layer, estimator in planned:
        graft = _graft_layer(tuners[layer.name], estimator, attachment.switch, fused=config.fused)
        if graft is not None:
            graft.name = layer.name
        if estimator is not None and graft is not None:
            attachment.grafts[layer.name] = graft
            weight = held(tuners[layer.name].get_base_layer())
            if weight is not None and _at_hand(weight, layer):
                estimator.prepare(weight)  # else at the first refresh
    for module, kind in known.items():
        kind(attachment.switch).under(module)
    causal, tuner, _ = find_language_model(model)
    if config.labelled_head and causal is not None:
        packs = config.padding_free and not cannot_pack(causal)
        attachment.forward = install(
            causal, tuner, attachment.switch, packs=packs, keep_ratio=config.head_keep_ratio, seed=config.seed
        )
    attachment.set_modes(0)
    model.__dict__[_ATTRIBUTE] = attachment
    if not attachment.grafts and (report.skipped or config.overrides):
        warnings.warn(
            "celora: no layer can be estimated; training is plain PEFT. Print the report for the reasons.",
            stacklevel=2,
        )
    return report


def detach(model: nn.Module) -> None:
    """Take celora off `model`: every hook and attribute that `attach` added. Does nothing where there is none.

    An attachment made from a wrapper around `model`, or from a model that shares adapted layers with it, ends whole.
    """
    modules = set(model.modules())
    adapted = {module for module in modules if isinstance(module, BaseTunerLayer)}
    for attachment in list(_attachments):
        others = set(attachment.modules())
        if adapted.isdisjoint(others):
            continue
        modules |= others
        if left := sum(isinstance(module, BaseTunerLayer) for module in others - adapted):
            warnings.warn(
                f"celora: an attachment to a larger model ends; {left} other layers of it are plain PEFT's again.",
                stacklevel=2,
            )
    for module in modules:
        attachment = module.__dict__.pop(_ATTRIBUTE, None)
        if attachment is not None:
            attachment.close()
        remove(module)


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The PEFT layers of `model` by name; CELoraError if there are none, or if they cannot train or be estimated."""
    tuners = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not tuners:
        adapters = getattr(model, "peft_config", None)
        if prompts := [of.peft_type.value for of in (adapters or {}).values() if of.is_prompt_learning]:
            raise CELoraError(f"{prompts[0]} adapts no layer, so there is no backward to estimate; use LoRA.")
        raise CELoraError(
            f"no PEFT layers in {type(model).__name__}; add an adapter first: "
            "model = peft.get_peft_model(model, LoraConfig(...))."
        )
    merged = [name for name, module in tuners.items() if module.merged]
    if merged:
        raise CELoraError(
            f"the adapter is merged into its base ({len(merged)} layers, first {merged[0]!r}), so it cannot train; "
            "call model.unmerge_adapter() first."
        )
    refuse_patched(model)
    return tuners


def find(model: nn.Module) -> Attachment | None:
    """The attachment of `model`, wherever under it (or under its wrappers) `attach` was called."""
    return next((m.__dict__[_ATTRIBUTE] for m in model.modules() if _ATTRIBUTE in m.__dict__), None)


def require(model: nn.Module) -> Attachment:
    """`find`, or a CELoraError that says what to call."""
    attachment = find(model)
    if attachment is None:
        raise CELoraError("celora is not attached to this model; call celora.attach(model) first.")
    return attachment


def _last_block(names: Iterable[str]) -> set[str]:
    """The layers of the last decoder block: those with the highest number in their names."""
    numbers = {name: next((int(part) for part in name.split(".") if part.isdigit()), -1) for name in names}
    highest = max(numbers.values(), default=-1)
    return {name for name, number in numbers.items() if number == highest >= 0}


def _plan_layer(
    name: str, module: BaseTunerLayer, config: CELoraConfig, *, last: bool = False
) -> tuple[LayerReport, Estimator | None]:
    base, reason = module.get_base_layer(), cannot_estimate(module)
    out_features, in_features = shape_of(base)
    if reason:
        return LayerReport(name, out_features, in_features, "dense", 1.0, reason=reason), None
    setting = config.for_layer(name)
    # On accelerators tokens are not counted but taken by the share of the latest refresh: too few, some time.
    if last and setting.estimator == "dense" and device_of(base).type == "cpu":
        setting = _LOSSLESS
    kind = estimator_class(setting.estimator)
    exact = setting.keep_ratio == 1 and (setting.selection, setting.precision) in _EXACT_AT_1
    if setting.estimator == "dense" or (exact and "keep_ratio" in kind.uses):
        return LayerReport(name, out_features, in_features, "dense", 1.0), None
    rank = _rank(name, module, setting) if "rank" in kind.uses else 0
    # Layers that drew the same numbers would not be independent, and unbiased estimates not unbiased through depth.
    seed = zlib.crc32(f"{config.seed} {name}".encode())
    chosen: dict[str, Any] = dataclasses.asdict(setting) | {"rank": rank, "seed": seed}
    try:
        estimator = make_estimator(setting.estimator, out_features, in_features, chosen)
    except CELoraError as error:
        raise CELoraError(f"layer {name!r}: {error}") from None
    if config.synchronise and setting.factor == "gradient" and rank:
        raise CELoraError(
            f"layer {name!r}: synchronise=True beside a gradient factor, which each process makes of its own "
            "gradients; use factor='svd' or rank=0."
        )
    estimator.agreed, estimator.device = config.synchronise, device_of(base)
    if reason := estimator.product.unavailable(out_features, in_features, device_of(base)):
        return LayerReport(name, out_features, in_features, "dense", 1.0, reason=reason), None
    selected = "keep_ratio" in kind.uses
    report = LayerReport(
        name,
        out_features,
        in_features,
        estimator.name,
        estimator.cost,
        setting.keep_ratio if selected else 1.0,
        rank,
        selection=setting.selection if selected else "",
        precision=estimator.settings.precision,
    )
    return report, estimator


def _at_hand(weight: Tensor, layer: LayerReport) -> bool:
    """Whether the weight is here already, whole: not sharded, nor left out until a launcher puts it in place."""
    whole = weight.shape == (layer.out_features, layer.in_features)
    return whole and not weight.is_meta and not isinstance(weight, DTensor)


def cannot_estimate(module: BaseTunerLayer) -> str:
    """Why the backward of this PEFT layer's base is not `grad_output @ read(base)`, or ''."""
    base = module.get_base_layer()
    split = "it is split by tensor parallelism" if is_split(base) else ""
    trained = "its weight is trained" if trains(base) else ""
    return own_product(module) or split or tampered(base) or trained or unlike(base) or ""


def _graft_layer(
    module: BaseTunerLayer, estimator: Estimator | None, switch: Switch, *, fused: bool
) -> LayerGraft | None:
    """Hook one layer: its base for the estimate and, fused, its adapter too. None if there is nothing to do."""
    base = module.get_base_layer()
    if not (fused and fuses(module)):
        graft = None if estimator is None else LayerGraft(estimator, switch)
    else:
        graft = FusedGraft(estimator or Dense(*shape_of(base)), switch)
        lender = Lender(graft)
        module.register_forward_pre_hook(lender.before, with_kwargs=True)
        module.register_forward_hook(lender.after, always_call=True)
        if estimator is None:
            graft.mode = Mode.EXACT
    if graft is not None:
        graft.under(base)
    return graft


def fuses(module: BaseTunerLayer) -> bool:
    """Whether the layer's adapter can be computed together with its base layer."""
    return not cannot_estimate(module) and isinstance(vanilla_adapter(module), Adapter)


def _whole_model(
    model: nn.Module,
    tuners: Mapping[str, BaseTunerLayer],
    config: CELoraConfig,
    known: Collection[type[passes.Pass]],
) -> list[str]:
    """What is done to the model beside its estimates, and why where something is not."""
    notes = []
    if config.fused:
        own = [m for m in tuners.values() if not fuses(m)]
        first = (cannot_estimate(own[0]) or vanilla_adapter(own[0])) if own else ""
        rest = f"; PEFT's own path in {len(own)}: {first}" if own else ""
        notes.append(f"LoRA fused with its base layer in {len(tuners) - len(own)} of {len(tuners)} layers{rest}.")
    if known:
        counts = Counter(kind.name for kind in known)
        notes.append(f"On CPU, in one pass each: {', '.join(f'{n} {name}' for name, n in counts.items())}.")
    if config.labelled_head:
        causal, _, reason = find_language_model(model)
        share = "" if config.head_keep_ratio == 1 else f", its gradient through {config.head_keep_ratio:g} of the words"
        notes.append(
            f"The model's own loss: {reason}."
            if causal is None
            else f"Loss over labelled tokens only{share}, without outputs.logits (which labelled_head=False keeps)."
        )
        if config.padding_free and causal is not None:
            reason = cannot_pack(causal)
            notes.append(f"Padding stays: {reason}." if reason else "Padding left out of training batches.")
    return notes


def advice(model: nn.Module, tuners: Mapping[str, BaseTunerLayer], config: CELoraConfig) -> list[str]:
    """The user's own settings that cost time."""
    found = []
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        found.append("Gradient checkpointing computes every forward twice; it is faster without, if memory allows.")
    for module in tuners.values():
        dropouts = getattr(module, "lora_dropout", {})
        rates = {getattr(dropouts[name], "p", 0.0) for name in module.active_adapters if name in dropouts}
        if rates - {0.0}:
            found.append(f"lora_dropout={max(rates):g} draws and keeps a mask in every layer; 0 is faster.")
            if len(getattr(module, "lora_magnitude_vector", ())):
                found.append("DoRA with dropout computes each base layer twice, and only once of it is estimated.")
            break
    for module in tuners.values():
        kind = getattr(getattr(module.get_base_layer(), "weight", None), "dtype", None)
        A = getattr(module, "lora_A", {})
        kinds = {getattr(A[name], "weight", A[name]).dtype for name in module.active_adapters if name in A}
        if kind in _HALF and torch.float32 in kinds and not (config.fused and fuses(module)):
            found.append(
                f"float32 adapters on a {str(kind).removeprefix('torch.')} base cast every activation twice; "
                "presets exact, paper and auto do not, nor does get_peft_model(..., autocast_adapter_dtype=False)."
            )
            break
    weights = [weight for module in tuners.values() if (weight := held(module.get_base_layer())) is not None]
    for dtype, device in {(weight.dtype, weight.device): None for weight in weights}:
        if device.type == "cpu" and dtype in _HALF and slower_than_float32(dtype, device):
            name = str(dtype).removeprefix("torch.")
            found.append(
                f"This CPU takes longer for {name} products than for float32 ones: load with dtype=float32, which "
                "takes twice the memory."
            )
    return found


def _rank(name: str, module: BaseTunerLayer, setting: LayerConfig) -> int:
    if isinstance(setting.rank, int):
        return setting.rank
    ranks = getattr(module, "r", None)
    if not isinstance(ranks, dict) or not ranks:
        raise CELoraError(
            f"rank={setting.rank!r} for {name!r}, a {type(module).__name__} without a LoRA rank; give an integer."
        )
    adapter = next((a for a in module.active_adapters if a in ranks), next(iter(ranks)))
    lora_rank = int(ranks[adapter])
    rank = lora_rank if setting.rank == "adapter" else balanced_rank(lora_rank)
    return min(rank, *shape_of(module.get_base_layer()))


def _unmatched(config: CELoraConfig, names: Collection[str]) -> list[str]:
    """The user's own overrides that name no layer."""
    own = [pattern for pattern in config.overrides if pattern not in _PRESET_PATTERNS]
    return [pattern for pattern in own if not any(matches(pattern, name) for name in names)]
