"""What a backend makes of a frozen weight `W: (out, in)` to multiply with it in 8 bits.

`PackedWeight` serves the backward alone, `W ~= q diag(s)` with one scale per input column. A gradient is quantised with
one scale per row, so both scales stand outside the sum over `out`:

    G W ~= diag(s_G) (q_G q) diag(s).

`BothWays` serves forward and backward from the same bytes, `W ~= diag(s) q` with one scale per output channel. In
backward, that scale is folded into the gradient before the gradient is quantised:

    x W^T ~= diag(s_x) (q_x q^T) diag(s),    G W = (G diag(s)) q ~= diag(s_G) q_(G diag(s)) q.

A few features of an input may be a hundred times larger than the rest and coarsen its scale. With a scale u per input
feature, `W ~= diag(s) q diag(u)`: the input is multiplied with u before it is quantised, `grad_input` with u at the end
(SmoothQuant, arXiv 2211.10438).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from celora.kernels.backends import choose


class PackedWeight(ABC):
    """A weight in 8 bits, laid out as one backend multiplies `G W` with it.

    Attributes:
        scale: of its columns, (in,) float32.
    """

    scale: Tensor

    @abstractmethod
    def rows(
        self,
        x: Tensor,
        index: Tensor | None,
        *,
        position: Tensor | None,
        onto: Tensor | None,
    ) -> Tensor:
        """`x[t] W` at each row t of `index` of `x: (T, out)`, all rows if `index` is None: (T, in).

        The other rows are those of `onto`, which is overwritten, or 0 without. `position`, the inverse of `index`,
        (T,) int32, may be given where it is known.
        """

    def critical_rows(self, x: Tensor, *, kept: int | None, share: float) -> Tensor | None:
        """`rows` of the `kept` rows with the largest norms, or of as many as hold `share` of their squared sum.

        None where choosing and multiplying are two steps.
        """
        return None


@dataclass(frozen=True)
class QuantisedRows:
    """Rows of an input in 8 bits, `x ~= diag(scale) q diag(u)^-1`, to be multiplied with weights of one backend.

    Attributes:
        q: the numbers, (T, in) int8. The backend knows what lies between and behind its rows.
        scale: of each row, (T,) float32.
        input_scale: u, (in,) float32; None for 1.
        apart: features of x that are 0 in q, (k,) int64; None if there are none.
        values: these features of x, (T, k), in x's dtype.
        starts: what the backend takes off each row's sums, (T,) int32, if anything.
    """

    q: Tensor
    scale: Tensor
    input_scale: Tensor | None = None
    apart: Tensor | None = None
    values: Tensor | None = None
    starts: Tensor | None = None

    def transposed_product(self, p: Tensor, mask: Tensor | None) -> Tensor:
        """`p^T (x * mask)` of `p: (T, r)`, `mask: (T, in)` bool or None: (r, in), in p's dtype or float32."""
        p = p if p.dtype == torch.bfloat16 else p.float()
        scaled = (p * self.scale[:, None]).to(p.dtype)
        multiply = choose("transposed_product", p).run
        y: Tensor = multiply(scaled, self.q if mask is None else self.q.to(p.dtype).mul_(mask))
        y = y if self.input_scale is None else y.div_(self.input_scale)
        if self.apart is None or self.values is None:
            return y
        values = self.values if mask is None else self.values * mask[:, self.apart]
        return y.index_copy_(1, self.apart, multiply(p, values.to(p.dtype)))


class BothWays(PackedWeight):
    """A weight in 8 bits for both directions.

    Attributes:
        scale: of its rows, (out,) float32.
        input_scale: of its columns, u, (in,) float32; None for 1.
        stored: all its numbers, a byte each, as this backend lays them out.
    """

    stored: Tensor
    input_scale: Tensor | None

    @classmethod
    @abstractmethod
    def holding(cls, stored: Tensor, scale: Tensor, in_features: int) -> BothWays:
        """The weight that has these bytes, which are not copied."""

    @classmethod
    def fits(cls, stored: Tensor, out_features: int, in_features: int) -> bool:
        """Whether these bytes of a weight `(out, in)`, perhaps of another machine, lie as this class reads them."""
        return True

    @abstractmethod
    def integers(self, index: Tensor | None = None) -> Tensor:
        """q, int8 (out, in), or its rows `index`: a copy if `stored` has another layout."""

    @abstractmethod
    def columns(self, index: Tensor) -> Tensor:
        """`q[:, index]` for `index: (k,)`: (out, k) int8, a copy."""

    @abstractmethod
    def quantise(self, x: Tensor) -> QuantisedRows:
        """Quantise `x: (T, in)` for `multiply`, for every weight of this backend with the same `input_scale`."""

    @abstractmethod
    def multiply(self, x: QuantisedRows, bias: Tensor | None, out: Tensor) -> Tensor:
        """`x W^T + bias`: (T, out), written into `out`, float32 or bfloat16, contiguous. `bias`: (out,) or None."""

    def multiply_into(self, x: QuantisedRows, bias: Tensor | None, out: Tensor) -> Tensor:
        """`multiply` for an `out` of any dtype."""
        if out.dtype in (torch.float32, torch.bfloat16):
            return self.multiply(x, bias, out)
        return out.copy_(self.multiply(x, bias, torch.empty_like(out, dtype=torch.float32)))

    def dense(self, dtype: torch.dtype = torch.float32, index: Tensor | None = None) -> Tensor:
        """`diag(s) q`, (out, in), or its rows `index`: the weight that both directions multiply with."""
        scale = self.scale if index is None else self.scale[index]
        dense = self.integers(index).to(dtype).mul_(scale[:, None])
        return dense if self.input_scale is None else dense.mul_(self.input_scale)


class LibraryPacked(PackedWeight):
    """A weight for a library's 8-bit product. Rows are quantised before it; scales are applied after it.

    Attributes:
        column_scale: what the sums are multiplied with, (in,) float32; None if the product has done so.
    """

    offset = 0  # added to quantised rows: 128 where a library wants them unsigned
    column_scale: Tensor | None = None

    @abstractmethod
    def product(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """`q W` for quantised rows `q: (K, out)`: the bare sums, int32, or with the column scales applied already."""

    def quantised(self, x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows `index` of x, all of them if None, as `product` takes them, and their scales."""
        found: tuple[Tensor, Tensor] = choose("quantise_rows", x).run(x, index, offset=self.offset)
        return found

    def rows(
        self,
        x: Tensor,
        index: Tensor | None,
        *,
        position: Tensor | None,
        onto: Tensor | None,
    ) -> Tensor:
        q, row_scale = self.quantised(x, index)
        y = self.product(q, x.dtype)
        out: Tensor = choose("scatter_rows", x).run(
            y, x, index, position=position, row_scale=row_scale, column_scale=self.column_scale, onto=onto
        )
        return out


def positions(index: Tensor, rows: int) -> Tensor:
    """The inverse of `index`: where row t went, or -1: (rows,) int32."""
    position = torch.full((rows,), -1, dtype=torch.int32, device=index.device)
    position[index] = torch.arange(len(index), dtype=torch.int32, device=index.device)
    return position
