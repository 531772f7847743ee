"""How much memory a step takes: what its forward saves for backward, and the peak of the process."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, UntypedStorage, nn

from celora.borrowed import borrow
from celora.machine import cgroup
from celora.machine.device import backend


class Saved:
    """Memory that forward passes have saved for backward.

    Attributes:
        nbytes: bytes at the fullest moment, each counted once.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._pieces: Counter[int] = Counter()  # address -> tensors that are kept there
        self._now = 0

    def keep(self, tensor: Tensor, storages: Collection[UntypedStorage]) -> None:
        """Count these storages for as long as `tensor` lives."""
        for storage in storages:
            address, size = storage.data_ptr(), storage.nbytes()
            self._now += 0 if self._pieces[address] else size
            self._pieces[address] += 1
            weakref.finalize(tensor, self._free, address, size)
        self.nbytes = max(self.nbytes, self._now)

    def _free(self, address: int, size: int) -> None:
        self._pieces[address] -= 1
        self._now -= 0 if self._pieces[address] else size


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[Saved]:
    """Count what the forward passes inside save for backward beside the parameters of `model`, which exist anyway."""
    parameters = {storage.data_ptr() for p in model.parameters() for storage in _storages(p)}
    saved = Saved()

    def pack(tensor: Tensor) -> Tensor:
        kept = tensor.detach()  # a result that its own node keeps would be freed by a backward only
        saved.keep(kept, [storage for storage in _storages(tensor) if storage.data_ptr() not in parameters])
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _storages(tensor: Any) -> Iterator[UntypedStorage]:
    """Where the numbers are; sharded and quantised tensors are made of others."""
    wraps = borrow("torch.utils._python_dispatch:is_traceable_wrapper_subclass")
    if wraps is None or not wraps(tensor):
        yield tensor.untyped_storage()
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _storages(getattr(tensor, name))


def peak_memory(device: torch.device) -> int | None:
    """Bytes at most taken so far, or since `forget_peak`, on the device or by this process; None if nobody knows."""
    if device.type != "cpu":
        ask = getattr(backend(device), "max_memory_allocated", None)  # MPS does not keep it
        return None if ask is None else int(ask(device))
    # What getrusage says includes the process that started this one. A sandbox may have no such file, or no such line.
    with suppress(OSError, StopIteration):
        # The process's name stands there, too, in whatever encoding.
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew, with what is taken now; for a process, on Linux only, and if it may ask for it."""
    if device.type != "cpu":
        getattr(backend(device), "reset_peak_memory_stats", lambda device: None)(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, or by this process; None where nobody knows."""
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    if device.type != "cpu":
        ask = getattr(backend(device), "mem_get_info", None)
        return None if ask is None else int(ask(device)[0])
    with suppress(OSError):  # a sandbox without the file
        free, allowed = int(psutil.virtual_memory().available), cgroup.free_memory()
        return free if allowed is None else min(free, allowed)
    return None
