"""Quantised weights that are de-quantised only when they are read, and only the rows that are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # estimators are written for tensors, and use only what this class has
    _TensorLike = Tensor
else:
    _TensorLike = object


class StoredWeight(_TensorLike):
    """The frozen `(out, in)` weight of a quantised layer. Reading it de-quantises the rows that are read.

    It refers to the layer's own tensors, and makes no copy.

    Attributes:
        owner: the layer's tensor, which identifies this weight; `stored` is its data.
        shape, device: shape and device of the matrix.
        dtype: the dtype that it is de-quantised to.
        compute_dtype: the dtype of the layer's own products; None for the dtype of its activations.
    """

    requires_grad = is_meta = False

    def __init__(
        self, stored: Tensor, shape: torch.Size, dtype: torch.dtype, compute_dtype: torch.dtype | None = None
    ) -> None:
        self.owner, self.stored = stored, stored.data
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, stored.device
        self.compute_dtype = compute_dtype
        self._version = stored._version

    @property
    def packed(self) -> Any:
        """What multiplies with the bytes of a layer of celora's own (`celora.kernels.packed.BothWays`); else None."""
        return None

    @property
    def integers(self) -> tuple[Tensor, Tensor] | None:
        """q: (out, in) int8 and s: (out,) float32 if the stored matrix is `diag(s) q`; else None. q is not copied."""
        return None

    def dense(self) -> Tensor:
        """The whole matrix, (out, in), in `dtype`."""
        raise NotImplementedError

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index: (K,)` of the matrix: (K, in), in `dtype`."""
        return self.dense()[index]

    def detach(self) -> Tensor:
        return self.dense()

    def to(self, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        return self.dense().to(dtype)

    def __getitem__(self, index: Tensor) -> Tensor:  # type: ignore[override]
        return self.rows(index)


class SelectedRows(StoredWeight):
    """Rows `index: (K,)` of a weight from `read`. They are read when a product makes its copy of them."""

    def __init__(self, weight: Tensor, index: Tensor) -> None:
        super().__init__(owner_of(weight), torch.Size((len(index), weight.shape[1])), weight.dtype)
        self.whole, self.kept = weight, index

    def dense(self) -> Tensor:
        return rows_of(self.whole, self.kept, self.dtype)


def owner_of(weight: Tensor) -> Tensor:
    """The tensor that identifies this weight: the base of a view, or a quantised layer's own tensor."""
    if isinstance(weight, StoredWeight):
        return weight.owner
    return weight if weight._base is None else weight._base


def rows_of(weight: Tensor, index: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """Rows `index: (K,)` of a weight from `read`: (K, in), in `dtype`; into `out` if given.

    For a tensor this is faster than `weight[index]`: on CPU, that copies number by number, and `index_select` row by
    row.
    """
    if isinstance(weight, StoredWeight):
        rows = weight[index].to(dtype)
    elif out is not None and weight.dtype == dtype:
        return torch.index_select(weight.detach(), 0, index, out=out)
    else:
        rows = weight.detach().index_select(0, index).to(dtype)
    return rows if out is None else out.copy_(rows)
