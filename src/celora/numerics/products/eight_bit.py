"""The common part of int8 and fp8 products: an 8-bit copy of the weight that is kept up to date."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from celora.kernels.backends import available, backends_of, choose
from celora.kernels.operations import column_maxima
from celora.kernels.packed import PackedWeight
from celora.kernels.plain import divisor
from celora.machine.device import reads_freely
from celora.numerics.products.base import Product
from celora.weights.stored import owner_of


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _some_numbers(owner: Tensor) -> Tensor | None:
    """Up to 32 numbers of a weight, from all over its memory; None where it is not at hand, or would be waited for."""
    count = min(32, owner.numel())
    there = _is_plain(owner) and reads_freely(owner.device) and owner.untyped_storage().nbytes() > 0
    if not there or not count or not owner.is_contiguous():
        return None
    return owner.detach().as_strided((count,), (owner.numel() // count,), owner.storage_offset()).clone()


class EightBit(Product):
    """A product with a quantised copy of the weight. The copy is made again if the weight has changed.

    The tensor, its storage, its shape and its version identify the weight. A change in place through `.data` changes
    none of them. `notice` sees such a change at the next optimizer step by some of the numbers, and `recheck` at the
    next refresh by the column maxima.
    """

    relative_cost = 0.5

    def __init__(self, *, copy: bool = True) -> None:
        self.copy = copy
        self.forget()

    @property
    @abstractmethod
    def operation(self) -> str:
        """The operation that makes the copy, by its name in the table of kernels."""

    def unavailable(self, out_features: int, in_features: int, device: torch.device) -> str:
        return "" if available(self.operation, device) else backends_of(self.operation)[-1].why_not(device)

    def slow(self, device: torch.device) -> str:
        return choose(self.operation, device).slow(device) if available(self.operation, device) else ""

    def forget(self) -> None:
        self._made_of: tuple[Any, ...] | None = None
        self._packed: Any = None
        self._scale: Tensor | None = None
        self._some: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"copy": self.copy}  # packed weights cannot be pickled or copied, so they are made again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def holds_copy(self) -> bool:
        return self._packed is not None

    def _follow(self, weight: Tensor) -> Tensor:
        """The weight's column scales. Makes the copy first if it is wanted and not up to date."""
        if self._scale is not None and isinstance(weight, DTensor):  # sharded: `recheck` compares it
            return self._scale
        if self._scale is None or not self._made_of_this(weight):
            with torch.inference_mode(False), torch.no_grad():  # training goes on with what an evaluation makes
                self._scale = self._scale_of(weight)
                self._packed = self._pack(weight.detach(), self._scale) if self.copy else None
                self._made_of, self._some = self._identity(weight), _some_numbers(owner_of(weight))
        return self._scale

    def _identity(self, weight: Tensor) -> tuple[Any, ...]:
        """What identifies this weight and its version.

        It is the tensor and its storage, not its address: another tensor may get the same address, and FSDP2 gathers
        one tensor to a new address each time. `weight.data = other` changes the storage.
        """
        owner = owner_of(weight)
        storage = owner.untyped_storage() if _is_plain(owner) else owner
        return weakref.ref(owner), weakref.ref(storage), weight._version, weight.shape, weight.dtype, weight.device

    def _made_of_this(self, weight: Tensor) -> bool:
        """Whether the copy is of this weight in its current version."""
        owner, storage, *others = self._identity(weight)
        made_of = self._made_of
        return (
            made_of is not None
            and made_of[0]() is owner()
            and made_of[1]() is storage()
            and list(made_of[2:]) == others
        )

    def notice(self) -> None:
        owner = None if self._made_of is None else self._made_of[0]()
        if owner is None or self._some is None:
            return
        now = _some_numbers(owner)
        if now is not None and not torch.equal(now, self._some):
            self.forget()

    _largest: ClassVar[float]

    def _scale_of(self, weight: Tensor) -> Tensor:
        return divisor(column_maxima(weight.detach()) / self._largest)

    def recheck(self, weight: Tensor) -> None:
        known = self._scale
        if known is not None and not (known.device == weight.device and torch.equal(known, self._scale_of(weight))):
            self.forget()

    def rows(
        self,
        grad_output: Tensor,
        weight: Tensor,
        index: Tensor | None,
        *,
        position: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        packed = self._multiplied_with(weight)
        return packed.rows(grad_output, index, position=position, onto=onto)

    def _multiplied_with(self, weight: Tensor) -> PackedWeight:
        """The weight in 8 bits: the copy, made anew if it is out of date, or one for this product."""
        scale = self._follow(weight)
        packed: PackedWeight = self._packed if self.copy else self._pack(weight.detach(), scale)
        return packed

    @abstractmethod
    def _pack(self, weight: Tensor, scale: Tensor) -> PackedWeight:
        """The weight in 8 bits, by these scales."""
