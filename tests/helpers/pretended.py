"""A pretended device: tensors that claim to be on MPS, and refuse what MPS refuses.

Their numbers are computed on the CPU. They refuse float64, decompositions, and operators on tensors of two devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from celora.weights import read as weights
from patching import patch_all

MPS = torch.device("mps", 0)  # without an index, torch would ask the device, which is missing
ATEN = torch.ops.aten
_MOVES = {ATEN._to_copy.default, ATEN.copy_.default}
_LACKING = {ATEN._linalg_eigh.default, ATEN._linalg_svd.default, ATEN._int_mm.default}


class Pretended(torch.Tensor):
    """A tensor that says it is on MPS; `inner` is where its numbers are.

    To autograd it is on the meta device, whose backward needs no backend.
    """

    inner: torch.Tensor
    device = property(lambda self: MPS)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner = inner
        return made

    # In these functions torch would access the missing device.
    def item(self) -> Any:
        return self.inner.item()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.inner!r})"

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(
            tuple(torch.tensor(i, dtype=torch.int64).to(MPS) if isinstance(i, list) else i for i in index)
        )

    def __int__(self) -> int:
        return int(self.inner)

    def __float__(self) -> float:
        return float(self.inner)

    def __bool__(self) -> bool:
        return bool(self.inner)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While this is active, `device="mps"` makes such tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    asked = kwargs.get("device")
    there = bool(ours) if asked is None else torch.device(asked).type in ("mps", "meta")
    if not ours and not there:
        return func(*args, **kwargs)
    if func in _LACKING:
        raise NotImplementedError(f"{func} is not implemented on MPS")
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.dim()]
    if ours and strangers and func not in _MOVES:
        raise RuntimeError(f"{func}: tensors on mps and on cpu")
    if asked is not None:
        kwargs = {**kwargs, "device": "cpu"}
    known = {id(tensor.inner): tensor for tensor in ours}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Pretended) else x, (args, kwargs))
    result = func(*args, **kwargs)
    if func is ATEN.copy_.default:
        there = bool(known) and id(result) in known

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not there:
            return x
        if x.dtype == torch.float64:
            raise TypeError(f"{func}: MPS has no float64")
        return known[id(x)] if id(x) in known else Pretended(x)

    return tree_map(wrapped, result)


@contextmanager
def pretended_mps(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Pretend that the accelerator is such a device. Yields the list of its waits and its reads of random states."""
    asked: list[str] = []
    patch_all(patch, "celora.weights.read:_PLAIN", (*weights._PLAIN, Pretended))
    patch.setattr(torch.accelerator, "is_available", lambda: True)
    patch.setattr(torch.accelerator, "current_accelerator", lambda: MPS)
    patch.setattr(torch.accelerator, "synchronize", lambda device=None: asked.append("wait"))
    patch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2", raising=False)
    patch.setattr(torch.mps, "get_rng_state", lambda device="mps": (asked.append("get"), torch.get_rng_state())[1])
    patch.setattr(torch.mps, "set_rng_state", lambda state, device="mps": asked.append("set"))
    with Device():
        yield asked
