"""Change the table of kernels for a test: as on a machine that lacks a backend, or has one."""

from __future__ import annotations

import dataclasses

import pytest

from celora.kernels.backends import TABLE
from celora.kernels.c import build, library


def without(patch: pytest.MonkeyPatch, *names: str, operations: tuple[str, ...] = ()) -> None:
    """Leave out the backends with these names, of these operations or of all."""
    for operation in operations or tuple(TABLE):
        patch.setitem(TABLE, operation, [backend for backend in TABLE[operation] if backend.name not in names])


def take_path(patch: pytest.MonkeyPatch, path: str) -> str:
    """Compute by the "compiled" kernels, with a "library"'s product between them, or as without a compiler: "torch"."""
    if path == "torch":
        without(patch, "c")
    elif path == "library":
        without(patch, "c", operations=("pack_weight",))
    elif library.library() is None:
        assert build.why_not()  # said; everything goes through torch here, too
    return path


def pretend(patch: pytest.MonkeyPatch, operation: str, *, there: bool) -> None:
    """The first backend of this operation says that it takes everything on CPU, or nothing."""
    first, *others = TABLE[operation]

    def takes(decides: object) -> bool:
        return there and getattr(decides, "device", decides).type == "cpu"  # type: ignore[attr-defined]

    patch.setitem(TABLE, operation, [dataclasses.replace(first, takes=takes), *others])
