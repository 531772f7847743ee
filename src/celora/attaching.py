"""Attach celora to a PEFT model, and detach it.

`attach` surveys the model, settles the configuration, chooses an estimator for each layer, hooks the layers, the
modules between them and the head, and reports it all. An `Attachment` belongs to one model, which stores it. No class
is touched, no module is replaced, and no key of a state_dict changes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from celora.errors import CELoraError
from celora.machine.processes import gathers, same_in_all
from celora.modeling.assign import choose_estimator, last_block
from celora.modeling.eight_bit import EightBitForward
from celora.modeling.float_forward import FloatForward, other_layers, weight_for
from celora.modeling.fused import FusedGraft
from celora.modeling.graft import LayerGraft
from celora.modeling.hooks import remove
from celora.modeling.language_model import check_module
from celora.modeling.left_padding import OwnLoss
from celora.modeling.model_graft import install
from celora.modeling.own_forward import OwnForward, may_be_copied
from celora.modeling.passes import known as passes
from celora.modeling.report import AttachReport, LayerReport
from celora.modeling.survey import AdaptedLayer, Survey, survey
from celora.modeling.switch import Mode
from celora.numerics.estimators import Dense, Estimator
from celora.runtime.attachment import ATTRIBUTE, Attachment, attachments, find
from celora.runtime.notes import advice, whole_model_notes
from celora.settings.config import CELoraConfig, matches
from celora.settings.names import HEAD
from celora.settings.presets import PRESETS, resolve, ruled
from celora.weights.read import plain_weight


def attach(model: nn.Module, config: str | CELoraConfig = "auto", **changes: Any) -> AttachReport:
    """Estimate the backward of the frozen layers under `model`'s PEFT adapters.

    The forward stays exact, unless `forward="int8"` (preset `fast`). Saving the model gives an ordinary adapter.
    Attaching the same configuration again changes nothing; another configuration replaces the first. Nothing else has
    to be called: celora counts the optimizer's steps.

    Args:
        model: a PEFT model, or any module that contains PEFT tuner layers. Not merged.
        config: a preset (`"auto"`, `"fast"`, `"exact"`, `"paper"`, `"off"`), or a `CELoraConfig`. `"auto"` begins
            with a rule, and its refreshes adjust the rule.
        **changes: fields of the configuration that concern all layers. `labelled_head=False` keeps `outputs.logits`
            while training, `padding_free=False` keeps the padding, `refresh_every=50` refreshes more often.

    Returns:
        How each layer is estimated, or why it is not. Printed, it is a table.

    If several processes train together, all of them must call this. With `"auto"` and `"fast"`, all use what the first
    process measures.

    Raises:
        CELoraError: unknown preset or field, no adapters, merged adapters, a model patched by Unsloth, a rank larger
            than a layer, or processes of a sharded model that give different configurations.
    """
    found, timed = survey(model), config in ("auto", "fast")
    config = _settled(found, config, changes)
    assigned = _assign(found, config)
    exact_head = config.exact_head or found.language_model is None
    report = AttachReport(tuple(layer for layer, _ in assigned.values()), config.refresh_every, exact_head=exact_head)
    attachment = find(model)
    same = attachment is not None and attachment.report.layers == report.layers and attachment.config == config
    if attachment is not None and same and attachment.grafted().keys() == attachment.grafts.keys():
        attachment.forget_copies()
    else:
        detach(model)
        attachment = Attachment(model, config, report)
        for name, (_, estimator) in assigned.items():
            _graft_layer(found.layers[name], estimator, attachment)
        for module, kind in _passes(attachment, model).items():
            kind(attachment.switch).under(module)
        if (config.fused or attachment.grafts) and not may_be_copied():  # preset off changes nothing
            for module in other_layers(model):
                FloatForward(attachment.switch).under(module)
        if config.labelled_head and found.language_model is not None:
            attachment.forward = install(found.language_model, attachment.switch, config)
            if attachment.forward.eight_bit is not None:
                attachment.forwards[HEAD] = attachment.forward.eight_bit
        elif attachment.grafts:
            OwnLoss(attachment.switch).under(model)
        attachment.set_modes(0)
        model.__dict__[ATTRIBUTE] = attachment
        asked = any(config.overrides[pattern].keys() - {"saved_input"} for pattern in _patterns(config))
        if not attachment.grafts and (asked or len(report.skipped) == len(report.layers)):
            warnings.warn("celora: no layer can be estimated. Print the report for the reasons.", stacklevel=2)
    attachment.timed = timed
    estimates = bool(report.estimated) or not exact_head
    estimators = [estimator for _, estimator in assigned.values() if estimator is not None]
    slow = {estimator.product.slow(estimator.device) for estimator in estimators} - {""}
    head = None if attachment.forward is None else attachment.forward.eight_bit
    logits = found.language_model is not None and head is not None and head.takes(found.language_model.head.weight)
    compact, known = attachment.switch.compact, _passes(attachment, model).values()
    notes = (
        *whole_model_notes(found, config, known, estimates=estimates, compact=compact, logits=logits),
        *advice(found, config),
        *(f"Dense layers are faster here: {reason}." for reason in sorted(slow)),
    )
    attachment.report = dataclasses.replace(report, notes=notes)
    return attachment.report


def _passes(attachment: Attachment, model: nn.Module) -> dict[nn.Module, type[OwnForward]]:
    """The modules of the model that are computed in one pass, or whose inputs wait for the backward in 8 bits."""
    return passes.known(model, compact=attachment.forwards.read_stored_bytes) if attachment.config.fused else {}


def _settled(found: Survey, name: str | CELoraConfig, changes: Mapping[str, Any]) -> CELoraConfig:
    """The configuration. For presets `auto` and `fast`, this times the products."""
    config = resolve(name, changes)
    if name in ("auto", "fast"):
        from celora.runtime.gate import gate

        config = gate(found, ruled(name, config, changes), given=changes).config
    if gathers(found.model) and not same_in_all(config.to_dict()):
        raise CELoraError("the processes attach different configurations, and would wait for each other for ever.")
    return config


def _patterns(config: CELoraConfig) -> list[str]:
    """The overrides that are no `=NAME`: those of presets and users, and none of a timing."""
    return [pattern for pattern in config.overrides if not pattern.startswith("=")]


def _assign(found: Survey, config: CELoraConfig) -> dict[str, tuple[LayerReport, Estimator | None]]:
    """The report and the estimator of each layer, by name. Warns of overrides that match no layer."""
    patterns = _patterns(config)
    if gone := sum(name[1:] not in found.layers for name in config.overrides if name not in patterns):
        warnings.warn(f"celora: {gone} of the layers that the configuration names are not in this model", stacklevel=3)
    of_presets = {pattern for preset in PRESETS.values() for pattern in preset.overrides}
    for pattern in patterns:
        if pattern not in of_presets and not any(matches(pattern, name) for name in found.layers):
            warnings.warn(f"celora: the override {pattern!r} matches no adapted layer", stacklevel=3)
    last = last_block(found.layers) if config.zero_tokens else set()
    return {name: choose_estimator(layer, config, last=name in last) for name, layer in found.layers.items()}


def detach(model: nn.Module) -> None:
    """Remove every hook and attribute that `attach` added to `model`. Without an attachment, do nothing.

    If celora was attached to a wrapper around `model`, or to another model that shares adapted layers with it, that
    attachment ends, too.
    """
    check_module(model)
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


def _graft_layer(layer: AdaptedLayer, estimator: Estimator | None, attachment: Attachment) -> None:
    """Hook one layer: its base for the estimate and, fused, its adapter too."""
    graft: LayerGraft
    if attachment.config.fused and not layer.cannot_fuse:
        graft = FusedGraft(estimator or Dense(*layer.shape), attachment.switch)
        graft.saved_input = attachment.config.for_layer(layer.name).saved_input
        graft.over(layer.module)
    elif estimator is not None:
        graft = LayerGraft(estimator, attachment.switch)
    else:
        return
    graft.name = layer.name
    graft.under(layer.base)
    in_8_bits = estimator is not None and estimator.settings.forward != "exact"
    if not in_8_bits and layer.takes_forward and weight_for(layer.base) is not None and not may_be_copied():
        FloatForward(attachment.switch, graft).under(layer.base)
    if estimator is None:
        graft.mode = Mode.EXACT
        return
    attachment.grafts[layer.name] = graft
    if estimator.settings.forward != "exact":
        attachment.forwards[layer.name] = forward = EightBitForward(graft)
        forward.between(layer.module, layer.base)
    weight = plain_weight(layer.base)
    if weight is not None and _is_here(weight, layer):
        estimator.prepare(weight)  # otherwise the first refresh does it


def _is_here(weight: Tensor, layer: AdaptedLayer) -> bool:
    """Whether the whole weight is in memory: it is not sharded, and no launcher still has to load it."""
    return weight.shape == layer.shape and not weight.is_meta and not isinstance(weight, DTensor)
