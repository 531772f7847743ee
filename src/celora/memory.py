"""How much memory a step takes: what its forward saves for backward, and the peak of the process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Saved(dict[int, int]):
    """Pieces of memory that forward passes have saved for backward: address -> bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of them, each counted once."""
        return sum(self.values())


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[Saved]:
    """Count what the forward passes inside save for backward beside the parameters of `model`, which exist anyway."""
    parameters = {storage.data_ptr() for p in model.parameters() for storage in _storages(p)}
    saved = Saved()

    def pack(tensor: Tensor) -> Tensor:
        for storage in _storages(tensor):
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _storages(tensor: Any) -> Iterator[UntypedStorage]:
    """Where the numbers are; sharded and quantised tensors are made of others."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.untyped_storage()
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _storages(getattr(tensor, name))


def peak_memory(device: torch.device) -> int | None:
    """Bytes at most taken so far, or since `forget_peak`, on a CUDA device or by this process; None if nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # what getrusage says includes the process that started this one
    with suppress(OSError, StopIteration):  # not on Linux, or in a sandbox that does not tell
        # The process's name stands there, too, in whatever encoding.
        lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew, with what is taken now; for a process, on Linux only, and if it may ask for it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, or on Linux by this process; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    group = Path("/sys/fs/cgroup")  # a container may be allowed less than the machine has
    try:
        limit, taken = (int((group / f"memory.{of}").read_text(encoding="ascii")) for of in ("max", "current"))
        counted = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return min(free, limit - taken + int(counted["inactive_file"]))  # which makes way when memory is asked for
    except (OSError, ValueError, KeyError):
        return free
