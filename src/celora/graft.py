"""An estimated backward grafted onto an exact forward.

A forward hook on the frozen base layer takes the output the layer has just computed, cuts it from the graph, and
returns it unchanged as the output of an autograd node of our own. So the forward is PEFT's, bit for bit, whatever
wraps it; only `grad_input = grad_output @ W` goes through the layer's estimator.
"""

from __future__ import annotations

import enum
import itertools
import math
import operator
import warnings
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from celora.borrowed import borrow
from celora.errors import CELoraError
from celora.estimators import Estimator
from celora.select import measurable, squared_row_norms
from celora.sharded import whole
from celora.trial import identity, tampered, unlike
from celora.weights import StoredWeight, bias_of, held, read


class Mode(enum.Enum):
    """What a grafted layer does in backward."""

    ESTIMATE = "estimate"
    OBSERVE = "observe"  # exact backward that gathers statistics: a refresh step
    EXACT = "exact"


class Switch:
    """Shared by the grafts of one attachment; off once the attachment is gone, and in every copy of it.

    Copies of a model's parts (deepcopy, pickle, what is left after `merge_and_unload`) have no clock that would refresh
    them, so their layers must compute the exact backward, which a copy says when it trains. A copy of the whole model
    switches itself on again.

    Attributes:
        compiled: whether layers have run in graphs of torch.compile; each is made for all layers' modes at once.
        modes: whether layers were in training mode when they ran since the last step, as far as it matters.
        left: layers that could not be taken over when they ran, with the reason.
    """

    def __init__(self) -> None:
        self.on = True
        self.compiled = False
        self.modes: set[bool] = set()
        self.left: dict[str, str] = {}
        self._more: list[str] = []
        self._copied = False
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on": False, "compiled": False, "_copied": True}

    def trains(self) -> None:
        """A layer trains while this is off."""
        if self._copied and not torch.compiler.is_compiling():
            self._copied = False
            warnings.warn(
                "celora: this is a copy of a part of the model that celora was attached to, so its backward is exact. "
                "Copy the whole model, or call celora.attach on the copy.",
                stacklevel=2,
            )

    def leave(self, name: str, reason: str) -> None:
        """A layer keeps PEFT's own backward. The first with this reason says so; others are named after the step."""
        if torch.compiler.is_compiling() or name in self.left:
            return
        self.left[name] = reason
        if reason in self._said:
            self._more.append(name)
        self.say_once(reason, f"{name} keeps PEFT's own backward: {reason}.")

    def name_the_rest(self) -> None:
        """Of the layers that have been left since the last step, those that have not been named."""
        names, self._more = self._more, []
        if names:
            warnings.warn(f"celora: PEFT's own backward also in {', '.join(names)}.", stacklevel=2)

    def say_once(self, kind: str, text: str) -> None:
        """Warn of a `kind` of event the first time that it happens to a layer of this attachment."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"celora: {text}", stacklevel=2)


class Measured:
    """The error of an estimate and the norm of what it estimates, squared, summed since they were last asked for."""

    def __init__(self) -> None:
        self.squared_error: Tensor | None = None
        self.squared_norm: Tensor | None = None

    def measure(self, estimate: Tensor, exact: Tensor) -> None:
        """Add those of these tokens: (T, n) each."""
        error = norm = torch.zeros((), device=exact.device)
        # Row block by row block: a refresh step should not need more memory than the others.
        for e, x in zip(estimate.split(1024), exact.split(1024), strict=True):
            x = x.float()
            norm = norm + x.square().sum()
            error = error + (e.float() - x).square().sum()
        # A gradient that overflowed says nothing of the estimate; an estimate that did, and the gradient not, is none.
        told = measurable(norm)
        error, norm = torch.where(told, error.nan_to_num(math.inf), 0), torch.where(told, norm, 0)
        if self.squared_error is None or self.squared_norm is None:
            self.squared_error, self.squared_norm = error, norm
        else:
            self.squared_error += error
            self.squared_norm += norm

    def take_error(self) -> float | None:
        """The relative error measured since this was last asked for, if any: once a refresh, as it may wait."""
        error, norm, self.squared_error, self.squared_norm = self.squared_error, self.squared_norm, None, None
        if error is None or norm is None or norm.item() == 0:
            return None
        return float((error / norm).sqrt())


_keys = itertools.count()
_layers: weakref.WeakValueDictionary[int, LayerGraft] = weakref.WeakValueDictionary()
_quantised: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()  # their modules


class LayerGraft(Measured):
    """The forward hook of one base layer, with the layer's estimator and what it measured of itself.

    It takes over what trains, and nothing else: in `eval()` the gradient is the model's own (of saliency maps, say).
    """

    _tried: tuple[Any, ...] | None = None  # the layer's `identity` when it was tried, and what came of it
    _unlike = ""

    def __init__(self, estimator: Estimator, switch: Switch) -> None:
        super().__init__()
        self._register()
        self.name = "a layer"
        self.estimator = estimator
        self.switch = switch
        self.mode = Mode.OBSERVE
        self.observed = 0  # exact backwards that statistics were taken from
        self.tokens, self.dtype = 0, ""  # the most that one of them had, and of what dtype

    @property
    def mode(self) -> Mode:
        """What the next backward will be.

        Kept as a string: torch.compile takes equal objects of two layers for one and the same, and would not notice
        that the mode of one of them has changed.
        """
        return Mode(self._mode)

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._mode = mode.value

    def _register(self) -> None:
        self.key = next(_keys)
        _layers[self.key] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tried": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not args or not isinstance(args[0], Tensor) or not torch.is_grad_enabled():
            return None
        if not self.switch.on:
            if args[0].requires_grad and self.mode is not Mode.EXACT:
                self.switch.trains()
            return None
        if self.mode is Mode.EXACT:
            return None
        # The replicas of nn.DataParallel run in threads that would share this one layer's statistics.
        if getattr(module, "_is_replica", False):
            return None
        if not module.training:
            if args[0].requires_grad and not torch.compiler.is_compiling():
                self.switch.modes.add(False)
            return None
        if not self.knows(module, args[0], output):
            return None
        x, weight = args[0], self.weight(module, output.dtype)
        if weight is not None and weight.is_meta:  # offloaded, and gone again: autograd has kept what it needs
            self.switch.say_once(
                "offloaded", f"{self.name} is offloaded, so its backward is exact, as that of every such layer."
            )
            return None
        if not x.requires_grad or (weight is not None and weight.requires_grad):
            return None
        return graft(x, output, weight, bias_of(module), self)

    def knows(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        """Whether the layer computes `x W^T + b`, as it was tried, and nothing has been put in its way since."""
        reason = tampered(module, self)
        if not reason and not torch.compiler.is_compiling():
            self.switch.modes.add(True)
            now = identity(module)
            same = self._tried is not None and all(map(operator.is_, now, self._tried))
            if not same and not in_dispatch_mode():  # which selective checkpointing counts operators in
                if self._tried is not None:
                    self.estimator.product.forget()  # a copy of the weight that there was
                found = unlike(module, (x, output))
                self._tried, self._unlike = None if found is None else now, found or ""
            reason = self._unlike
        if reason:
            self.switch.leave(self.name, reason)
        return not reason

    def weight(self, module: nn.Module, dtype: torch.dtype) -> Tensor | None:
        """What backward multiplies with; None if that is quantised and being traced: then it is read in backward."""
        weight = held(module)
        if weight is None and not torch.compiler.is_compiling():
            _quantised[self.key] = module
            weight = read(module, dtype)
        return weight

    def under(self, module: nn.Module) -> RemovableHandle:
        """Hook the layer: before hooks that look at its output or change it, after FSDP2's, which shards its weight."""
        if held(module) is None:
            _quantised[self.key] = module
        return module.register_forward_hook(self, prepend=not isinstance(module, FSDPModule))

    def mode_for(self, mode: Mode, witness: Tensor, weight: Tensor | None) -> Mode:
        """`mode`, or exact for gradients that cannot be estimated: without tokens, or not finite, or about to overflow.

        `witness: (T, n)` is the gradient, or any product of it, where what is not finite shows just as well. Looking
        would wait for an accelerator; there, such a gradient reaches the adapter's through the adapter's own products.
        So it does where `weight` is sharded: all processes gather the same of it, or they would wait for ever.
        """
        if isinstance(weight, DTensor):
            return mode
        if mode is Mode.EXACT or not witness.numel():
            return Mode.EXACT
        free = witness.device.type == "cpu" and not torch.compiler.is_compiling()
        if mode is Mode.OBSERVE or not free:
            return mode
        if math.isfinite(squared_row_norms(witness).sum().item()):
            return mode
        self.switch.say_once(
            "not finite",
            f"a gradient of {self.name} is not finite, or nearly so; its backward is exact this time, as it will be, "
            "without a word, whenever this happens again.",
        )
        return Mode.EXACT

    def grad_input(self, grad_output: Tensor, weight: Tensor | None, mode: Mode) -> Tensor:
        """`(T, out) , (out, in) -> (T, in)`: estimated, or exact while observing."""
        if weight is None:
            later: Tensor = _read_and_multiplied(grad_output, self.estimator.in_features, self.key, mode.value)
            return later
        if isinstance(weight, StoredWeight) and weight.compute_dtype not in (None, grad_output.dtype):
            computed = grad_output.to(weight.compute_dtype)  # as the layer's own backward does
            return LayerGraft.grad_input(self, computed, weight, mode).to(grad_output.dtype)
        if isinstance(weight, DTensor) and not len(grad_output):  # gather with the others, for a token of zeros
            return LayerGraft.grad_input(self, grad_output.new_zeros(1, grad_output.shape[1]), weight, mode)[:0]
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
        self.observed += 1
        self.tokens, self.dtype = max(self.tokens, len(grad_output)), str(grad_output.dtype).removeprefix("torch.")
        exact = grad_output @ weight.to(grad_output.dtype)
        if self.estimator.ready:
            self.measure(self.estimator.estimate(grad_output, weight), exact)
        self.estimator.observe(grad_output, weight, exact)
        return exact


