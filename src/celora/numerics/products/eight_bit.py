"""What int8 and fp8 products have in common: a copy of the weight that follows its source."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from celora.kernels.operations import column_maxima
from celora.kernels.plain import divisor
from celora.numerics.products.base import Product
from celora.weights.stored import owner_of


class EightBit(Product):
    """What the 8-bit formats share: a quantised copy of the weight, made anew when the weight is another one.

    The copy is recognised by the tensor and its version; a weight changed through `.data` is noticed by its column
    maxima at the next refresh, which calls `recheck`.
    """

    relative_cost = 0.5

    def __init__(self, *, copy: bool = True) -> None:
        self.copy = copy
        self.forget()

    def forget(self) -> None:
        self._made_of: tuple[Any, ...] | None = None
        self._packed: Any = None
        self._scale: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"copy": self.copy}  # packed weights can be neither pickled nor copied; they are made again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def holds_copy(self) -> bool:
        return self._packed is not None

    def _follow(self, weight: Tensor) -> Tensor:
        """The weight's column scales, after making the copy if there is to be one and it is not up to date."""
        if self._scale is not None and isinstance(weight, DTensor):  # sharded: `recheck` sees it whole at refreshes
            return self._scale
        if self._scale is None or not self._made_of_this(weight):
            self._scale = self._scale_of(weight)
            self._packed = self._pack(weight.detach()) if self.copy else None
            self._made_of = self._identity(weight)
        return self._scale

    def _identity(self, weight: Tensor) -> tuple[Any, ...]:
        """What tells this weight from others, and from itself before it was changed.

        The tensor itself rather than its address: another one may be put where the first has been, and FSDP2 gathers
        one tensor into other memory each time.
        """
        return weakref.ref(owner_of(weight)), weight._version, weight.dtype, weight.device

    def _made_of_this(self, weight: Tensor) -> bool:
        """Whether the copy is one of this weight as it is."""
        owner, *others = self._identity(weight)
        return self._made_of is not None and self._made_of[0]() is owner() and list(self._made_of[1:]) == others

    _largest: ClassVar[float]

    def _scale_of(self, weight: Tensor) -> Tensor:
        return divisor(column_maxima(weight.detach()) / self._largest)

    def recheck(self, weight: Tensor) -> None:
        known = self._scale
        if known is not None and not (known.device == weight.device and torch.equal(known, self._scale_of(weight))):
            self.forget()

    @abstractmethod
    def _pack(self, weight: Tensor) -> Any: ...
