"""The forward of a frozen layer, or of the head, in 8 bits: `y = x W^T + b` from an 8-bit copy of W.

In: the layer's input, (..., in). Out: its output, (..., out), in the same dtype or autocast's. It is an estimate. So
the model that trains with it is a slightly different model, as with a quantised base. Evaluation and generation use it,
too, while celora is attached, unless gradients are recorded. Refreshes measure its error. If a layer's error is too
large, it goes back to its own forward. A layer's backward multiplies with the same copy.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from celora.errors import CELoraError
from celora.kernels.operations import linear
from celora.modeling.compiled import forward_product, multiplied
from celora.modeling.float_forward import FloatForward
from celora.modeling.graft import LayerGraft, in_dispatch_mode, scripted, without_autocast
from celora.modeling.hooks import has_another_s_forward, nothing
from celora.modeling.switch import Mode
from celora.modeling.trial import tampered
from celora.numerics.measured import Measured
from celora.numerics.products.both_ways import Int8BothWays
from celora.numerics.products.int8 import stored_bytes
from celora.weights.read import bias_of, is_trainable, plain_weight, read, shape_of, unreadable

_COMPARED = 64  # so many tokens tell the error of logits; all would cost as much as exact logits
MOST_ERROR = 0.1  # a layer with this relative error or more uses its own forward; rounding alone gives about 0.01


def own_bytes(module: nn.Module) -> bool:
    """Whether 8-bit products multiply with the stored bytes of this layer, and make no copy."""
    return plain_weight(module) is None and not unreadable(module) and stored_bytes(read(module)) is not None


class EightBitForward(FloatForward):
    """The forward of one frozen linear layer, whose graft's product multiplies.

    Attributes:
        exact: whether the layer has gone back to its own forward.
    """

    name = "frozen forwards in 8 bits"
    graft: LayerGraft
    _under: tuple[Any, ...] = ()  # what the latest call was made under

    def __init__(self, graft: LayerGraft) -> None:
        super().__init__(graft.switch, graft)
        self.exact = False
        self._tuner: Callable[[], Any] = nothing

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tuner": self._tuner()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tuner = state.pop("_tuner")
        super().__setstate__(state)
        self._tuner = nothing if tuner is None else weakref.ref(tuner)

    def between(self, tuner: nn.Module, base: nn.Module) -> None:
        """Become the forward of the base layer in this PEFT layer. Without the PEFT layer around it, it is exact."""
        self._tuner = weakref.ref(tuner)
        self.under(base)

    @property
    def product(self) -> Int8BothWays:
        """What multiplies in 8 bits."""
        return cast(Int8BothWays, self.graft.estimator.product)

    @property
    def error(self) -> Measured:
        """The error of the output, measured at refreshes."""
        return self.graft.of_forward

    @property
    def in_features(self) -> int:
        return self.graft.estimator.in_features

    def give_up(self) -> None:
        """From now on, compute the layer's own forward."""
        self.exact = True

    def keep_up(self) -> None:
        """After an optimizer step: see to the copy that compiled graphs multiply with, where the weight is at hand."""
        tuner, module = self._tuner(), self._module()
        if tuner is None or tuner.merged or module is None or is_trainable(module):
            return
        weight = plain_weight(module)
        if weight is None or weight.is_meta or isinstance(weight, DTensor) or weight.shape != shape_of(module):
            return
        if weight.untyped_storage().nbytes():
            self.product.keep_up(weight, anew=self.switch.on and not self.exact)

    @property
    def reads_stored_bytes(self) -> bool:
        """Whether the layer computes in 8 bits and its weight is nowhere but in these."""
        tuner, module = self._tuner(), self._module()
        if tuner is None or tuner.merged or module is None or self.exact:
            return False
        return own_bytes(module)

    def otherwise(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        own = super().forward if super().applies(module) else super().otherwise
        return own(module, *args, **kwargs)

    def applies(self, module: nn.Module) -> bool:
        return self.switch.on and self.switch.forwards and not self.exact and not scripted()

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or not self._takes(module, x):
            return self.otherwise(module, *args, **kwargs)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)  # of y; casting x would hide that other layers have it, too
        weight, bias, compiling = self.graft.weight(module, dtype), bias_of(module), torch.compiler.is_compiling()
        observes = module.training and self.graft.mode is Mode.OBSERVE and torch.is_grad_enabled()
        measures = observes and (compiling or not in_dispatch_mode())
        y: Tensor
        if torch.is_grad_enabled():
            if compiling and not measures:  # a refresh must not ask, or there would be a graph for the first one
                self.product.stay_on(x.device)
            y = _Forward.apply(x, weight, bias, self.graft, dtype, measures)  # type: ignore[no-untyped-call]
        elif compiling:  # what looks at the weight, which may have changed since the latest step
            y = forward_product(x, weight, bias, self.graft.estimator.out_features, self.graft.key, dtype, False)
        else:
            assert weight is not None
            y = multiplied(x, weight, bias, self.graft.key, dtype)
        return y

    def _takes(self, module: Any, x: Tensor) -> bool:
        """Whether the frozen weight is in memory, and the 8-bit product may multiply x with it."""
        if not x.is_floating_point() or not x.numel() or is_trainable(module) or has_another_s_forward(module):
            return False
        # In evaluation, gradients are the model's own.
        if not module.training and torch.is_grad_enabled():
            return False
        tuner = self._tuner()
        if tuner is None or tuner.merged:
            self.graft.estimator.product.forget()  # a merge changes the weight without a new version
            return False
        plain = plain_weight(module)
        weight: Any = module.weight if plain is None else plain
        if weight.is_meta or weight.shape != shape_of(module) or x.shape[-1] != weight.shape[1]:
            return False
        if plain is not None and x.dtype != plain.dtype and not torch.is_autocast_enabled(x.device.type):
            return False
        if torch.compiler.is_compiling():
            return True
        self.graft.notice()
        under = (module.training, *tuner.active_adapters, *getattr(tuner, "lora_A", ()))
        if under != self._under:  # an adapter that is added may change the weight in place, through `.data`
            self._under = under
            self.graft.estimator.product.notice()
        if type(x) is not Tensor:  # for example a tensor without data, of a tool that computes shapes
            return False
        if weight.device != x.device:
            raise CELoraError(
                f"{self.graft.name} is on {weight.device} and its input on {x.device}; forward='int8' does not work "
                "under nn.DataParallel: use one process a device, or forward='exact'."
            )
        return not tampered(module, self.graft)


