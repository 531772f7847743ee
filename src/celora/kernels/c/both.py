"""One 8-bit weight for `x W^T` and `g W` in C (dot.c): its panels are turned while backward reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from celora.errors import CELoraError
from celora.kernels.c import dot
from celora.kernels.c.library import ask_kernel, call_kernel, known, pointer, up_to
from celora.kernels.packed import BothWays, QuantisedRows

_ROWS = 1024  # that are packed at a time, whole panels


class TurnedPanels(dot.Panels, BothWays):
    """Panels of W's rows, as `x W^T` reads them; turned for `g W`, with W's scales folded into g."""

    def __init__(self, packed: Tensor, scale: Tensor, in_features: int, input_scale: Tensor | None = None) -> None:
        self.stored = self.packed = packed
        self.scale, self.fold, self.in_features, self.input_scale = scale, scale, in_features, input_scale
        ones = torch.ones(in_features, dtype=torch.float32, device="cpu")
        self.column_scale = ones if input_scale is None else input_scale

    @classmethod
    def holding(cls, stored: Tensor, scale: Tensor, in_features: int) -> TurnedPanels:
        return cls(stored, scale, in_features)

    @classmethod
    def fits(cls, stored: Tensor, out_features: int, in_features: int) -> bool:
        here = stored.device.type == "cpu" and dot.panel_columns() > 0
        return here and (stored.shape, stored.dtype) == _layout(out_features, in_features)

    @classmethod
    def pack(cls, weight: Tensor, scale: Tensor, input_scale: Tensor | None = None) -> TurnedPanels:
        inverse, panel, columns = 1 / scale, dot.panel_columns(), weight.shape[1]
        shape, kind = _layout(*weight.shape)
        packed = torch.empty(shape, dtype=kind, device="cpu")
        for start in range(0, len(weight), _ROWS):  # no copy of a large weight
            part = weight[start : start + _ROWS]
            w = known(part if input_scale is None else part / input_scale)
            call_kernel("pack_rows", w, w.data_ptr(), *w.shape, w.stride(0), inverse[start:].data_ptr(),
                  packed[start // panel :].data_ptr())  # fmt: skip
        return cls(packed, scale, columns, input_scale)

    def quantise(self, x: Tensor) -> QuantisedRows:
        x = known(x)
        rows, depth = x.shape
        space = torch.empty(ask_kernel("quantised_bytes", rows, depth), dtype=torch.int8, device="cpu")
        stride = ask_kernel("row_stride", depth)
        q = space.as_strided((rows, depth), (stride, 1), -space.data_ptr() % 64)  # where the kernel begins
        scale = torch.empty(rows, dtype=torch.float32, device="cpu")
        starts = torch.empty(rows, dtype=torch.int32, device="cpu")
        call_kernel("quantise_input", x, x.data_ptr(), rows, depth, x.stride(0), pointer(self.input_scale),
              q.data_ptr(), scale.data_ptr(), starts.data_ptr())  # fmt: skip
        return QuantisedRows(q, scale, self.input_scale, starts=starts)

    def multiply(self, x: QuantisedRows, bias: Tensor | None, out: Tensor) -> Tensor:
        (rows, depth), columns = x.q.shape, len(self.scale)
        if depth != self.in_features:  # the kernel would read past the rows
            raise CELoraError(f"an input of {depth} features for a weight of {self.in_features}.")
        bias = None if bias is None else bias.float().contiguous()
        call_kernel("quantised_product", out, x.q.data_ptr(), x.scale.data_ptr(), pointer(x.starts), rows,
              self.in_features, self.packed.data_ptr(), self.scale.data_ptr(), pointer(bias), columns,
              out.data_ptr())  # fmt: skip
        return out

    def integers(self, index: Tensor | None = None) -> Tensor:
        panel = self.packed.shape[2]
        if index is None:
            q = self.packed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[: len(self.scale)]
        else:
            q = self.packed[index // panel, :, index % panel].flatten(1)
        return _signed(q[:, : self.in_features])

    def columns(self, index: Tensor) -> Tensor:
        together = self.packed.shape[3]
        q = self.packed[:, index // together, :, index % together]  # (k, panels, columns of a panel)
        return _signed(q.flatten(1)[:, : len(self.scale)].t())


def _signed(q: Tensor) -> Tensor:
    return q if q.dtype == torch.int8 else (q ^ 128).view(torch.int8)


def _layout(rows: int, columns: int) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype of the panels of a weight `(rows, columns)` in the tier that is used."""
    panel, step = dot.panel_columns(), ask_kernel("depth_step")
    panels = up_to(rows, max(panel, step)) // panel
    kind = torch.uint8 if ask_kernel("offset") else torch.int8  # in some tiers bytes are unsigned: q + 128
    return torch.Size((panels, *dot.panel_shape(columns))), kind
