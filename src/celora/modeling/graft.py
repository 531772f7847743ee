"""An estimated backward grafted onto an exact forward.

In: `grad_output: (T, out)`. Out: `grad_input: (T, in)`, by `LayerGraft.grad_input`.

A forward hook on the frozen base layer gets the output that the layer has just computed. It detaches the output from
the graph and returns it unchanged, from an autograd node of our own. So the graft changes no bit of the forward. Only
`grad_input = grad_output @ W` goes through the layer's estimator.
"""

from __future__ import annotations

import math
import operator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from celora.borrowed import borrow
from celora.kernels.operations import linear, squared_row_norms
from celora.machine.device import reads_freely
from celora.modeling.compiled import grad_input, keys, layers, quantised
from celora.modeling.hooks import Hook, is_ours
from celora.modeling.switch import Mode, Switch
from celora.modeling.trial import identity, tampered, unlike
from celora.numerics.estimators import Estimator
from celora.numerics.measured import Measured
from celora.weights.read import bias_of, plain_weight, read
from celora.weights.sharded import whole
from celora.weights.stored import StoredWeight

MOST_BACKWARDS = 256  # no loop accumulates the gradients of more batches than these before its first step


class LayerGraft(Measured, Hook):
    """The forward hook of one base layer, with the layer's estimator and the errors that it measured.

    It only acts in training mode. In `eval()` a gradient, for example of a saliency map, is the model's own.
    """

    _tried: tuple[Any, ...] | None = None  # the layer's `identity` at the latest trial
    _unlike = ""  # the result of that trial, from `unlike`
    _noticed = -1  # the optimizer step of the latest `notice`

    def __init__(self, estimator: Estimator, switch: Switch) -> None:
        super().__init__()
        self._register()
        self.name = "a layer"
        self.estimator = estimator
        self.switch = switch
        self.mode = Mode.OBSERVE
        self.of_forward = Measured()  # the error of a forward in 8 bits
        self.observed = 0  # number of observed exact backwards
        self.tokens, self.dtype = 0, ""  # most tokens in one of them; dtype of the latest
        self.needed: bool | None = None  # whether an input to be observed needed a gradient; None before the first one

    @property
    def mode(self) -> Mode:
        """What the next backward does.

        It is stored as a string. torch.compile treats equal objects of two layers as the same object. It would not
        notice a change of one layer's mode.
        """
        return Mode(self._mode)

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._mode = mode.value

    def _register(self) -> None:
        self.key = next(keys)
        layers[self.key] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tried": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not args or not isinstance(args[0], Tensor) or not torch.is_grad_enabled() or scripted():
            return None
        if not self.switch.on:
            if args[0].requires_grad and self.mode is not Mode.EXACT:
                self.switch.warn_of_a_copy()
            return None
        # The replicas of nn.DataParallel run in threads that would share this one layer's statistics.
        if getattr(module, "_is_replica", False):
            return None
        if not module.training and args[0].requires_grad and not torch.compiler.is_compiling():
            self.switch.modes.add(False)
        if self.mode is Mode.EXACT or not module.training:
            return None
        if not self.knows(module, args[0], output):
            return None
        x, weight = args[0], self.weight(module, output.dtype)
        if weight is not None and weight.is_meta:  # offloaded, and already gone; autograd has its own reference
            self.switch.say_once(
                "offloaded", f"{self.name} is offloaded, so its backward is exact. So is that of every offloaded layer."
            )
            return None
        if not x.requires_grad or (weight is not None and weight.requires_grad):
            return None
        return graft(x, output, weight, bias_of(module), self)

    def knows(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        """Whether a trial showed that the layer computes `x W^T + b`, and nothing has changed since."""
        reason = tampered(module, self)
        if not reason and not torch.compiler.is_compiling():
            self.notice()
            self.switch.modes.add(True)
            if self.mode is Mode.OBSERVE:
                self.needed = bool(self.needed) or x.requires_grad
            now = identity(module)
            same = self._tried is not None and all(map(operator.is_, now, self._tried))
            # A tensor without data, for example of a tool that computes shapes, cannot be tried.
            if not same and (type(x) is Tensor or not in_dispatch_mode()):
                unseen = _unseen()
                if unseen is None:
                    return False
                if self._tried is not None:
                    self.estimator.product.forget()  # its copy is of the earlier weight
                with unseen:
                    # A sharded layer is tried by its own output, but not if celora computed it.
                    found = unlike(module, None if is_ours(module.__dict__.get("forward")) else (x, output))
                self._tried, self._unlike = None if found is None else now, found or ""
            reason = self._unlike
        if reason:
            self.switch.leave(self.name, reason)
        return not reason

    def notice(self) -> None:
        """In the first forward of an optimizer step, make the copy anew if the weight has changed in place.

        PEFT's `merge` changes a weight through `.data`, which gives it no new version.
        """
        unseen = None if self._noticed == self.switch.step else _unseen()
        if unseen is not None:
            self._noticed = self.switch.step
            with unseen:
                self.estimator.product.notice()

    def weight(self, module: nn.Module, dtype: torch.dtype) -> Tensor | None:
        """The weight for the backward. None for a quantised weight in a trace: the backward reads it then."""
        weight = plain_weight(module)
        if weight is None and not torch.compiler.is_compiling():
            quantised[self.key] = module
            weight = read(module, dtype)
        return weight

    def under(self, module: nn.Module) -> RemovableHandle:
        """Hook the layer. Our hook comes before hooks that read or change the output, and after FSDP2's."""
        if plain_weight(module) is None:
            quantised[self.key] = module
        return module.register_forward_hook(self, prepend=not isinstance(module, FSDPModule))

    def mode_of_call(self, weight: Tensor | None) -> Mode:
        """The current mode. Exact if padding on the left predicts a label, whose gradient would decide what is kept.

        For a sharded `weight` it is always the current mode, because all processes must gather the same parts of it.
        """
        return Mode.EXACT if not isinstance(weight, DTensor) and self._is_astray() else self.mode

    def _is_astray(self) -> bool:
        """Whether this call is such a one, and what is kept matters. Says so once."""
        if not self.switch.astray or self.estimator.keep_ratio == 1:
            return False
        if not torch.compiler.is_compiling():
            self.switch.say_once(
                "astray",
                "padding on the left predicts a label of this batch, so its backward is exact. It will be exact "
                "whenever this happens, without another warning. Pad on the right, or give the first token of each "
                "sequence the label -100.",
            )
        return True

    def mode_for(self, mode: Mode, witness: Tensor, weight: Tensor | None) -> Mode:
        """`mode`, or exact for a gradient that cannot be estimated: without numbers, not finite, or about to overflow.

        Args:
            witness: (T, n), the gradient or a product of it. It is not finite if the gradient is not.

        On an accelerator nothing is checked, because that would wait for the device. A gradient that is not finite then
        reaches the adapter through the adapter's own products. Nothing is checked for a sharded `weight` either: all
        processes must gather the same parts of it, or they would wait for each other for ever.
        """
        if isinstance(weight, DTensor):
            return mode
        if mode is Mode.EXACT or not witness.numel() or not has_numbers(witness):
            return Mode.EXACT
        free = reads_freely(witness.device) and not torch.compiler.is_compiling()
        if free and self._is_astray():  # where the model computes its own loss, only the backward knows
            return Mode.EXACT
        if mode is Mode.OBSERVE or not free:
            return mode
        if math.isfinite(squared_row_norms(witness).sum().item()):
            return mode
        self.switch.say_once(
            "not finite",
            f"a gradient of {self.name} is not finite, or nearly so; its backward is exact this time. It will be exact "
            "whenever this happens, without another warning.",
        )
        return Mode.EXACT

    def grad_input(self, grad_output: Tensor, weight: Tensor | None, mode: Mode) -> Tensor:
        """`grad_output: (T, out)` times the weight `(out, in)`: (T, in). Estimated, or exact while observing."""
        if weight is None:
            return self._in_graph(grad_output, None, mode)
        if isinstance(weight, StoredWeight) and weight.compute_dtype not in (None, grad_output.dtype):
            computed = grad_output.to(weight.compute_dtype)  # the layer's own backward does so, too
            return LayerGraft.grad_input(self, computed, weight, mode).to(grad_output.dtype)
        if isinstance(weight, DTensor) and not len(grad_output):  # gather with the others, for a token of zeros
            return LayerGraft.grad_input(self, grad_output.new_zeros(1, grad_output.shape[1]), weight, mode)[:0]
        if mode is Mode.EXACT:
            return linear(grad_output, whole(weight, grad_output.dtype).detach().t())
        if isinstance(weight, DTensor) and (mode is Mode.OBSERVE or self.estimator.needs_whole(weight)):
            weight = whole(weight, grad_output.dtype)
        if torch.compiler.is_compiling() and not (mode is Mode.ESTIMATE and self.estimator.traceable):
            return self._in_graph(grad_output, weight, mode)
        if mode is Mode.ESTIMATE:
            return self.estimator.estimate(grad_output, weight)
        return self.observe(grad_output, weight)

    def _in_graph(self, grad_output: Tensor, weight: Tensor | None, mode: Mode) -> Tensor:
        result: Tensor = grad_input(grad_output, weight, self.estimator.in_features, self.key, mode.value)
        return result

    def observe(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """The exact `grad_input`. It also measures the current selection's error, and observes for the next one."""
        self.observed += 1
        if self.observed > MOST_BACKWARDS and not self.switch.step:
            self.switch.say_once(
                "no step",
                f"{MOST_BACKWARDS} backwards, and celora has seen no step of an optimizer, so no layer refreshes: "
                "those that begin with an exact backward stay exact, and nobody looks at the errors of the others. "
                "It sees those of torch.optim. If this loop has stepped, and in another way, call "
                "require(model).clock.advance() after each step (from celora.runtime.attachment import require).",
            )
        self.tokens, self.dtype = max(self.tokens, len(grad_output)), str(grad_output.dtype).removeprefix("torch.")
        exact = linear(grad_output, weight.detach().t())
        if self.estimator.ready:
            self.measure(self.estimator.estimate(grad_output, weight), exact)
        self.estimator.observe(grad_output, weight, exact)
        return exact


def graft(x: Tensor, output: Tensor, weight: Tensor | None, bias: Tensor | None, layer: LayerGraft) -> Tensor:
    """Return `output` unchanged, with `layer`'s backward to `x: (..., in)`, and an exact one to a trainable `bias`.

    Args:
        x: the layer's input, any number of leading dimensions; only its dtype and shape are used.
        output: the layer's output `x W^T + b`, (..., out).
        weight: frozen, (out, in), from `LayerGraft.weight`. It is referred to, and nothing is saved for backward.
        bias: (out,) or None; gets `grad_output.sum(0)` if it requires grad (PEFT's `bias="lora_only"`).
        layer: its current mode decides what the backward does.
    """
    result: Tensor = _Graft.apply(x, output.detach(), bias, weight, layer)  # type: ignore[no-untyped-call]
    return result


def remember(
    ctx: Any, x: Tensor, output: Tensor, bias: Tensor | None, weight: Tensor | None, layer: LayerGraft
) -> None:
    """Store in `ctx` what the backward of a grafted layer needs, without saving a tensor."""
    ctx.weight, ctx.layer, ctx.mode = weight, layer, layer.mode_of_call(weight)
    ctx.input_shape, ctx.input_dtype = x.shape, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    # Marked dirty, and not a view, so that the caller may change it in place, like any linear layer's output.
    ctx.mark_dirty(output)


def in_dispatch_mode() -> bool:
    """Whether something observes every operator. True if torch does not tell."""
    found = borrow("torch.utils._python_dispatch:is_in_torch_dispatch_mode")
    return found is None or bool(found())


def has_numbers(tensor: Tensor) -> bool:
    """Whether it has values to look at. One of a tool that computes shapes has none."""
    if type(tensor) is Tensor or torch.compiler.is_compiling():
        return True
    of_shapes = borrow("torch._subclasses.fake_tensor:FakeTensor")
    return of_shapes is None or not isinstance(tensor, of_shapes)


def _unseen() -> AbstractContextManager[object] | None:
    """Hides a trial from dispatch modes, because selective checkpointing would count it. None if torch cannot."""
    if not in_dispatch_mode():
        return nullcontext()
    without_modes = borrow("torch.utils._python_dispatch:_disable_current_modes")
    return None if without_modes is None else without_modes()


def scripted() -> bool:
    """Whether TorchScript is tracing. It cannot trace autograd functions that work in place, nor kernels at all."""
    return bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call, attr-defined]


def selectively_checkpointed() -> bool:
    """Whether selective checkpointing observes every operator. It keeps the results of some for the repeated forward.

    The classes of the dispatch modes tell. Selective checkpointing observes a forward and its repetition. Another mode
    may observe only the forward, and what is saved for backward must not depend on that. True if torch does not tell.
    """
    if not in_dispatch_mode():
        return False
    stack = borrow("torch.utils._python_dispatch:_get_current_dispatch_mode_stack")
    keeping = borrow("torch.utils.checkpoint:_CachingTorchDispatchMode")
    repeating = borrow("torch.utils.checkpoint:_CachedTorchDispatchMode")
    if stack is None or keeping is None or repeating is None:
        return True
    return any(isinstance(mode, keeping | repeating) for mode in stack())


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Turn autocast off, so that products keep the dtypes of their operands."""
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
