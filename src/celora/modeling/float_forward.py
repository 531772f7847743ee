"""The forward of a frozen layer, `y = x W^T + b`, where another product than torch's own is faster in its dtype.

In: the layer's input, (..., in). Out: its output, (..., out), in the same dtype or autocast's, the layer's own to
rounding. In evaluation and generation a float32 layer gives the bits that it gives without celora. What is in a dtype
that the CPU does not multiply, or autocast to it, is computed in float32 there, too, where no gradient is asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from celora.kernels import widened
from celora.kernels.backends import choose
from celora.kernels.operations import linear
from celora.modeling.bypass import own_product
from celora.modeling.graft import LayerGraft, in_dispatch_mode
from celora.modeling.hooks import has_another_s_forward
from celora.modeling.own_forward import OwnForward
from celora.modeling.switch import Switch
from celora.modeling.trial import unlike, was_tried
from celora.weights.read import bias_of, is_trainable, plain_weight


class FloatForward(OwnForward):
    """The forward of one frozen linear layer.

    Attributes:
        graft: the layer's graft, if it has one.
    """

    evaluates = True
    graft: LayerGraft | None

    def __init__(self, switch: Switch, graft: LayerGraft | None = None) -> None:
        super().__init__(switch)
        self.graft = graft

    def under(self, module: nn.Module) -> None:
        super().under(module)
        module.register_forward_pre_hook(self.called)

    def leave(self, module: nn.Module) -> None:
        """Undo `under`, and leave celora's other hooks there."""
        del module.__dict__["forward"]
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
            del hooks[key]

    def called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook. A shallow copy, to which quantisers give another weight, has this forward, too."""
        if not torch.compiler.is_compiling():
            self._module = weakref.ref(module)

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        # A wrapper that came later, as accelerate's, may put other weights in for each call.
        weight = None if is_trainable(module) or has_another_s_forward(module) else weight_for(module)
        x = None if weight is None or len(args) != 1 or kwargs else _operand(args[0], weight)
        if weight is None or x is None:
            return type(module).forward(module, *args, **kwargs)
        product = choose("linear", x).name
        # In evaluation, a gradient of any order is the model's own.
        if product == "torch" or not (module.training or (product == "float32" and not torch.is_grad_enabled())):
            return type(module).forward(module, *args, **kwargs)
        if not module.training:
            return linear(x, weight, bias_of(module))
        y: Tensor = _Forward.apply(x, weight, bias_of(module))  # type: ignore[no-untyped-call]
        return y


def other_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The frozen linear layers of `model` that have no such forward yet, and that it makes faster.

    They have no adapter, or one that takes PEFT's own path and calls its base layer.
    """
    parts: set[nn.Module] = set()
    for tuner in model.modules():
        if isinstance(tuner, BaseTunerLayer):
            parts |= {*tuner.modules()} - (set() if own_product(tuner) else {*tuner.get_base_layer().modules()})
    for module in model.modules():
        frozen = isinstance(module, nn.Linear | Conv1D) and module not in parts and not is_trainable(module)
        if frozen and "forward" not in module.__dict__ and weight_for(module) is not None:
            yield module


def weight_for(module: nn.Module) -> Tensor | None:
    """The weight of this linear layer, (out, in), if another product than torch's is faster with it or under autocast.

    None also if no trial shows that the class's forward computes `x W^T + b`. A copy, or a layer with another weight,
    is tried once, but not where something looks at every operator.
    """
    weight = plain_weight(module)
    if weight is None or (choose("linear", weight).name == "torch" and not widened.takes_autocast(weight)):
        return None
    return weight if was_tried(module) or (not in_dispatch_mode() and unlike(module) == "") else None


def _operand(x: object, weight: Tensor) -> Tensor | None:
    """What is multiplied with this weight: x, or what autocast makes of it.

    None if x is no plain tensor with tokens that the layer's own forward would multiply, or autocast is torch's.
    """
    if type(x) is not Tensor or not x.numel() or x.shape[-1] != weight.shape[1] or x.device != weight.device:
        return None
    if not torch.is_autocast_enabled("cpu"):
        return x if x.dtype == weight.dtype else None
    casts = widened.autocasts() and x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)
    return x.to(torch.get_autocast_dtype("cpu")) if casts else None


class _Forward(torch.autograd.Function):
    """`x W^T + b`. Its own backward is exact; where the layer is estimated, the graft replaces it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # As the class's forward saves it without autocast: gradient checkpointing may repeat one by the other.
        ctx.save_for_backward(weight.t() if ctx.needs_input_grad[0] else None)
        return linear(x, weight, bias).data  # not a view, so that the caller may change it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (transposed,) = ctx.saved_tensors
        grad_x = None if transposed is None else linear(grad_output, transposed)
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias
