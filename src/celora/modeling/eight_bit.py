"""The forward of a frozen layer in 8 bits: `y = x W^T + b` from the copy of W that its backward multiplies with.

In: the layer's input, (..., in). Out: its output, (..., out), in the same dtype. It is an estimate, so a model that
trains with it is a slightly other model, as one with a quantised base is. Evaluation and generation use it, too, while
celora is attached. What it loses is measured at refreshes. A layer that loses too much goes back to its own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from celora.errors import CELoraError
from celora.modeling.compiled import forward_product
from celora.modeling.graft import LayerGraft, without_autocast
from celora.modeling.own_forward import OwnForward
from celora.modeling.switch import Mode
from celora.modeling.trial import tampered
from celora.numerics.measured import Measured
from celora.weights.read import bias_of, is_trainable, plain_weight, shape_of

MOST = 0.1  # relative error from which on a layer keeps its own forward; rounding alone makes about 0.01


class EightBitForward(OwnForward):
    """The forward of one frozen linear layer.

    Attributes:
        graft: the layer's, whose product multiplies.
        measured: the error of the output, of a refresh that is under way.
        exact: whether the layer has gone back to its own forward.
    """

    name = "frozen forwards in 8 bits"

    def __init__(self, graft: LayerGraft) -> None:
        super().__init__(graft.switch)
        self.graft = graft
        self.measured = Measured()
        self.exact = False

    def applies(self, module: nn.Module) -> bool:
        return self.switch.on and self.switch.forwards and not self.exact

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        weight = self._weight(module, x)
        if weight is None or not isinstance(x, Tensor):
            return type(module).forward(module, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _Forward.apply(x, weight, bias_of(module), self.graft)  # type: ignore[no-untyped-call]
        if not torch.compiler.is_compiling() and module.training and self.graft.mode is Mode.OBSERVE:
            self._measure(module, x, y)
        return y

    def _weight(self, module: Any, x: object) -> Tensor | None:
        """The frozen weight to multiply x with, (out, in); None if it is not at hand or something stands in the way."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel() or is_trainable(module):
            return None
        weight = plain_weight(module)
        if weight is None or weight.is_meta or weight.shape != shape_of(module):
            return None
        if torch.compiler.is_compiling():
            return weight
        if type(x) is not Tensor:  # a tensor without numbers, as tools for memory and shapes have them
            return None
        if weight.device != x.device:
            raise CELoraError(
                f"{self.graft.name} is on {weight.device} and its input on {x.device}; forward='int8' does not work "
                "under nn.DataParallel: use one process a device, or forward='exact'."
            )
        return None if tampered(module, self.graft) else weight

    @torch.no_grad()
    def _measure(self, module: Any, x: Tensor, y: Tensor) -> None:
        exact = type(module).forward(module, x)
        width = y.shape[-1]
        self.measured.measure(y.reshape(-1, width), exact.reshape(-1, width))


class _Forward(torch.autograd.Function):
    """`x W^T + b` in 8 bits. Its backward is exact; the graft puts its own in that one's place where it takes over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, graft: LayerGraft) -> Tensor:
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        ctx.shape = x.shape
        y: Tensor = forward_product(x, weight.detach(), None if bias is None else bias.detach(), graft.key)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        with without_autocast(grad_output.device.type):
            if ctx.needs_input_grad[0]:
                grad_x = (flat @ ctx.weight.to(flat.dtype)).view(ctx.shape)
            if ctx.needs_input_grad[2]:
                grad_bias = flat.sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_bias, None