def graft(x: Tensor, output: Tensor, weight: Tensor | None, bias: Tensor | None, layer: LayerGraft) -> Tensor:
    """`output`, unchanged, whose backward to `x: (..., in)` is `layer`'s and to a trainable `bias` is exact.

    Args:
        x: the layer's input, any number of leading dimensions; only its dtype and shape are used.
        output: the layer's output `x W^T + b`, (..., out).
        weight: frozen, (out, in), as `LayerGraft.weight` gives it. Kept by reference: nothing is saved for backward.
        bias: (out,) or None; gets `grad_output.sum(0)` if it requires grad (PEFT's `bias="lora_only"`).
        layer: whose mode at this moment decides what its backward will be.
    """
    result: Tensor = _Graft.apply(x, output.detach(), bias, weight, layer)  # type: ignore[no-untyped-call]
    return result


# Compiled graphs may not change Python objects, so there a refresh step calls the layer through an opaque operator; so
# does an estimate that torch.compile cannot look into.
@torch.library.custom_op("celora::observed_grad_input", mutates_args=())
def _observed(grad_output: Tensor, weight: Tensor, key: int) -> Tensor:
    layer = _layers[key]
    layer.switch.compiled = True
    return layer.observe(grad_output, weight)


@_observed.register_fake
def _(grad_output: Tensor, weight: Tensor, key: int) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], weight.shape[1])


