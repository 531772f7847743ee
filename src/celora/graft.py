"""An estimated backward grafted onto an exact forward.

A forward hook on the frozen base layer takes the output the layer has just computed, cuts it from the graph, and
returns it unchanged as the output of an autograd node of our own. So the forward is PEFT's, bit for bit, whatever
wraps it; only `grad_input = grad_output @ W` goes through the layer's estimator.
"""

from __future__ import annotations

import enum
import itertools
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from celora.estimators import Estimator
from celora.sharded import whole


class Mode(enum.Enum):
    """What a grafted layer does in backward."""

    ESTIMATE = "estimate"
    OBSERVE = "observe"  # exact backward that gathers statistics: a refresh step
    EXACT = "exact"


class Switch:
    """Shared by the grafts of one attachment; off once the attachment is gone, and in every copy of it.

    Copies of a model's parts (deepcopy, pickle, what is left after `merge_and_unload`) have no clock that would refresh
    them, so their layers must compute the exact backward. A copy of the whole model switches itself on again.
    """

    def __init__(self) -> None:
        self.on = True

    def __getstate__(self) -> dict[str, bool]:
        return {"on": False}


_keys = itertools.count()
_layers: weakref.WeakValueDictionary[int, LayerGraft] = weakref.WeakValueDictionary()


class LayerGraft:
    """The forward hook of one base layer, with the layer's estimator and what it measured of itself."""

    def __init__(self, estimator: Estimator, switch: Switch) -> None:
        self._register()
        self.estimator = estimator
        self.switch = switch
        self.mode = Mode.OBSERVE
        self.observed = False
        self.squared_error: Tensor | None = None
        self.squared_norm: Tensor | None = None

    def _register(self) -> None:
        self.key = next(_keys)
        _layers[self.key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self.switch.on or self.mode is Mode.EXACT or not args or not torch.is_grad_enabled():
            return None
        # The replicas of nn.DataParallel run in threads that would share this one layer's statistics.
        if getattr(module, "_is_replica", False):
            return None
        assert isinstance(module, nn.Linear)
        x, weight, bias = args[0], module.weight, module.bias
        if not x.requires_grad or weight.requires_grad:
            return None
        return graft(x, output, weight, bias, self)

    def grad_input(self, grad_output: Tensor, weight: Tensor, mode: Mode) -> Tensor:
        """`(T, out) , (out, in) -> (T, in)`: estimated, or exact while observing."""
        if mode is Mode.EXACT:
            return grad_output @ whole(weight, grad_output.dtype)
        if isinstance(weight, DTensor) and (mode is Mode.OBSERVE or self.estimator.needs_whole(weight)):
            weight = whole(weight, grad_output.dtype)
        compiling = torch.compiler.is_compiling()
        if mode is Mode.ESTIMATE:
            if compiling and not self.estimator.traceable:
                estimated: Tensor = _estimated(grad_output, weight, self.key)
                return estimated
            return self.estimator.estimate(grad_output, weight)
        if compiling:
            observed: Tensor = _observed(grad_output, weight, self.key)
            return observed
        return self.observe(grad_output, weight)

    def observe(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """The exact `grad_input`; on the way, the error of the selection in use and the statistics of the next."""
        self.observed = True
        exact = grad_output @ weight.to(grad_output.dtype)
        if self.estimator.ready:
            self._measure(self.estimator.estimate(grad_output, weight), exact)
        self.estimator.observe(grad_output, weight, exact)
        return exact

    def _measure(self, estimate: Tensor, exact: Tensor) -> None:
        """Add to the squared error of the selection in use, and to the squared norm it is relative to."""
        error = norm = torch.zeros((), device=exact.device)
        # Row block by row block: a refresh step should not need more memory than the others.
        for e, x in zip(estimate.split(1024), exact.split(1024), strict=True):
            x = x.float()
            norm = norm + x.square().sum()
            error = error + (e.float() - x).square().sum()
        finite = torch.isfinite(error + norm)
        error, norm = torch.where(finite, error, 0), torch.where(finite, norm, 0)
        if self.squared_error is None or self.squared_norm is None:
            self.squared_error, self.squared_norm = error, norm
        else:
            self.squared_error += error
            self.squared_norm += norm


def graft(x: Tensor, output: Tensor, weight: Tensor, bias: Tensor | None, layer: LayerGraft) -> Tensor:
    """`output`, unchanged, whose backward to `x: (..., in)` is `layer`'s and to a trainable `bias` is exact.

    Args:
        x: the layer's input, any number of leading dimensions; only its dtype and shape are used.
        output: the layer's output `x W^T + b`, (..., out).
        weight: frozen, (out, in). Kept by reference: nothing is saved for backward.
        bias: (out,) or None; gets `grad_output.sum(0)` if it requires grad (PEFT's `bias="lora_only"`).
        layer: whose mode at this moment decides what its backward will be.
    """
    result: Tensor = _Graft.apply(x, output.detach(), bias, weight, layer)  # type: ignore[no-untyped-call]
    return result


# Compiled graphs may not change Python objects, so there a refresh step calls the layer through an opaque operator; so
# does an estimate that torch.compile cannot look into.
@torch.library.custom_op("celora::observed_grad_input", mutates_args=())
def _observed(grad_output: Tensor, weight: Tensor, key: int) -> Tensor:
    return _layers[key].observe(grad_output, weight)


@_observed.register_fake
def _(grad_output: Tensor, weight: Tensor, key: int) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], weight.shape[1])


@torch.library.custom_op("celora::estimated_grad_input", mutates_args=())
def _estimated(grad_output: Tensor, weight: Tensor, key: int) -> Tensor:
    return _layers[key].estimator.estimate(grad_output, weight)


@_estimated.register_fake
def _(grad_output: Tensor, weight: Tensor, key: int) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], weight.shape[1])


def remember(ctx: Any, x: Tensor, output: Tensor, bias: Tensor | None, weight: Tensor, layer: LayerGraft) -> None:
    """What the backward of any grafted layer needs, saving no tensor; `output` is what its forward returns."""
    ctx.weight, ctx.layer, ctx.mode = weight, layer, layer.mode
    ctx.input_shape, ctx.input_dtype = x.shape, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    # Dirty rather than a view, so that the caller may change it in place, as it may a linear layer's output.
    ctx.mark_dirty(output)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Products in the dtypes they are given; costs nothing where autocast is off."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Graft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, bias: Tensor | None, weight: Tensor, layer: LayerGraft) -> Tensor:
        remember(ctx, x, output, bias, weight, layer)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_input = grad_bias = None
        with without_autocast(grad_output.device.type):
            flat = grad_output.reshape(-1, grad_output.shape[-1])
            if ctx.needs_input_grad[0]:
                grad_input = ctx.layer.grad_input(flat, ctx.weight, ctx.mode)
                grad_input = grad_input.view(ctx.input_shape).to(ctx.input_dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = flat.sum(0).to(ctx.bias_dtype)
        return grad_input, None, grad_bias, None, None
