"""Timing that can be compared: contenders take turns, medians are reported."""

from __future__ import annotations

import functools
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import psutil
import torch

from celora.borrowed import borrow
from celora.errors import out_of_memory
from celora.machine.device import accelerator, default_device

_CLEARLY = 1.5  # times as long as float32's product: less is no reason to take twice the memory
_TURNS, _MOST_TURNS = 9, 45  # of the two dtypes
_REST = 2e-3  # seconds
_WATCHED_S, _BELIEVED_S = 0.2, 10.0  # how long others are watched, and how long what was seen is believed
_STAT = Path("/proc/stat")  # that psutil reads on Linux
_ENOUGH = 0.8  # free processors for each thread, at the least
_WAITING = 2.0  # times as long as next to nothing, at the least, if what a device computes is waited for
_SLEEP = "torch:cuda._sleep"
_BUSY = 2_000_000  # cycles of a GPU, a millisecond or two, in which Python launches the kernels of a product


def interleaved(
    contenders: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device | None = None
) -> dict[str, dict[str, float]]:
    """Time each contender `repeats` times on `device`, taking turns: name -> median and 20/80th percentile in ms.

    Taking turns spreads whatever else the machine does evenly, so ratios of medians can be trusted where the
    times themselves cannot. Two rounds warm up.
    """
    return {name: percentiles(taken) for name, taken in _samples(contenders, repeats, device).items()}


def ratios(
    contenders: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device | None = None
) -> dict[str, float]:
    """How many times as long as the first contender each one takes, at the most: name -> ratio.

    They take turns. The larger is returned of two ratios, that of the fastest turns and the median of the ratios turn
    by turn. What else the machine does disturbs either, but hardly both alike. So it rarely makes a slower one look
    faster.
    """
    samples = _samples(contenders, repeats, device)
    first = next(iter(samples.values()))
    return {name: max(_over(taken, first)) for name, taken in samples.items()}


def _over(taken: list[float], first: list[float]) -> tuple[float, float]:
    """The ratio of the fastest turns, and the median of the ratios turn by turn."""
    return min(taken) / min(first), statistics.median(own / other for own, other in zip(taken, first, strict=True))


