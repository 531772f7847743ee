"""One 8-bit weight for `x W^T` and `g W` in C (dot.c): its panels are turned while backward reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from celora.errors import CELoraError
from celora.kernels.c import dot
from celora.kernels.c.library import call_kernel, loaded_library, pointer, supported
from celora.kernels.packed import BothWays, QuantisedRows, positions


class Panels(BothWays):
    """Panels of W's rows, as `x W^T` reads them."""

    def __init__(self, packed: Tensor, scale: Tensor, in_features: int) -> None:
        self.packed, self.scale, self.in_features = packed, scale, in_features
        self._ones = torch.ones(in_features, dtype=torch.float32, device="cpu")

    @classmethod
    def pack(cls, weight: Tensor, scale: Tensor) -> Panels:
        weight = weight if supported(weight) else weight.float().contiguous()
        rows, columns = weight.shape
        panel, step = dot.panel_columns(), int(loaded_library().depth_step())
        panels = -(-rows // max(panel, step)) * max(panel, step) // panel
        packed = torch.empty(panels, -(-columns // step) * step // 4, panel, 4, dtype=torch.uint8, device="cpu")
        inverse = 1 / scale
        call_kernel(
            "pack_rows",
            weight,
            weight.data_ptr(),
            rows,
            columns,
            weight.stride(0),
            inverse.data_ptr(),
            packed.data_ptr(),
        )
        return cls(packed, scale, columns)

    def quantise(self, x: Tensor) -> QuantisedRows:
        return quantise_input(x)

    def multiply(self, x: QuantisedRows, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        rows, columns = x.shape[0], len(self.scale)
        if x.shape[1] != self.in_features:  # the kernel would read past the rows
            raise CELoraError(f"an input of {x.shape[1]} features for a weight of {self.in_features}.")
        out = torch.empty(rows, columns, dtype=x.dtype, device="cpu") if out is None else out
        bias = None if bias is None else bias.float().contiguous()
        call_kernel("quantised_product", out, x.q.data_ptr(), x.scale.data_ptr(), pointer(x.starts), rows,
              self.in_features, self.packed.data_ptr(), self.scale.data_ptr(), pointer(bias), columns,
              out.data_ptr())  # fmt: skip
        return out

    def dense(self) -> Tensor:
        panels, depth, panel, _ = self.packed.shape
        q = self.packed.permute(0, 2, 1, 3).reshape(panels * panel, 4 * depth)[: len(self.scale), : self.in_features]
        return (q.float() - 128) * self.scale[:, None]

    def rows(
        self,
        x: Tensor,
        index: Tensor | None,
        *,
        position: Tensor | None,
        factors: Tensor | None,
        onto: Tensor | None,
    ) -> Tensor:
        g = x if supported(x) else x.float().contiguous()
        if index is not None and position is None:
            position = positions(index, len(g))
        out = g.new_empty(g.shape[0], self.in_features) if onto is None else onto.to(g.dtype)
        dot.gathered_product(
            g,
            self.packed,
            self._ones,
            out,
            index=index,
            position=position,
            factors=None if factors is None else factors.float(),
            fill=onto is None,
            fold=self.scale,
        )
        return out.to(x.dtype)

    def critical_rows(self, x: Tensor, *, kept: int | None, share: float) -> Tensor | None:
        if not supported(x):
            return None
        return dot.critical_product(
            x, self.packed, self._ones, columns=self.in_features, kept=kept, share=share, fold=self.scale
        )


def quantise_input(x: Tensor) -> QuantisedRows:
    """All rows of `x: (T, in)` in 8 bits."""
    dtype = x.dtype
    x = x if supported(x) else x.float().contiguous()
    rows, depth = x.shape
    q = torch.empty(int(loaded_library().scratch_bytes(rows, depth)), dtype=torch.uint8, device="cpu")
    scale = torch.empty(rows, dtype=torch.float32, device="cpu")
    starts = torch.empty(rows, dtype=torch.int32, device="cpu")
    call_kernel("quantise_input", x, x.data_ptr(), rows, depth, x.stride(0), q.data_ptr(), scale.data_ptr(),
          starts.data_ptr())  # fmt: skip
    return QuantisedRows(x.shape, dtype if dtype == torch.bfloat16 else torch.float32, q, scale, starts)
