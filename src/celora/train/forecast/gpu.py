"""Which NVIDIA GPU a forecast is for, and what it is asked for there.

Bytes are counted on this machine's CPU, with torch's operators alone. Times follow from published peaks.
"""

from __future__ import annotations

from dataclasses import replace

from celora.errors import CELoraError
from celora.machine.device import accelerator, device_name
from celora.machine.gpus import SIZES, gpu_named
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
    return gpu_named(device_name(device))


def on_cpu(request: TrainRequest, presets: tuple[str, ...]) -> TrainRequest:
    """The request as its bytes are counted, on this machine's CPU.

    Raises:
        CELoraError: one of the presets cannot be forecast.
    """
    if other := next((name for name in presets if name not in _KNOWN), None):
        raise CELoraError(f"GPUs are estimated with preset {', '.join(_KNOWN)}, not with {other}")
    settings = {"use_cpu": True, "bf16": False, "fp16": False, "dataloader_pin_memory": False}
    return replace(request, train=request.train | settings)


def smallest(way: Way) -> int | None:
    """The memory in GiB of the smallest common GPU that this fits on; None if there is none."""
    return next((size for size in SIZES if way.fits(size * 2**30)), None)
