"""A LoRA linear layer as one autograd function, which reads its tokens as few times as possible.

In: `grad_output: (T, out)`. Out: the gradients of x, A and B. `LayerGraft.grad_input` computes the part `G W` of
grad_x.

PEFT computes `result + lora_B(lora_A(dropout(x))) * scaling` operator by operator. Its default is float32 adapters on a
bfloat16 base. Each layer then casts twice, reads (T, out) four times, and saves a float32 copy of x for backward. Here
everything is in the base's own dtype, like under autocast. With p = scaling A x (T, r) and G the gradient of y:

    y += p B^T,   grad_B = G^T p,   q = scaling G B,   grad_A = q^T x,   grad_x = (G W) + q A

The layer's estimator computes `G W`. Sums are computed in place: each product adds to an existing tensor.

The tuner layer keeps its class and its `forward`. PEFT's `forward` looks in `lora_variant` under the adapter's name. If
it finds an object there, it gives it the base layer's output, and adds nothing itself. Hooks put the graft there at the
end of the base layer's forward, and remove it when PEFT has called it. If it stayed, PEFT would also call it for
merging, unmerging and conversion. If PEFT does not call it, or if a check fails, PEFT's own path runs. The adapter is
never left out or applied twice.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule

from celora.kernels import widened
from celora.kernels.operations import linear, skinny_product, transposed_product
from celora.kernels.packed import QuantisedRows
from celora.modeling.adapter import Adapter, looked_at, made_of, parts_of, touched, vanilla_adapter
from celora.modeling.compiled import rounded_rows
from celora.modeling.eight_bit import EightBitForward
from celora.modeling.graft import LayerGraft, remember, scripted, selectively_checkpointed, without_autocast
from celora.modeling.switch import Switch
from celora.numerics.estimators import Estimator
from celora.numerics.estimators.base import SavedInput
from celora.numerics.saved import rounded_input
from celora.weights.read import bias_of, is_trainable, plain_weight

_FEWEST_TOKENS = 96


class FusedGraft(LayerGraft):
    """A graft that also computes the adapter. PEFT calls it like a variant of LoRA.

    Attributes:
        begun: tuner layer, adapter's name, adapter and input of a forward, until the base layer's forward ends.
        taken: adapter, input and base layer's output of the same forward, from then until PEFT calls the variant.
        saved_input: how the input is saved for `grad_A`; see `celora.settings.config.LayerConfig`.
    """

    saved_input: SavedInput = "forward"

    def __init__(self, estimator: Estimator, switch: Switch) -> None:
        super().__init__(estimator, switch)
        self.begun: tuple[Any, str, Adapter, Tensor] | None = None
        self.taken: tuple[Adapter, Tensor, Tensor] | None = None
        self._casts = True
        self._adapters = 0  # how many the layer had then
        self._known: tuple[str, Any, Any, Any] | None = None  # name and modules of the adapter in the previous forward

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "begun": None, "taken": None, "_known": None}

    def over(self, tuner: nn.Module) -> None:
        """Hook the tuner layer; `under` hooks its base layer."""
        tuner.register_forward_pre_hook(self.before, with_kwargs=True)
        tuner.register_forward_hook(self.after, always_call=True)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook (with kwargs) of the tuner layer."""
        self.settle(module)
        if not (module.training and self.switch.on) or kwargs or len(args) != 1:
            return
        # A process with few tokens must gather a sharded layer as often as the others.
        if not _enough(args[0]) and not isinstance(module.get_base_layer(), FSDPModule):
            return
        # Selective checkpointing keeps the base layer's output, and the adapter would be added to it in place.
        # TorchScript cannot trace that.
        if not torch.compiler.is_compiling() and (selectively_checkpointed() or scripted()):
            return
        adapter = self._adapter(module)
        if adapter is not None:
            (name,) = (name for name in module.active_adapters if name in module.lora_A)
            self.begun = module, name, adapter, args[0]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A forward hook of the base layer. It leaves the output to `forward`, or grafts it."""
        begun, self.begun = self.begun, None
        if begun is not None and self.takes(module, args, output, *begun):
            return None
        return super().__call__(module, args, output)

    def takes(
        self, base: nn.Module, args: tuple[Any, ...], output: Tensor, tuner: Any, name: str, adapter: Adapter, x: Tensor
    ) -> bool:
        """Become PEFT's variant if every check of the base layer, which has just computed this output, succeeds."""
        if len(args) != 1 or args[0] is not x or not base.training:
            return False
        weight = plain_weight(base)
        # Trained for a moment (LoRA-GA does so), or offloaded.
        if is_trainable(base) or (weight is not None and weight.is_meta):
            return False
        if not self.knows(base, x, output):
            return False
        # PEFT would cast x to the adapter's dtype, and nobody would read this copy.
        self.taken, self._casts = (adapter, x, output), tuner.cast_input_dtype_enabled
        tuner.lora_variant[name], tuner.cast_input_dtype_enabled = self, False
        return True

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Called by PEFT for its variant. Returns the tuner layer's output: `result` plus the adapter's part."""
        taken = self.taken
        self.settle(module)
        if taken is None or not _same(result, taken[2]):
            A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
            added: Tensor = B(A(module.lora_dropout[active_adapter](x.to(A.weight.dtype))))
            return result + added.mul(module.scaling[active_adapter])
        adapter, seen = taken[:2]
        base = module.get_base_layer()
        weight = self.weight(base, result.dtype)
        return lora_linear(seen, result, weight, bias_of(base), adapter, self, self._in_8_bits(base, seen, weight))

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Called by PEFT if Ctrl-C left the graft in `lora_variant`. Returns the weight with plain LoRA's in it."""
        self.settle(module)
        added: Tensor = module.get_delta_weight(active_adapter).to(orig_weight.dtype)
        return orig_weight + added

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """The same, in place."""
        orig_weight.data.copy_(self.merge_safe(module, active_adapter, orig_weight.data))

    def _in_8_bits(self, base: nn.Module, x: Tensor, weight: Tensor | None) -> QuantisedRows | None:
        """x as the forward in 8 bits that has just ended multiplied it; None after another one, or to save x itself."""
        forward = base.__dict__.get("forward")
        if self.saved_input == "native":
            return None
        if weight is None or not isinstance(forward, EightBitForward) or torch.compiler.is_compiling():
            return None
        product: Any = self.estimator.product
        return product.latest_input(x, weight) if forward.applies(base) else None

    @property
    def rounds_input(self) -> bool:
        """Whether x is saved in 8 bits now even if no forward has rounded it. Not if everything has to be exact."""
        return self.saved_input == "int8" and self.switch.forwards

    def after(self, module: Any, *_: Any) -> None:
        """A forward hook of the tuner layer that is always called."""
        self.settle(module)

    def settle(self, module: Any) -> None:
        """Remove the graft from `lora_variant`, also after an interrupted forward, or in a copy made during one."""
        for name, variant in list(module.lora_variant.items()):
            if isinstance(variant, FusedGraft):
                del module.lora_variant[name]
                module.cast_input_dtype_enabled = variant._casts
        self.begun = self.taken = None

    def _adapter(self, module: Any) -> Adapter | None:
        """The adapter to compute, or None. `vanilla_adapter` is called again only if something has changed."""
        if torch.compiler.is_compiling():  # once for each graph; remembering anything would compile it again
            adapter = vanilla_adapter(module)
            return None if isinstance(adapter, str) else adapter
        if self._known is not None:
            name, known = self._known[0], self._known[1:]
            same = all(map(operator.is_, parts_of(module, name), known)) and module.active_adapters == [name]
            same = same and not module.disable_adapters and not module.merged and not any(map(touched, known))
            same = same and len(module.lora_A) == self._adapters and isinstance(module.scaling[name], int | float)
            if same and not looked_at(module.get_base_layer()):
                return made_of(*known, module.scaling[name])
            self.estimator.product.notice()  # an adapter that is added may change the weight in place, through `.data`
        adapter, self._known = vanilla_adapter(module), None
        if isinstance(adapter, str):
            return None
        if len(module.active_adapters) == 1:
            (name,) = module.active_adapters
            self._known, self._adapters = (name, *parts_of(module, name)), len(module.lora_A)
        return adapter


