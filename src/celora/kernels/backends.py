"""Which backend computes an operation here: one table, asked in order.

An operation has a name and one or more backends. Each backend says for itself which tensors it takes; the first that
takes the tensor computes the operation. `operations` fills the table, and `celora doctor` prints it as it stands on
this machine. A backend from outside joins it by `register` (docs/develop/new-kernel.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from celora.errors import CELoraError, unknown


def _everything(_: object) -> bool:
    return True


def _no_reason(_: torch.device) -> str:
    return ""


@dataclass(frozen=True)
class Backend:
    """One way to compute one operation.

    Attributes:
        name: of the backend, as `celora doctor` prints it.
        run: computes the operation, with the operation's own arguments.
        takes: whether it can, given what decides: the operation's first tensor or a device (see `define`). Asked at
            each call, so it must be cheap and must not wait for an accelerator.
        why_not: why it takes nothing on this device, or ''; for messages.
        slow: why it cannot pay on this device, or ''.
        described: what it computes with on this device, in words; its name if empty.
        any_rows: its products take any number of rows equally well. Elsewhere a product of a new shape has to be set up
            first, so the number of rows is rounded up (`celora.numerics.select.grain`).
    """

    name: str
    run: Callable[..., Any]
    takes: Callable[[Any], bool] = _everything
    why_not: Callable[[torch.device], str] = _no_reason
    slow: Callable[[torch.device], str] = _no_reason
    described: Callable[[torch.device], str] = _no_reason
    any_rows: bool = False


TABLE: dict[str, list[Backend]] = {}
_BY_DEVICE: set[str] = set()


def define(operation: str, *backends: Backend, by_device: bool = False) -> None:
    """Add an operation with its backends, the first to be asked in front.

    Which one takes a call is decided by its first tensor or, `by_device`, by the device alone.
    """
    TABLE[operation] = list(backends)
    if by_device:
        _BY_DEVICE.add(operation)


def register(operation: str, backend: Backend) -> None:
    """Ask `backend` before all others that compute `operation`; it replaces one of the same name.

    Raises:
        CELoraError: there is no such operation.
    """
    others = [known for known in backends_of(operation) if known.name != backend.name]
    TABLE[operation] = [backend, *others]


@contextmanager
def torch_alone() -> Iterator[None]:
    """For a while torch's operators compute everything, also what is slow here: as on a GPU.

    Sums of 8-bit products may overflow on this CPU. This is for counting bytes.
    """
    before = dict(TABLE)
    for operation, backends in before.items():
        TABLE[operation] = [Backend(backend.name, backend.run) for backend in backends if backend.name == "torch"]
    try:
        yield
    finally:
        TABLE.update(before)


def backends_of(operation: str) -> list[Backend]:
    """The backends of an operation, in the order in which they are asked; CELoraError where there is no such one."""
    if operation not in TABLE:
        raise unknown("operation", operation, TABLE)
    return TABLE[operation]


def available(operation: str, decides: Tensor | torch.device) -> bool:
    """Whether any backend takes it."""
    return any(backend.takes(decides) for backend in TABLE[operation])


def choose(operation: str, decides: Tensor | torch.device) -> Backend:
    """The first backend that takes it; CELoraError where none does."""
    for backend in TABLE[operation]:
        if backend.takes(decides):
            return backend
    where = decides if isinstance(decides, torch.device) else f"{decides.dtype} on {decides.device}"
    raise CELoraError(f"no backend computes {operation!r} for {where}; ask `available` before.")


def explain(operation: str, decides: Tensor | torch.device) -> str:
    """Which backend computes this, and why the ones before it do not; or why none does."""
    device = decides if isinstance(decides, torch.device) else decides.device
    reason = ""
    for backend in backends_of(operation):
        if backend.takes(decides):
            found = backend.described(device) or backend.name
            return f"{found}: {reason}" if reason else found
        reason = reason or backend.why_not(device)
    last = backends_of(operation)[-1].why_not(device)
    return f"none: {last or reason}"


def chosen(dtype: torch.dtype, device: torch.device) -> dict[str, str | None]:
    """Which backend computes each operation for tensors like this; None where it is not available."""
    like = torch.empty(1, 32, dtype=dtype, device=device)
    return {
        operation: next((b.name for b in backends if b.takes(device if operation in _BY_DEVICE else like)), None)
        for operation, backends in TABLE.items()
    }
