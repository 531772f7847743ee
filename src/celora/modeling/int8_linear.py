"""A frozen linear layer whose weight is stored in 8 bits only: `W ~= diag(s) q`, one byte a number.

In: (..., in). Out: `x W^T + b`, (..., out), in x's dtype. The layer's own products are exact for the weight `diag(s)
q`. Each product de-quantises it and frees it again. celora's estimators and 8-bit forwards (`celora.attach`) multiply
with the same bytes without de-quantising them: the bytes have the layout of this machine's kernel, for both directions.

To PEFT the layer is an `nn.Linear`. PEFT reads the weight through `W_q` and `dequantize()`, as with HQQ. Merging an
adapter turns the layer back into a plain `nn.Linear`, with the original weight from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from celora.errors import CELoraError
from celora.kernels.operations import available, hold_both_ways, linear, pack_both_ways
from celora.kernels.packed import BothWays
from celora.kernels.plain import IntegersBothWays, row_scales
from celora.weights.checkpoint import Origin
from celora.weights.stored import StoredWeight

_OWN = ("W_q", "scale", "dtype", "layout", "origin", "on_original")
_OF_LORA_GA = "_peft_loraga"  # what PEFT's preprocess_loraga stores in a layer; get_peft_model then changes its weight
_CHANGES_THE_BASE = (
    "PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and KaSA change base weights, and one in 8 bits would silently become a float "
    "weight; call get_peft_model first, and celora.quantise_base(model) after it, or use plain LoRA."
)


def prepared_for_lora_ga(linear: nn.Module) -> bool:
    """Whether LoRA-GA will change this layer's weight when its adapter is made."""
    return any(name.startswith(_OF_LORA_GA) for name in vars(linear))


def quantised(weight: Tensor, scale: Tensor | None = None) -> BothWays:
    """`weight: (out, in)` in 8 bits, in the layout of this machine's kernel. `scale`: scales of its rows, if known."""
    pack = pack_both_ways if available("pack_both_ways", weight.device) else IntegersBothWays.pack
    packed: BothWays = pack(weight, row_scales(weight) if scale is None else scale)
    return packed