def _same(result: Tensor, output: Tensor) -> bool:
    """Whether `result` is the base layer's output, or PEFT's clone of it, which 4-bit layers get."""
    if result is output or torch.compiler.is_compiling():
        return True
    made_by = result.grad_fn
    if made_by is None or made_by.name() != "CloneBackward0":
        return made_by is None and output.grad_fn is None and result.shape == output.shape
    return made_by.next_functions[0][0] is output.grad_fn


def _enough(x: object) -> bool:
    """Whether this is a tensor with enough tokens: with few on a CPU, PEFT's path is faster if not emulated."""
    return isinstance(x, Tensor) and (
        x.device.type != "cpu" or x.numel() >= _FEWEST_TOKENS * x.shape[-1] or widened.autocasts()
    )


def lora_linear(
    x: Tensor,
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter,
    layer: FusedGraft,
    in_8_bits: QuantisedRows | None = None,
) -> Tensor:
    """`output + scaling B A dropout(x)`, computed in place in `output`, with the backward described above.

    Args:
        x: the layer's input, (..., in).
        output: the base layer's output `x W^T + b`, (..., out); overwritten. All products have its dtype; gradients of
            parameters have the parameters' own.
        weight: frozen, (out, in), from `LayerGraft.weight`.
        bias: (out,) or None; gets `grad_output.sum(0)` if it requires grad.
        adapter: dropout is drawn from torch's global generator, and its mask saved (a byte a number).
        layer: its current mode decides how `grad_output @ weight` is computed.
        in_8_bits: x in the 8 bits that the base layer multiplied. For `grad_A` it is saved in place of x: a byte a
            number. Without it, x itself is saved or, if the layer `rounds_input`, x is rounded here.
    """
    result: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, output.detach(), bias, adapter.A, adapter.B, weight, adapter.scaling, adapter.dropout, layer, in_8_bits
    )
    return result


