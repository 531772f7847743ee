"""What is done to a model beside its estimates, and which of the user's settings cost time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from celora.machine.timing import slower_than_float32
from celora.modeling.adapter import vanilla_adapter
from celora.modeling.language_model import find_language_model
from celora.modeling.packing import cannot_pack
from celora.modeling.passes.own_forward import OwnForward
from celora.modeling.survey import cannot_estimate, fuses
from celora.settings.config import CELoraConfig
from celora.weights.read import held

_HALF = (torch.bfloat16, torch.float16)


def whole_model_notes(
    model: nn.Module,
    tuners: Mapping[str, BaseTunerLayer],
    config: CELoraConfig,
    known: Collection[type[OwnForward]],
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
