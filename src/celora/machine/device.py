"""What differs from one kind of device to another: float64, and random states.

CPU and CUDA have float64 and the decompositions of `torch.linalg`; others may lack both, as MPS does. What needs one of
them is computed on the CPU there: it is little, and a copy there and back costs less than a wrong selection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from celora.errors import CELoraError
from celora.machine.cpu import cpu_name, matrix_instructions

_CPU = torch.device("cpu")
_EXACT = frozenset({"cpu", "cuda", "meta"})


def accelerator() -> torch.device | None:
    """The kind of accelerator that torch can use here (CUDA, MPS, XPU ...), or None."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def default_device() -> torch.device:
    """Where Trainer puts a model unless told otherwise."""
    return accelerator() or _CPU


def reads_freely(device: torch.device) -> bool:
    """Whether a number can be read from the device without waiting for all the work queued before it."""
    return device.type == "cpu"


def backend(device: torch.device) -> Any:
    """`torch.cuda`, `torch.mps`, ...: what torch says about this kind of device."""
    return torch.get_device_module(device)


def exact_device(device: torch.device) -> torch.device:
    """Where to compute what needs float64 or a decomposition: on `device`, or on the CPU if it has none."""
    return device if device.type in _EXACT else _CPU


def in_float64(x: Tensor) -> Tensor:
    """`x` in float64, on its `exact_device`."""
    return x.to(exact_device(x.device)).double()


@contextmanager
def random_states(devices: Iterable[torch.device]) -> Iterator[Callable[[], None]]:
    """Put back the random states of the CPU and of `devices` at the end; yields a function that does so at once.

    Raises:
        CELoraError: a device whose random state torch cannot read, on which no draw could be repeated.
    """
    others = sorted({device for device in devices if device.type not in ("cpu", "meta")}, key=str)
    lacking = [device for device in others if not hasattr(backend(device), "get_rng_state")]
    if lacking:
        raise CELoraError(
            f"torch cannot read the random state of {lacking[0].type!r}, so no dropout could be drawn twice; move the "
            "model to the CPU for this."
        )
    cpu, states = torch.get_rng_state(), [backend(device).get_rng_state(device) for device in others]

    def rewind() -> None:
        torch.set_rng_state(cpu)
        for device, state in zip(others, states, strict=True):
            backend(device).set_rng_state(state, device)

    try:
        yield rewind
    finally:
        rewind()


def device_name(device: torch.device) -> str:
    """The accelerator's or the CPU's own name."""
    if device.type == "mps":
        return str(getattr(torch.backends.mps, "get_name", cpu_name)())  # on such a chip the CPU's name is the same
    if device.type != "cpu" and (ask := getattr(backend(device), "get_device_name", None)) is not None:
        return str(ask(device))
    return cpu_name()


def measured_on(device: torch.device) -> str:
    """`device_name`, and whether products are AMX's.

    A hypervisor or oneDNN's limit may leave a CPU without its AMX, and products then take another time.
    """
    amx = device.type == "cpu" and matrix_instructions()
    return device_name(device) + (" with AMX" if amx else "")
