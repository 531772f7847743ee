"""Chooses the dtype of the base model, to train it and to use it: what the user asks for, or what is fast here.

A checkpoint in bfloat16 stays in bfloat16, unless float32 products are clearly faster here and float32 fits into
memory. A device that emulates bfloat16 trains many times slower in it. A checkpoint in float16 trains in another dtype:
without loss scaling, small gradients become zero in float16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from celora.machine.cpu import multiplies
from celora.machine.memory import available_memory
from celora.machine.processes import from_first
from celora.machine.timing import slower_than_float32, time_over_float32
from celora.modeling.int8_base import frozen_linears
from celora.train.loading import read_config
from celora.train.processes import is_first
from celora.train.request.arguments import TrainRequest
from celora.train.units import gib

_ROOM = 0.7  # share of the free memory for the weights; a step needs the rest
_HALF = (torch.bfloat16, torch.float16)


def settle_dtype(request: TrainRequest, args: Any, earlier: dict[str, Any] | None = None) -> tuple[TrainRequest, str]:
    """Settle the dtype to load the model in. Returns the request with it, and a line that says why. Collective.

    Args:
        request: what the user asked for.
        args: the SFTConfig made of it.
        earlier: the record of the run that is resumed; its dtype stays.
    """
    dtype, why = from_first(_settled(request, args, earlier) if is_first() else None)
    in_8_bits = "" if request.options.base is None else ", the linear layers of its blocks in 8 bits"
    line = f"Base model in {'its own dtype' if dtype == 'auto' else dtype}{in_8_bits}: {why}."
    return replace(request, lora=request.lora | {"dtype": dtype}), line


def _settled(request: TrainRequest, args: Any, earlier: dict[str, Any] | None) -> tuple[str, str]:
    if earlier is not None:
        return earlier["lora"].get("dtype", "auto"), "as the run began"
    if "dtype" in request.given:
        return request.lora["dtype"], "as the settings say"  # --dtype, or what --memory or a comparison has chosen
    if args.bf16 or args.fp16:
        return "auto", f"products are computed in {'bfloat16' if args.bf16 else 'float16'}"
    config, own = _checkpoint(request)
    if own not in _HALF:
        return "auto", "as the checkpoint says"
    return for_device(own, args.device, 0 if _quantised(request) else _float32_bytes(config, request.options.base))


def dtype_to_use(request: TrainRequest, device: torch.device) -> str:
    """The dtype to load a trained model in: the run's, or float32 where this CPU emulates it and float32 fits.

    Float32 has every value of the other two. A prompt of 200 tokens takes a quarter of the time (SmolLM2, Zen 3).

    Args:
        request: the run's, with the dtype that it settled on.
        device: the device to use the model on.
    """
    dtype: str = request.lora["dtype"]
    config, own = _checkpoint(request)
    own = own if dtype == "auto" else getattr(torch, dtype)
    if device.type != "cpu" or config is None or _quantised(request) or own not in _HALF or multiplies(own):
        return dtype
    free = available_memory(device)
    fits = free is None or _float32_bytes(config, request.options.base) <= _ROOM * free
    return "float32" if fits else dtype


def _checkpoint(request: TrainRequest) -> tuple[Any, torch.dtype | None]:
    """The model's configuration, and the dtype that it names. None where it is quantised, or cannot be read."""
    try:
        config = read_config(request)
    except Exception:  # whatever is wrong, loading the model will say it in one line
        return None, None
    if getattr(config, "quantization_config", None) is not None:
        return None, None
    return config, getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)


def _quantised(request: TrainRequest) -> bool:
    """Whether bitsandbytes keeps the weights, so that float32 would take no more memory."""
    return bool(request.lora["load_in_4bit"] or request.lora["load_in_8bit"])


def for_device(own: torch.dtype, device: torch.device, float32_bytes: int) -> tuple[str, str]:
    """The dtype for a checkpoint in bfloat16 or float16, and the reason.

    Args:
        own: the checkpoint's dtype.
        device: the device to train on.
        float32_bytes: size of the weights in float32; 0 if float32 would take no additional memory.
    """
    ratio = time_over_float32(torch.bfloat16, device)
    speed = f"bfloat16 products take {ratio:.2g} times as long as float32's here"
    if own == torch.bfloat16 and not slower_than_float32(torch.bfloat16, device):
        return "bfloat16", f"as the checkpoint is, and {speed}"
    free = available_memory(device)
    if free is not None and float32_bytes > _ROOM * free:
        need = f"float32 would need {gib(float32_bytes)} of the {gib(free)} that are free"
        return "bfloat16", f"{need}; {speed if own == torch.bfloat16 else 'float16 loses small gradients'}"
    if own == torch.bfloat16:
        return "float32", f"{speed}; --dtype bfloat16 takes half the memory"
    return "float32", "the checkpoint's float16 loses small gradients; --dtype bfloat16 takes half the memory"


def _float32_bytes(config: Any, base: str | None) -> int:
    """Bytes of this model's weights if what is not in a `base` of int8 is in float32; 0 if that cannot be told yet."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # whatever is wrong, loading the model will say it in one line
        return 0
    numbers = sum(int(parameter.numel()) for parameter in model.parameters())
    if base is None:
        return 4 * numbers
    in_bytes = sum(int(model.get_submodule(name).weight.numel()) for name in frozen_linears(model))
    return 4 * (numbers - in_bytes) + in_bytes