class Int8Linear(nn.Linear):
    """`y = x W^T + b` with a frozen W in 8 bits.

    Attributes:
        W_q: the bytes of W, in the layout of class `layout`.
        scale: scales of W's rows, (out,); they stay float32 whatever dtype the model is moved to.
        dtype: dtype of the weight before; a merged layer has it again.
        layout: the class that multiplies with the bytes.
        origin: where the weight came from, or None.
        on_original: reads the original weight again in each forward, which computes with it; None: W is in 8 bits.
    """

    W_q: nn.Parameter
    scale: Tensor

    def __init__(self, packed: BothWays, in_features: int, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, len(packed.scale)
        self.register_parameter("W_q", nn.Parameter(packed.stored, requires_grad=False))
        self.register_buffer("scale", packed.scale)
        self.register_parameter("bias", bias)
        self.dtype, self.layout = dtype, type(packed)
        self.origin: Origin | None = None
        self.on_original: Callable[[], Tensor] | None = None

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """This layer in 8 bits. The bias is shared.

        Raises:
            CELoraError: the weight is not finite.
        """
        weight = linear.weight.detach()
        scale = row_scales(weight)
        if not bool(scale.isfinite().all()):
            raise CELoraError("its weight is not finite")
        layer = cls(quantised(weight, scale), linear.in_features, linear.bias, weight.dtype)
        return layer.train(linear.training)

    @property
    def packed(self) -> BothWays:
        """The packed weight that multiplies with these bytes, without a copy.

        Bytes that lie row by row are torch's and Triton's alike. Which of them multiplies may change: the
        layer may be moved to another GPU.
        """
        device = self.W_q.device
        by_rows = issubclass(self.layout, IntegersBothWays) and not torch.compiler.is_compiling()
        if by_rows and available("hold_both_ways", device):
            return hold_both_ways(self.W_q.detach(), self.scale)
        return self.layout.holding(self.W_q.detach(), self.scale, self.in_features)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """An object that behaves like W. Its numbers can be read, and merging can replace them."""
        return _Weight(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.replace(value)
        elif name.startswith(_OF_LORA_GA):
            raise CELoraError(_CHANGES_THE_BASE)
        else:
            super().__setattr__(name, value)

    def replace(self, weight: Tensor) -> None:
        """Become an `nn.Linear` with this weight."""
        if isinstance(weight, _Weight):
            return  # PEFT assigns a layer its own weight
        for name in _OWN:
            delattr(self, name)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.register_parameter("weight", nn.Parameter(weight.detach(), requires_grad=False))

    def stored_weight(self, dtype: torch.dtype | None) -> StoredWeight:
        """W for estimators; see `celora.weights.read`."""
        return _Weight(self, dtype)

    def dequantize(self) -> Tensor:
        """`diag(s) q` in `dtype`, (out, in). PEFT calls this if a variant of LoRA needs the weight."""
        return self.packed.dense(self.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would trace the reading of a file
    def read_again(self) -> Tensor:
        """What the checkpoint has now under the name of the original weight, (out, in) in `dtype`.

        Raises:
            CELoraError: it cannot be read, or has another shape.
        """
        if self.origin is None:
            raise CELoraError("it is not known where its original weight came from")
        weight = self.origin.read().to(self.W_q.device, self.dtype)
        if weight.shape != (self.out_features, self.in_features):
            raise CELoraError(f"{self.origin.name!r} in {self.origin.model!r} has another shape by now")
        return weight

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would trace the reading of a file
    def original(self) -> Tensor:
        """The original weight, (out, in) in `dtype`, read from its checkpoint.

        Raises:
            CELoraError: it cannot be read, or has changed, or FSDP2 has split the bytes that it is compared with.
        """
        weight: Tensor = self.read_again()
        assert self.origin is not None
        if isinstance(self.W_q, DTensor):
            raise CELoraError("FSDP2 has split its bytes over processes")
        again, step = quantised(weight).dense(), self.scale[:, None]
        if not bool(((again - self.packed.dense()).abs() <= 1.01 * step).all()):
            raise CELoraError(
                f"{self.origin.name!r} in {self.origin.model!r} is not the weight that was quantised: it is another "
                "one by now, or the initialisation of an adapter changed it before"
            )
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.on_original is not None:
            return F.linear(x, self.on_original().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        y: Tensor = _Linear.apply(x, self.W_q, self.scale, self.bias, self.layout)  # type: ignore[no-untyped-call]
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """For `nn.Module.to` and the like. Scales stay float32, and the bytes get the layout of the new device."""
        before, device = self.packed, self.W_q.device
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        now = self.W_q.device
        if self.scale.dtype != torch.float32:
            self.scale = before.scale.to(now)
        if now.type != device.type and "meta" not in (now.type, device.type):
            self._lay_out(before.integers().to(now))
        return self

    def _lay_out(self, integers: Tensor) -> None:
        """Hold these bytes, int8 (out, in), in the layout of this machine's kernel."""
        packed = quantised(integers, torch.ones_like(self.scale))
        self.W_q, self.layout = nn.Parameter(packed.stored, requires_grad=False), type(packed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For `torch.load` and copies. Another machine's kernel may have had another layout."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if not self.W_q.is_meta and not self.layout.fits(self.W_q, self.out_features, self.in_features):
            self._lay_out(self.packed.integers())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight in 8 bits"


class _Weight(StoredWeight):
    """The weight of an `Int8Linear`."""

    def __init__(self, layer: Int8Linear, dtype: torch.dtype | None = None) -> None:
        shape = torch.Size((layer.out_features, layer.in_features))
        super().__init__(layer.W_q, shape, dtype or layer.dtype)
        self.layer, self.is_meta = layer, layer.W_q.is_meta

    @property
    def packed(self) -> BothWays | None:
        # FSDP2 moves the bytes to its device without `_apply`, so their layout may be that of another device.
        fits = available("pack_both_ways", self.device) and self.layer.layout.fits(self.stored, *self.shape)
        return self.layer.packed if fits else None

    def dense(self) -> Tensor:
        return self.layer.packed.dense(self.dtype)

    def to(self, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        return self.layer.packed.dense(dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self.layer.packed.dense(self.dtype, index)

    @property
    def data(self) -> Tensor:
        """The original weight, for PEFT to merge an adapter into. From now on the layer has it."""
        try:
            original = self.layer.original()
        except CELoraError as error:
            raise CELoraError(
                f"an adapter cannot be merged into a base in 8 bits: {error}; load the model in its own dtype, put the "
                "saved adapter onto it (PeftModel.from_pretrained), and merge there. Save it as plain LoRA for that "
                "after PiSSA, OLoRA, CorDA or LoRA-GA (save_pretrained with path_initial_model_for_weight_conversion)."
            ) from None
        self.layer.replace(original)
        return self.layer.weight.data  # type: ignore[no-any-return]

    @data.setter
    def data(self, merged: Tensor) -> None:
        layer: Any = self.layer  # reading the original weight made it an nn.Linear
        if isinstance(layer, Int8Linear):  # no adapter is merged into a weight that was not read
            raise CELoraError(_CHANGES_THE_BASE)
        layer.weight.data = merged


class _Linear(torch.autograd.Function):
    """`x W^T + b`. W is de-quantised in forward and again in backward; only its bytes are saved."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None, layout: type[BothWays]
    ) -> Tensor:
        ctx.save_for_backward(stored, scale)
        ctx.layout, ctx.in_features = layout, x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        weight = layout.holding(stored, scale, x.shape[-1]).dense(x.dtype)
        return linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        stored, scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = ctx.layout.holding(stored, scale, ctx.in_features).dense(grad_output.dtype)
            grad_x = linear(grad_output, weight.t())
        if ctx.needs_input_grad[3]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, None, grad_bias, None
