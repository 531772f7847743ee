"""Changes the table of kernels for a test, to pretend that a backend is missing or present."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from celora.kernels.backends import TABLE, Backend, backends_of
from celora.kernels.c import library, tier


def without(patch: pytest.MonkeyPatch, *names: str, operations: tuple[str, ...] = ()) -> None:
    """Remove the backends with these names, from these operations or from all."""
    for operation in operations or tuple(TABLE):
        patch.setitem(TABLE, operation, [backend for backend in TABLE[operation] if backend.name not in names])


PASSES = ("rms_norm", "rms_norm_backward", "gated", "gated_backward")


def as_on_accelerators(patch: pytest.MonkeyPatch) -> None:
    """Torch's operators compute norms and gates, and nothing rotations, as where celora has no kernels of its own."""
    without(patch, "c")
    for operation in PASSES:
        patch.setitem(TABLE, operation, [Backend("torch", backends_of(operation)[-1].run)])


def take_path(patch: pytest.MonkeyPatch, path: str) -> str:
    """Take the "compiled" kernels, a "library" for the products among them, or only "torch", as without a compiler."""
    if path == "torch":
        without(patch, "c")
    elif path == "library":
        without(patch, "c", operations=("pack_weight",))
    elif library.library() is None:
        assert tier.why_not()
        pytest.skip(f"without kernels this is the path of torch: {tier.why_not()}")
    return path


def pretend(patch: pytest.MonkeyPatch, operation: str, *, there: bool) -> None:
    """The first backend of this operation says that it takes everything on CPU, or nothing."""
    first, *others = TABLE[operation]

    def takes(decides: object) -> bool:
        return there and getattr(decides, "device", decides).type == "cpu"  # type: ignore[attr-defined]

    patch.setitem(TABLE, operation, [dataclasses.replace(first, takes=takes), *others])


def count_linear(patch: pytest.MonkeyPatch) -> list[tuple[torch.Size, torch.Size]]:
    """The operands' shapes of each `linear` from now on, computed as by a library that cannot write into a tensor."""
    seen: list[tuple[torch.Size, torch.Size]] = []

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        seen.append((x.shape, weight.shape))
        y = functional.linear(x, weight, bias)
        return y if out is None else out.copy_(y)

    patch.setitem(TABLE, "linear", [Backend("another", run), *TABLE["linear"]])
    return seen
