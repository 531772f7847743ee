"""The notes of a report: what celora does to a model besides estimates, and which settings cost time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch

from celora.kernels.backends import choose
from celora.machine.timing import slower_than_float32
from celora.modeling.float_forward import FloatForward, weight_for
from celora.modeling.own_forward import OwnForward
from celora.modeling.survey import Survey
from celora.settings.config import CELoraConfig

_HALF = (torch.bfloat16, torch.float16)


def whole_model_notes(
    found: Survey,
    config: CELoraConfig,
    known: Collection[type[OwnForward]],
    *,
    estimates: bool,
    compact: bool,
    logits: bool,
) -> list[str]:
    """What celora does to the model besides estimates, and why it leaves something out.

    Args:
        known: the class of each module that is computed in one pass.
        estimates: whether the backward of any layer, or of the head, is estimated.
        compact: whether these save activations for backward in fewer bits.
        logits: whether logits are computed in 8 bits.
    """
    notes = []
    if config.fused:
        layers = found.layers.values()
        apart = [layer.cannot_fuse for layer in layers if layer.cannot_fuse]
        rest = f"; PEFT's own path in {len(apart)}: {apart[0]}" if apart else ""
        notes.append(f"LoRA fused with its base layer in {len(layers) - len(apart)} of {len(layers)} layers{rest}.")
    own = (module for module in found.model.modules() if isinstance(module.__dict__.get("forward"), FloatForward))
    weights = (weight for module in own if (weight := weight_for(module)) is not None)
    for product, dtype in sorted({(choose("linear", weight).name, str(weight.dtype)) for weight in weights}):
        if product == "onednn":
            notes.append("Float32 products are oneDNN's: on this CPU they are faster than torch's own.")
        elif product == "float32":
            name = dtype.removeprefix("torch.")
            notes.append(f"Products of {name} are computed in float32: this CPU has no instructions for them.")
    if known:
        counts = Counter(kind.name for kind in known)
        listed = ", ".join(f"{n} {name}" for name, n in counts.items())
        if compact and any(layer.device.type != "cpu" for layer in found.layers.values()):
            notes.append(f"Inputs saved for the backward in 8 bits: those of {listed}.")
        else:
            saved = "; activations saved for the backward in 8 bits, attention's in 16" if compact else ""
            notes.append(f"On CPU, in one pass each: {listed}{saved}.")
    if config.labelled_head:
        language = found.language_model
        share = "" if config.head_keep_ratio == 1 else f", its gradient through {config.head_keep_ratio:g} of the words"
        share += ", its logits in 8 bits" if logits else ""
        notes.append(
            f"The model's own loss: {found.cannot_score}."
            if language is None
            else f"Loss over labelled tokens only{share}, without outputs.logits (which labelled_head=False keeps)."
        )
        if config.padding_free and language is not None:
            stays = language.cannot_pack
            notes.append(f"Padding stays: {stays}." if stays else "Padding left out of training batches.")
    named = [name for name in found.layers if config.overrides.get(f"={name}", {}).get("estimator") == "dense"]
    if exact := sum(config.for_layer(name).estimator == "dense" for name in named):
        on_gpu = config.forward == "exact" and any(layer.device.type == "cuda" for layer in found.layers.values())
        why = "what estimates gain on a GPU was not measured" if on_gpu else "no estimate was clearly faster"
        notes.append(f"{exact} of {len(found.layers)} layers are exact: {why}.")
    if estimates and config.most_error is not None:
        notes.append(
            f"Refreshes measure each estimate's relative error: beyond {config.most_error:g} a layer becomes exact, "
            "and the head keeps more."
        )
    return notes


def advice(found: Survey, config: CELoraConfig) -> list[str]:
    """Advice about settings of the user that cost time."""
    said, layers = [], found.layers.values()
    if any(getattr(module, "gradient_checkpointing", False) is True for module in found.model.modules()):
        said.append("Gradient checkpointing computes every forward twice; it is faster without, if memory allows.")
    for layer in layers:
        rate = max((adapter.dropout for adapter in layer.adapters if adapter.active), default=0.0)
        if rate > 0:
            said.append(f"lora_dropout={rate:g} draws and keeps a mask in every layer; 0 is faster.")
            if len(getattr(layer.module, "lora_magnitude_vector", ())):
                said.append("DoRA with dropout computes each base layer twice, and only once of it is estimated.")
            break
    for layer in layers:
        wide = any(adapter.active and adapter.dtype == torch.float32 for adapter in layer.adapters)
        if layer.dtype in _HALF and wide and not (config.fused and not layer.cannot_fuse):
            said.append(
                f"float32 adapters on a {str(layer.dtype).removeprefix('torch.')} base cast every activation twice; "
                "presets other than off do not, nor does get_peft_model(..., autocast_adapter_dtype=False)."
            )
            break
    for dtype, device in dict.fromkeys((layer.dtype, layer.device) for layer in layers if not layer.quantised):
        own = (isinstance(layer.base.__dict__.get("forward"), FloatForward) for layer in layers if layer.dtype == dtype)
        if device.type == "cpu" and dtype in _HALF and not all(own) and slower_than_float32(dtype, device):
            name = str(dtype).removeprefix("torch.")
            said.append(
                f"This CPU takes longer for {name} products than for float32 ones: load with dtype=float32, which "
                "takes twice the memory."
            )
    return said