def _samples(
    contenders: Mapping[str, Callable[[], object]], repeats: int, device: torch.device | None
) -> dict[str, list[float]]:
    """Milliseconds of each contender, turn by turn. Two rounds warm up."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 2):
        for name, call in contenders.items():
            milliseconds = timed(call, device)
            if turn >= 2:
                samples[name].append(milliseconds)
    return samples


def timed(call: Callable[[], object], device: torch.device | None = None) -> float:
    """Milliseconds of one call on `device`, by default where a model would be: by its own events on CUDA, else by the
    clock, from when the device has nothing to do until it has nothing to do again."""
    return laps((call,), device)[0]


def laps(calls: Sequence[Callable[[], object]], device: torch.device | None = None) -> list[float]:
    """Milliseconds of each of these calls, one after the other, measured as by `timed`.

    CUDA is waited for after the last call only: as in training, each call is queued while the device computes what is
    before it. It has other work before the first call, so that no time is that of a launch.
    """
    device = device or default_device()
    if device.type == "cuda":
        with torch.cuda.device(device):  # events are of the current device, whatever the call works on
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
            if (sleep := borrow(_SLEEP)) is not None:
                sleep(_BUSY)
            marks[0].record()
            for call, mark in zip(calls, marks[1:], strict=True):
                call()
                mark.record()
            marks[-1].synchronize()
            return [float(begin.elapsed_time(end)) for begin, end in pairwise(marks)]
    synchronise(device)
    times = [time.perf_counter()]
    for call in calls:
        call()
        synchronise(device)
        times.append(time.perf_counter())
    return [1e3 * (end - begin) for begin, end in pairwise(times)]


def disturbed(device: torch.device | None = None) -> str:
    """One line if other programs leave fewer processors free than torch has threads, so that times are too long.

    '' if they do not, or if the times are not those of a CPU. This process sleeps while it watches them, and believes
    what it saw for a few seconds. Threads that have to wait for a processor keep all others waiting, so products may
    take ten times as long.

    Args:
        device: where something is timed; by default where a model would be.
    """
    return _disturbed(int(time.monotonic() / _BELIEVED_S)) if (device or default_device()).type == "cpu" else ""


@functools.lru_cache(maxsize=1)
def _disturbed(_moment: int) -> str:
    shares = psutil.cpu_percent(_WATCHED_S, percpu=True)
    if hasattr(os, "sched_getaffinity"):
        numbered, allowed = dict(zip(_numbers(), shares, strict=False)), os.sched_getaffinity(0)
        if allowed <= numbered.keys():  # some containers number theirs anew
            shares = [numbered[number] for number in allowed]
    free, threads = sum(1 - share / 100 for share in shares), torch.get_num_threads()
    if free >= _ENOUGH * min(threads, len(shares)):
        return ""
    return (
        f"other programs use {1 - free / len(shares):.0%} of the processors: times are too long, and their order may "
        "be wrong"
    )


def _numbers() -> list[int]:
    """The numbers of the processors that psutil sees, in its order. Some may be offline."""
    try:
        return [int(number) for number in re.findall(r"^cpu(\d+)", _STAT.read_text(), re.MULTILINE)]
    except OSError:
        return []


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a time is that of the work and not of its launch."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@functools.cache
def cannot_time(device: torch.device) -> str:
    """Why times on this device cannot be trusted, or ''.

    On an accelerator that this was never tried on, a large product must take longer than a small one: where waiting
    does not wait, both take as long as their launch.
    """
    if device.type in ("cpu", "cuda", "meta"):
        return ""
    found = accelerator()
    if found is None or found.type != device.type:
        return "torch.accelerator does not know it, so nothing says when its work is done"
    squares = {name: torch.ones(size, size, device=device) for name, size in (("small", 16), ("large", 2048))}
    calls = {name: functools.partial(_power, square) for name, square in squares.items()}
    times = {name: found["time_ms"] for name, found in interleaved(calls, repeats=5, device=device).items()}
    if times["large"] < _WAITING * times["small"]:
        return "a large product seems to take no longer than a small one, so its work is not waited for"
    return ""


def _power(square: torch.Tensor) -> torch.Tensor:
    return square @ square @ square @ square


@functools.cache
def time_over_float32(dtype: torch.dtype, device: torch.device) -> float:
    """How many times as long as float32's a product of `dtype` takes there, measured: devices emulate what they lack.

    The two take turns. The lower is returned of two ratios, that of their fastest turns and the median of the ratios
    turn by turn: what else the machine does disturbs either, but hardly both alike. Where the two are not on the same
    side of `_CLEARLY`, there are more turns. Infinite where the device refuses `dtype`.
    """
    tokens, width = (256, 576) if device.type == "cpu" else (2048, 4096)
    half: list[float] = []
    single: list[float] = []
    x, weight = torch.ones(tokens, width, device=device), torch.ones(width, width, device=device)
    try:
        calls = functools.partial(torch.mm, x.to(dtype), weight.to(dtype)), functools.partial(torch.mm, x, weight)
        for call in calls:
            timed(call, device)  # warms up
    except (RuntimeError, TypeError) as error:  # older versions of macOS have no bfloat16 on MPS
        if out_of_memory(error):
            raise
        return math.inf
    while True:
        for _ in range(_TURNS):
            half.append(_rested(calls[0], device))
            single.append(_rested(calls[1], device))
        fastest, typical = _over(half, single)
        if (fastest > _CLEARLY) == (typical > _CLEARLY) or len(half) >= _MOST_TURNS:
            return min(fastest, typical)


def _rested(call: Callable[[], object], device: torch.device) -> float:
    """`timed` after a short sleep, without which a busy system may interrupt the same one of two in every turn."""
    time.sleep(_REST)
    return timed(call, device)


def slower_than_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of `dtype` clearly take longer there than float32's."""
    return time_over_float32(dtype, device) > _CLEARLY


def faster_dtype() -> str:
    """The dtype to train in on this machine: `bfloat16`, or `float32` where that is clearly faster."""
    return "float32" if slower_than_float32(torch.bfloat16, default_device()) else "bfloat16"


def percentiles(samples: list[float]) -> dict[str, float]:
    """Median and 20/80th percentile."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {
        "time_ms": round(statistics.median(samples), 4),
        "p20_ms": round(fifths[0], 4),
        "p80_ms": round(fifths[3], 4),
    }
