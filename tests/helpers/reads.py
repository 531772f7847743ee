"""What would wait for an accelerator, on any device: reading numbers, lists or shapes that depend on data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Reads(TorchFunctionMode):
    """Records calls from Python that would wait."""

    WAIT = frozenset(
        {"tolist", "item", "nonzero", "argwhere", "__bool__", "__int__", "__float__", "__index__", "is_nonzero",
         "numpy", "cpu", "__contains__", "unique", "masked_select", "equal", "allclose", "tensor", "as_tensor",
         "new_tensor", "bincount"}
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        indices = tree_leaves(args[1:2]) if name in ("__getitem__", "__setitem__") else []
        mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        repeats = [*args[:2], *(kwargs or {}).values()] if name == "repeat_interleave" else []
        counted = sum(isinstance(given, Tensor) for given in repeats) == 2 and "output_size" not in (kwargs or {})
        if name in self.WAIT or mask or counted or (indices and isinstance(args[1], list)):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Records operators that would wait, also when other code calls them, backward included.

    A copy between two kinds of devices waits. On the CPU alone there is none.
    """

    WAIT = frozenset(
        {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "bincount", "_unique2", "unique_dim",
         "unique_consecutive", "unique_dim_consecutive", "_linalg_check_errors", "_linalg_eigh", "_linalg_eigvals",
         "_linalg_svd", "linalg_eig", "linalg_lstsq", "linalg_pinv"}
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        counts = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        found = func(*args, **(kwargs or {}))
        if name in self.WAIT or counts:
            self.seen.append(name)
        if copied := copy_between(func, args, found):
            self.seen.append(copied)
        return found


def copy_between(func: Any, args: Any, found: Any) -> str:
    """What an operator that gave `found` copied from one kind of device to another, or ''."""
    if func.overloadpacket not in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
        return ""
    source = args[0] if func.overloadpacket is torch.ops.aten._to_copy else args[1]
    kinds = source.device.type, found.device.type
    return "" if kinds[0] == kinds[1] else f"copy from {kinds[0]} to {kinds[1]}"
