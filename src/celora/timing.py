"""Timing that can be compared: contenders take turns, medians are reported."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    contenders: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device | None = None
) -> dict[str, dict[str, float]]:
    """Time each contender `repeats` times on `device`, taking turns: name -> median and 20/80th percentile in ms.

    Taking turns spreads whatever else the machine does evenly, so ratios of medians can be trusted where the
    times themselves cannot. Two rounds warm up.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 2):
        for name, call in contenders.items():
            milliseconds = timed(call, device)
            if turn >= 2:
                samples[name].append(milliseconds)
    return {name: percentiles(of) for name, of in samples.items()}


def timed(call: Callable[[], object], device: torch.device | None = None) -> float:
    """Milliseconds of one call on `device`, the current one if None: by its own events on CUDA, else by the clock."""
    if torch.cuda.is_available():
        # Events are of the current device, whatever the call works on.
        with torch.cuda.device(device if device is not None and device.type == "cuda" else None):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end))
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


@functools.cache
def slower_than_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of `dtype` take longer there than float32's: measured, as devices emulate what they lack."""
    size = 576 if device.type == "cpu" else 4096

    def milliseconds(of: torch.dtype) -> float:
        a = torch.ones(size, size, dtype=of, device=device)
        return min(timed(lambda: a @ a, device) for _ in range(5))

    return milliseconds(dtype) > milliseconds(torch.float32)


def faster_dtype() -> str:
    """The dtype to train in on this machine: `bfloat16`, or `float32` where that is faster."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "float32" if slower_than_float32(torch.bfloat16, device) else "bfloat16"


def synchronise() -> None:
    """Wait for the device, so that a time is that of the work and not of its launch."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def percentiles(samples: list[float]) -> dict[str, float]:
    """Median and 20/80th percentile."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {
        "time_ms": round(statistics.median(samples), 4),
        "p20_ms": round(fifths[0], 4),
        "p80_ms": round(fifths[3], 4),
    }