class EightBitHead:
    """The logits of the vocabulary projection in 8 bits.

    Attributes:
        product: what multiplies in 8 bits.
        error: the error of the logits, measured while it `watches`.
        exact: whether the logits are exact again.
        watches: whether training compares some logits with exact ones, and learns the scales of their inputs.
    """

    reads_stored_bytes = False

    def __init__(self, in_features: int) -> None:
        self.in_features = in_features
        self.product, self.error = Int8BothWays(), Measured()
        self.exact = self.watches = False

    def lent(self) -> EightBitHead:
        """A copy that learns and measures for itself. It shares the product, if the scales of inputs are known."""
        other = copy.copy(self)
        other.error, other.watches = Measured(), False
        if self.product.levels is None:
            other.product = copy.copy(self.product)
        return other

    def give_up(self) -> None:
        """From now on, logits are exact. The 8-bit weight, which nothing else reads, is dropped."""
        self.exact = True
        self.product.forget()

    def applies(self, weight: Tensor) -> bool:
        """Whether logits are in 8 bits now."""
        return not self.exact and self.takes(weight)

    def takes(self, weight: Tensor) -> bool:
        """Whether logits of this weight can be in 8 bits. Those of a gathered head cannot."""
        if isinstance(weight, DTensor):
            return False
        (words, hidden), where = weight.shape, weight.device
        # Nothing multiplies gradients with these bytes, so the number of words has no limit.
        return not (self.product.forward_unavailable(words, hidden, where) or self.product.slow(where))

    def compare(self, x: Tensor, logits: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Measure the error of some logits, (T, V), of the tokens x, (T, H), and record the sizes of x's features."""
        every = max(1, len(x) // _COMPARED)
        self.error.measure(logits[::every], linear(x[::every], weight, bias))
        self.product.look(x, weight)


class _Forward(torch.autograd.Function):
    """`x W^T + b` in 8 bits. Its own backward is exact; in training the graft replaces it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        graft: LayerGraft,
        dtype: torch.dtype,
        measures: bool,
    ) -> Tensor:
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        ctx.shape, ctx.dtype, ctx.graft = x.shape, x.dtype, graft
        if weight is not None and not torch.compiler.is_compiling():
            return multiplied(x, weight, bias, graft.key, dtype, measures)
        product: Any = graft.estimator.product
        if not measures and weight is not None and product.traceable:
            in_graph: Tensor = product.forward_in_graph(x, bias, dtype)
            return in_graph
        out_features = graft.estimator.out_features
        y: Tensor = forward_product(x, weight, bias, out_features, graft.key, dtype, measures)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        with without_autocast(grad_output.device.type):
            if ctx.needs_input_grad[0]:
                grad_x = ctx.graft.grad_input(flat, ctx.weight, Mode.EXACT).view(ctx.shape).to(ctx.dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = flat.sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_bias, None, None, None