def _rounded(x: Tensor) -> QuantisedRows:
    """`rounded_input`, also of a tensor without data, and in a trace. There the compiler finds what layers share."""
    if type(x) is Tensor and not torch.compiler.is_compiling():
        return rounded_input(x)
    return QuantisedRows(*rounded_rows(x.reshape(-1, x.shape[-1])))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        output: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        weight: Tensor | None,
        scaling: float,
        dropout: float,
        layer: FusedGraft,
        rows: QuantisedRows | None,
    ) -> Tensor:
        dtype, ctx.adapter_dtypes = output.dtype, (A.dtype, B.dtype)
        mask = None
        with without_autocast(output.device.type):
            A, B = A.to(dtype), B.to(dtype)
            seen = x.reshape(-1, x.shape[-1]).to(dtype)
            if dropout > 0:
                mask = torch.empty(seen.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout)
                seen = seen * mask * (1 / (1 - dropout) if dropout < 1 else 0.0)
            low = skinny_product(seen, A.t(), alpha=scaling)
            skinny_product(low, B.t(), onto=output.view(-1, output.shape[-1]))
        _, _, _, trains_A, trains_B, *_ = ctx.needs_input_grad
        if rows is None and trains_A and layer.rounds_input:
            rows = _rounded(x)
        inputs: tuple[Any, ...] = (seen, *(None,) * 4)
        if rows is not None:
            inputs = rows.q, rows.scale, rows.input_scale, rows.apart, rows.values
        ctx.save_for_backward(*inputs if trains_A else (None,) * 5, low if trains_B else None, mask, A, B)
        ctx.scaling, ctx.keep = scaling, 1 - dropout
        remember(ctx, x, output, bias, weight, layer)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, low, mask, A, B = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        grad_x = grad_bias = grad_A = grad_B = None
        with without_autocast(grad_output.device.type):
            g = grad_output.reshape(-1, grad_output.shape[-1])
            through = skinny_product(g, B, alpha=ctx.scaling)
            if needs_A:
                if inputs[1] is None:
                    grad_A = transposed_product(through, inputs[0])
                else:
                    grad_A = QuantisedRows(*inputs).transposed_product(through, mask)
                    grad_A = grad_A if mask is None or not ctx.keep else grad_A.div_(ctx.keep)
                grad_A = grad_A.to(ctx.adapter_dtypes[0])
            if needs_B:
                # A tall product, g^T p, takes up to twice as long as a wide one.
                grad_B = transposed_product(low, g).t().to(ctx.adapter_dtypes[1])
            if needs_x:
                grad_x = ctx.layer.grad_input(g, ctx.weight, ctx.layer.mode_for(ctx.mode, through, ctx.weight))
                if mask is None:
                    grad_x = skinny_product(through, A, onto=grad_x)
                else:
                    grad_x = grad_x.add_(linear(through, A.t()).mul_(mask), alpha=1 / ctx.keep if ctx.keep else 0.0)
                grad_x = grad_x.view(ctx.input_shape).to(ctx.input_dtype)
            if needs_bias:
                grad_bias = g.sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_bias, grad_A, grad_B, None, None, None, None, None
