"""Which operations a GPU computes with Triton kernels: kernels that a plan found right and faster than torch on it.

`judge` finds that out while a plan is made, and keeps it in the user's cache. Without such a verdict, every
operation takes torch's operators there. Nothing here imports Triton.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from celora.machine.cache import keep, recall
from celora.machine.device import device_name
from celora.machine.packages import package_version

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST = (8, 0)  # compute capability


@dataclass(frozen=True)
class Verdict:
    """What `judge` found on a device.

    Attributes:
        operations: the operations whose kernel was right and faster.
        tiles: the fastest of `product.TILES`, by `product.kind`.
        wrong: operation -> what was wrong with it.
    """

    operations: frozenset[str] = frozenset()
    tiles: Mapping[str, int] = field(default_factory=dict)
    wrong: Mapping[str, str] = field(default_factory=dict)


def cannot_run(device: torch.device) -> str:
    """Why the kernels cannot run on this device at all, or ''."""
    if device.type != "cuda":
        return f"Triton's kernels need an NVIDIA GPU, not {device.type}"
    if not torch.cuda.is_available():
        return "Triton's kernels need an NVIDIA GPU, and torch finds none"
    if torch.version.hip is not None:
        return "Triton's kernels were never tried on AMD"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < LEAST:
        return "Triton's kernels need a GPU of compute capability 8.0 or above"
    return ""


_OF_THIS_PROCESS: dict[str, Verdict] = {}  # there may be no cache folder


@functools.cache
def verdict(device: torch.device) -> Verdict | None:
    """What `judge` once found on this kind of device with these versions; None if it has not looked."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    subject = _subject(device)
    if (known := _OF_THIS_PROCESS.get(json.dumps(subject))) is not None:
        return known
    found = recall(subject)
    if not isinstance(found, dict):
        return None
    return Verdict(frozenset(found["operations"]), found["tiles"], found["wrong"])


def planned_on(device: torch.device) -> bool:
    """Whether nothing on this kind of device is untried: a plan was made there, or it is no GPU of NVIDIA's."""
    return device.type != "cuda" or verdict(device) is not None


def remember(device: torch.device, found: Verdict, *, lasting: bool = True) -> None:
    """Believe this from now on and, if it is `lasting`, in later processes of this user."""
    subject = _subject(device)
    _OF_THIS_PROCESS[json.dumps(subject)] = found
    if lasting:
        document = {"operations": sorted(found.operations), "tiles": dict(found.tiles), "wrong": dict(found.wrong)}
        keep(subject, document)
    verdict.cache_clear()


def forget(device: torch.device) -> None:
    """Believe no longer what is of this process alone."""
    _OF_THIS_PROCESS.pop(json.dumps(_subject(device)), None)
    verdict.cache_clear()


def takes(operation: str) -> Callable[[Tensor | torch.device], bool]:
    """Whether the kernels compute this operation for a tensor, or on a device."""

    def taken(decides: Tensor | torch.device) -> bool:
        if isinstance(decides, torch.device):
            device = decides
        elif type(decides) in (Tensor, nn.Parameter) and decides.dtype in DTYPES and decides.stride(-1) == 1:
            device = decides.device
        else:
            return False
        if torch.compiler.is_compiling():
            return False
        found = verdict(device)
        return found is not None and operation in found.operations

    return taken


def why_not(operation: str) -> Callable[[torch.device], str]:
    """Why they do not, on a GPU; '' elsewhere, where nobody expects it."""

    def reason(device: torch.device) -> str:
        if device.type != "cuda" or not torch.cuda.is_available():
            return ""
        if cannot := cannot_run(device):
            return cannot
        found = verdict(device)
        if found is None:
            return "Triton's kernels were not timed on this GPU, which python -m benchmarks.gpu does"
        if operation in found.operations:
            return ""
        return f"Triton's kernel {found.wrong.get(operation, 'was slower here than torch')}"

    return reason


def describe(_: torch.device) -> str:
    return "celora's own kernel, in Triton"


def _subject(device: torch.device) -> dict[str, Any]:
    """What a verdict is of: the kind of device, the versions, and the text of kernels, launches, tiles and proof."""
    text = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    versions = {name: package_version(name) for name in ("celora", "torch", "triton")}
    return {"kernels": hashlib.sha256(text).hexdigest()[:16], "device": device_name(device), "versions": versions}
