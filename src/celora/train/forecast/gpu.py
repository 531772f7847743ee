"""Which NVIDIA GPU a forecast is for, and what it is asked for there.

Bytes are counted on this machine's CPU, with torch's operators alone. Times follow from published peaks.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from celora.errors import CELoraError
from celora.machine.device import accelerator, device_name
from celora.train.forecast.peaks import USABLE, gpu_named, usable
from celora.train.forecast.ways import Way
from celora.train.request.arguments import TrainRequest

BESIDE = 3 * 2**28  # bytes that CUDA, its libraries and gaps between tensors take; assumed
PRESETS = ("auto", "fast")  # of those that can be forecast, what most people want. Without a plan, auto is exact there
_KNOWN = ("off", "exact", *PRESETS)


def gpu_of(request: TrainRequest, asked: str | None) -> str | None:
    """The GPU to forecast for, a key of `GPUS`: the one asked for, or the one that would train; None for the CPU.

    Raises:
        CELoraError: nothing is known of it, or another kind of accelerator would train.
    """
    if asked is not None:
        return gpu_named(asked)
    device = None if request.train.get("use_cpu") else accelerator()
    if device is None:
        return None
    if device.type != "cuda":
        raise CELoraError(
            f"estimates are of CPUs and NVIDIA's GPUs, and this run would be on {device.type}; give --use_cpu true"
        )
    return gpu_named(device_name(device), round(torch.cuda.get_device_properties(device).total_memory / 2**30))


def on_cpu(request: TrainRequest, presets: tuple[str, ...]) -> TrainRequest:
    """The request as its bytes are counted, on this machine's CPU.

    Raises:
        CELoraError: one of the presets cannot be forecast.
    """
    if other := next((name for name in presets if name not in _KNOWN), None):
        raise CELoraError(f"GPUs are estimated with preset {', '.join(_KNOWN)}, not with {other}")
    # A run on CUDA computes under autocast unless told otherwise. float16 is not for CPUs, and as large.
    halves = request.given.get("bf16", True) or request.given.get("fp16", False)
    settings = {"use_cpu": True, "bf16": bool(halves), "fp16": False}
    copies = {"dataloader_pin_memory": False, "accelerator_config": None}
    return replace(request, train=request.train | settings | copies)


def smallest(way: Way) -> int | None:
    """GB of the smallest common GPU that this fits on; None if there is none."""
    return next((size for size in USABLE if way.fits(usable(size))), None)
