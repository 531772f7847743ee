"""Put estimators under the frozen layers of a PEFT model, take them off, and say what was skipped and why.

An `Attachment` belongs to one model instance and lives in that instance; the layers hold only their forward hook.
No class is touched, no module replaced, no state_dict key changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from celora.errors import CELoraError
from celora.machine.processes import from_first, gathers, same_in_all
from celora.modeling.assign import choose_estimator, last_block
from celora.modeling.fused import FusedGraft
from celora.modeling.graft import LayerGraft
from celora.modeling.hooks import remove
from celora.modeling.language_model import find_language_model
from celora.modeling.model_graft import install
from celora.modeling.packing import cannot_pack
from celora.modeling.passes import known as passes
from celora.modeling.report import AttachReport, LayerReport
from celora.modeling.survey import fuses, tuner_layers
from celora.modeling.switch import Mode, Switch
from celora.numerics.estimators import Dense, Estimator
from celora.planning.plan import Plan
from celora.runtime.attachment import ATTRIBUTE, Attachment, attachments, find
from celora.runtime.notes import advice, whole_model_notes
from celora.settings.config import CELoraConfig, matches
from celora.settings.presets import PRESETS, resolve
from celora.weights.read import held, shape_of

_PRESET_PATTERNS = {pattern for preset in PRESETS.values() for pattern in preset.overrides}


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
        from celora.planning.planner import make_plan

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

    last = last_block(tuners) if config.zero_tokens else set()
    planned = [choose_estimator(name, module, config, last=name in last) for name, module in tuners.items()]
    slow = {of.product.slow(of.device) for _, of in planned if of is not None} - {""}
    known = passes.known(model) if config.fused else {}
    notes = (
        *whole_model_notes(model, tuners, config, known.values()),
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
    model.__dict__[ATTRIBUTE] = attachment
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
    for attachment in list(attachments):
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
        attachment = module.__dict__.pop(ATTRIBUTE, None)
        if attachment is not None:
            attachment.close()
        remove(module)


def _at_hand(weight: Tensor, layer: LayerReport) -> bool:
    """Whether the weight is here already, whole: not sharded, nor left out until a launcher puts it in place."""
    whole = weight.shape == (layer.out_features, layer.in_features)
    return whole and not weight.is_meta and not isinstance(weight, DTensor)


def _graft_layer(
    module: BaseTunerLayer, estimator: Estimator | None, switch: Switch, *, fused: bool
) -> LayerGraft | None:
    """Hook one layer: its base for the estimate and, fused, its adapter too. None if there is nothing to do."""
    base = module.get_base_layer()
    if not (fused and fuses(module)):
        graft = None if estimator is None else LayerGraft(estimator, switch)
    else:
        graft = FusedGraft(estimator or Dense(*shape_of(base)), switch)
        graft.over(module)
        if estimator is None:
            graft.mode = Mode.EXACT
    if graft is not None:
        graft.under(base)
    return graft


def _unmatched(config: CELoraConfig, names: Collection[str]) -> list[str]:
    """The user's own overrides that name no layer."""
    own = [pattern for pattern in config.overrides if pattern not in _PRESET_PATTERNS]
    return [pattern for pattern in own if not any(matches(pattern, name) for name in names)]