@torch.library.custom_op("celora::estimated_grad_input", mutates_args=())
def _estimated(grad_output: Tensor, weight: Tensor, key: int) -> Tensor:
    return _layers[key].estimator.estimate(grad_output, weight)


@_estimated.register_fake
def _(grad_output: Tensor, weight: Tensor, key: int) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], weight.shape[1])


# What a quantised layer holds is nothing that a graph can take in, so its whole product is an operator.
@torch.library.custom_op("celora::read_and_multiplied", mutates_args=())
def _read_and_multiplied(grad_output: Tensor, in_features: int, key: int, mode: str) -> Tensor:
    module = _quantised.get(key)
    if module is None:
        raise CELoraError("a copy of a quantised model was compiled; run it once as it is before it is compiled.")
    return _layers[key].grad_input(grad_output, read(module, grad_output.dtype), Mode(mode))


@_read_and_multiplied.register_fake
def _(grad_output: Tensor, in_features: int, key: int, mode: str) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], in_features)


def remember(
    ctx: Any, x: Tensor, output: Tensor, bias: Tensor | None, weight: Tensor | None, layer: LayerGraft
) -> None:
    """What the backward of any grafted layer needs, saving no tensor; `output` is what its forward returns."""
    ctx.weight, ctx.layer, ctx.mode = weight, layer, layer.mode
    ctx.input_shape, ctx.input_dtype = x.shape, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    # Dirty rather than a view, so that the caller may change it in place, as it may a linear layer's output.
    ctx.mark_dirty(output)


def in_dispatch_mode() -> bool:
    """Whether something looks at every operator; taken for granted where torch does not tell."""
    found = borrow("torch.utils._python_dispatch:is_in_torch_dispatch_mode")
    return found is None or bool(found())


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Products in the dtypes they are given; costs nothing where autocast is off."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Graft(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, output: Tensor, bias: Tensor | None, weight: Tensor | None, layer: LayerGraft
    ) -> Tensor:
        remember(ctx, x, output, bias, weight, layer)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_input = grad_bias = None
        with without_autocast(grad_output.device.type):
            flat = grad_output.reshape(-1, grad_output.shape[-1])
            if ctx.needs_input_grad[0]:
                grad_input = ctx.layer.grad_input(flat, ctx.weight, ctx.layer.mode_for(ctx.mode, flat, ctx.weight))
                grad_input = grad_input.view(ctx.input_shape).to(ctx.input_dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = flat.sum(0).to(ctx.bias_dtype)
        return grad_input, None, grad_bias, None, None
