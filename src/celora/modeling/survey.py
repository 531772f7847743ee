"""The survey of a model: its adapted layers and the language model around them, as plain data.

The result of `survey(model)` says what can be estimated, fused, packed or scored, and why not.
`attach`, the gate, FSDP2 and the notes of a report read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from celora.errors import CELoraError
from celora.modeling.adapter import Adapter, vanilla_adapter
from celora.modeling.bypass import own_product, refuse_patched
from celora.modeling.eight_bit import own_bytes
from celora.modeling.hooks import has_another_s_forward, settle_all
from celora.modeling.language_model import LanguageModel, check_module, find_language_model
from celora.modeling.others import is_split
from celora.modeling.trial import tampered, unlike
from celora.weights.quantised import stored_kind
from celora.weights.read import device_of, is_trainable, shape_of


@dataclass(frozen=True)
class LayerAdapter:
    """One adapter of one layer.

    Attributes:
        name: PEFT's name of the adapter.
        active: whether the forward uses it.
        rank: the rank of LoRA or a similar adapter; None for an adapter without a rank.
        dtype: the dtype of its A; None for an adapter without A.
        dropout: the dropout rate of its input.
    """

    name: str
    active: bool
    rank: int | None
    dtype: torch.dtype | None
    dropout: float


@dataclass(frozen=True)
class AdaptedLayer:
    """One frozen layer under PEFT's adapters.

    Attributes:
        name: the name of the PEFT layer in the surveyed model.
        module: the PEFT layer.
        base: the frozen layer in it.
        out_features, in_features: shape of its weight; zeros without a weight.
        dtype: dtype of the stored weight; None without a weight.
        device: where its weight is, or will be; `meta` if it cannot be estimated.
        quantised: the kind of quantised layer; '' if it is not quantised.
        cannot_estimate: why its backward is not `grad_output @ weight`; '' if it is.
        cannot_fuse: why its adapter takes PEFT's own path; '' if it can be fused.
        adapters: its adapters, active ones first.
    """

    name: str
    module: BaseTunerLayer
    base: nn.Module
    out_features: int
    in_features: int
    dtype: torch.dtype | None
    device: torch.device
    quantised: str
    cannot_estimate: str
    cannot_fuse: str
    adapters: tuple[LayerAdapter, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def takes_forward(self) -> bool:
        """Whether a forward of celora's may replace its own.

        Not with accelerate's offloading, nor for a quantised weight whose own bytes cannot be multiplied.
        """
        return (not self.quantised or self.multiplies_own_bytes) and not has_another_s_forward(self.base)

    @property
    def multiplies_own_bytes(self) -> bool:
        """Whether 8-bit products multiply with the stored bytes of its quantised weight."""
        return bool(self.quantised) and own_bytes(self.base)

    @property
    def rank(self) -> int | None:
        """The LoRA rank of its adapter; None if it has none."""
        return next((adapter.rank for adapter in self.adapters if adapter.rank is not None), None)


@dataclass(frozen=True)
class Survey:
    """What celora needs to know of a model.

    Attributes:
        model: the surveyed model.
        layers: its adapted layers by name, in the order of the model.
        language_model: the causal language model around them; None if the model must compute its own loss.
        cannot_score: why the model must compute its own loss; '' if celora can.
    """

    model: nn.Module
    layers: Mapping[str, AdaptedLayer]
    language_model: LanguageModel | None
    cannot_score: str

    @property
    def device(self) -> torch.device:
        """The device of the first layer that can be estimated. Embeddings may be elsewhere."""
        devices = (layer.device for layer in self.layers.values() if not layer.cannot_estimate)
        return next(devices, next(self.model.parameters()).device)


def survey(model: nn.Module) -> Survey:
    """Survey a PEFT model.

    It changes nothing, except that it first repairs what an interrupted forward of celora has left.

    Raises:
        CELoraError: there are no adapted layers, or they are merged into their base, or Unsloth has patched them.
    """
    tuners = _tuner_layers(model)
    settle_all(model)
    around = find_language_model(model)
    return Survey(
        model,
        layers={name: _adapted_layer(name, module) for name, module in tuners.items()},
        language_model=None if isinstance(around, str) else around,
        cannot_score=around if isinstance(around, str) else "",
    )


def _tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The PEFT layers of `model` by name. CELoraError if there are none, or if they cannot train or be estimated."""
    check_module(model)
    tuners = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not tuners:
        configs = (getattr(model, "peft_config", None) or {}).values()
        if prompts := [c.peft_type.value for c in configs if c.is_prompt_learning or c.is_adaption_prompt]:
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
    # PeftMixedModel nests tuner layers: the innermost one calls the frozen layer, and the outermost one has its name.
    return {
        re.sub(r"(\.base_layer)+$", "", name): module
        for name, module in tuners.items()
        if not isinstance(getattr(module, "base_layer", None), BaseTunerLayer)
    }


def _adapted_layer(name: str, module: BaseTunerLayer) -> AdaptedLayer:
    base = module.get_base_layer()
    reason = _cannot_estimate(module)
    apart = reason or vanilla_adapter(module)
    out_features, in_features = shape_of(base)
    return AdaptedLayer(
        name=name,
        module=module,
        base=base,
        out_features=out_features,
        in_features=in_features,
        dtype=getattr(getattr(base, "weight", None), "dtype", None),
        device=torch.device("meta") if reason else device_of(base),
        quantised="" if stored_kind(base) is None else type(base).__name__,
        cannot_estimate=reason,
        cannot_fuse="" if isinstance(apart, Adapter) else apart,
        adapters=_adapters(module),
    )


def _cannot_estimate(module: BaseTunerLayer) -> str:
    base = module.get_base_layer()
    split = "it is split by tensor parallelism" if is_split(base) else ""
    trained = "its weight is trained" if is_trainable(base) else ""
    return own_product(module) or split or tampered(base) or trained or unlike(base) or ""


def _adapters(module: Any) -> tuple[LayerAdapter, ...]:
    ranks, matrices, dropouts = (getattr(module, part, None) for part in ("r", "lora_A", "lora_dropout"))
    ranks = ranks if isinstance(ranks, dict) else {}

    def adapter(name: str) -> LayerAdapter:
        A = matrices[name] if matrices is not None and name in matrices else None
        dropout = dropouts[name] if dropouts is not None and name in dropouts else None
        return LayerAdapter(
            name,
            active=name in module.active_adapters,
            rank=int(ranks[name]) if name in ranks else None,
            dtype=None if A is None else getattr(A, "weight", A).dtype,
            dropout=float(getattr(dropout, "p", 0.0)),
        )

    return tuple(map(adapter, dict.fromkeys([*module.active_adapters, *ranks])))
