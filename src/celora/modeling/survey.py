"""The adapted layers of a model: which there are, which cannot be estimated, and which fuse with their adapter."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from celora.errors import CELoraError
from celora.modeling.adapter import Adapter, vanilla_adapter
from celora.modeling.bypass import own_product, refuse_patched
from celora.modeling.trial import tampered, unlike
from celora.weights.read import trains
from celora.weights.sharded import is_split


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


def cannot_estimate(module: BaseTunerLayer) -> str:
    """Why the backward of this PEFT layer's base is not `grad_output @ read(base)`, or ''."""
    base = module.get_base_layer()
    split = "it is split by tensor parallelism" if is_split(base) else ""
    trained = "its weight is trained" if trains(base) else ""
    return own_product(module) or split or tampered(base) or trained or unlike(base) or ""


def fuses(module: BaseTunerLayer) -> bool:
    """Whether the layer's adapter can be computed together with its base layer."""
    return not cannot_estimate(module) and isinstance(vanilla_adapter(module), Adapter)
