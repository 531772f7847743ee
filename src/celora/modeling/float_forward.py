"""The forward of a frozen float32 layer, `y = x W^T + b`, where another library than torch's own multiplies faster.

In: the layer's input, (..., in) float32. Out: its output, (..., out) float32, the layer's own to rounding. Only while
the layer trains: what it gives in evaluation and generation has the bits that it has without celora.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from celora.kernels.backends import choose
from celora.kernels.operations import linear
from celora.modeling.graft import LayerGraft
from celora.modeling.own_forward import OwnForward
from celora.weights.read import bias_of, is_trainable, plain_weight, unreadable


class FloatForward(OwnForward):
    """The forward of one frozen linear layer, whose class has been tried.

    Attributes:
        graft: the layer's graft.
    """

    name = "frozen forwards by oneDNN"

    def __init__(self, graft: LayerGraft, base: nn.Module) -> None:
        super().__init__(graft.switch)
        self.graft = graft
        self._tried: Any = type(base).forward

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tried": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        module = self._module()
        self._tried = None if module is None else type(module).forward

    @staticmethod
    def pays(module: nn.Module) -> bool:
        """Whether another library multiplies with the weight of this linear layer."""
        weight = None if unreadable(module) else plain_weight(module)
        return weight is not None and choose("linear", weight).name != "torch"

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not self._takes(module, x):
            return type(module).forward(module, *args, **kwargs)
        y: Tensor = _Forward.apply(x, plain_weight(module), bias_of(module))  # type: ignore[no-untyped-call]
        return y

    def _takes(self, module: nn.Module, x: Any) -> bool:
        """Whether the layer is frozen, of the class that was tried, and would multiply these numbers in float32."""
        if type(x) is not Tensor or not x.numel() or torch.is_autocast_enabled(x.device.type):
            return False
        if type(module).forward is not self._tried or is_trainable(module) or not self.pays(module):
            return False
        weight = plain_weight(module)
        return weight is not None and x.dtype == weight.dtype and x.shape[-1] == weight.shape[1]


class _Forward(torch.autograd.Function):
    """`x W^T + b`. Its own backward is exact; where the layer is estimated, the graft replaces it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None)
        return linear(x, weight, bias).data  # not a view, so that the caller may change it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        grad_x = None if weight is None else linear(grad_output, weight.t())
        return grad_x, None, grad_output.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
