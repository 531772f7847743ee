"""How operands of 8-bit products lie in memory. A GPU refuses what a CPU takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = (torch.ops.aten._int_mm, torch.ops.aten._scaled_mm)


class Orders(TorchDispatchMode):
    """Raises where a product gets operands that do not lie row by row and column by column, and keeps their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[torch.Size, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _PRODUCTS:
            _check(*args[:2])
            self.shapes.append((args[0].shape, args[1].shape))
        return func(*args, **(kwargs or {}))


def _check(a: Tensor, b: Tensor) -> None:
    assert a.stride(1) == 1, f"the first operand is not row by row: {tuple(a.shape)}, strides {a.stride()}"
    assert b.stride(0) == 1, f"the second operand is not column by column: {tuple(b.shape)}, strides {b.stride()}"
