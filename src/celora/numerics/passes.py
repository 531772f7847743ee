"""RMS norms, gates and rotary embeddings as autograd functions that read their inputs once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from celora.kernels import operations
from celora.numerics.saved import Saving


def untraced(backward: Callable[..., Any]) -> Any:
    """`once_differentiable` of a backward by kernels, which cannot be traced where autograd itself is compiled."""
    return once_differentiable(torch.compiler.disable(backward))


def ready(grad: Tensor) -> Tensor:
    """A gradient as the kernels take it: in rows, and arrived, if it was on its way from other processes."""
    grad = grad.contiguous()
    return grad if type(grad) is Tensor else grad.clone()


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, rounds: bool = True, in_8_bits: bool = False
) -> Tensor:
    """`(offset + weight) x / sqrt(mean x^2 + eps)` along the last dimension of `x: (..., n)`; no gradient of `weight`.

    Args:
        x: in a dtype that some backend takes. Everything is computed in float32.
        weight: (n,), contiguous, of the same dtype, frozen.
        rounds: whether the normalised x is rounded to its dtype before it is multiplied.
        in_8_bits: whether x waits for the backward in 8 bits.
    """
    result: Tensor = _RMSNorm.apply(x, weight, eps, offset, rounds, in_8_bits)  # type: ignore[no-untyped-call]
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounds: bool, in_8_bits: bool
    ) -> Tensor:
        x = x.contiguous()
        y, inverse = operations.rms_norm(x, weight, offset=offset, eps=eps, rounds=rounds)
        ctx.saving = Saving(x.dtype, in_8_bits)
        ctx.save_for_backward(weight, inverse, *ctx.saving.save(x))
        ctx.offset = offset
        return y

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, inverse, *saved = ctx.saved_tensors
        (x,) = ctx.saving.restore(*saved)
        found = operations.rms_norm_backward(ready(grad), x, weight, inverse, offset=ctx.offset)
        return found, None, None, None, None, None


def gated(gate: Tensor, up: Tensor, *, in_8_bits: bool = False) -> Tensor:
    """`silu(gate) up` of two tensors (..., n), in one dtype that some backend takes.

    `in_8_bits`: whether they wait for the backward in 8 bits.
    """
    result: Tensor = _Gated.apply(gate, up, in_8_bits)  # type: ignore[no-untyped-call]
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, in_8_bits: bool) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.saving = Saving(gate.dtype, in_8_bits)
        ctx.save_for_backward(*ctx.saving.save(gate, up))
        return operations.gated(gate, up)

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saving.restore(*ctx.saved_tensors)
        return *operations.gated_backward(ready(grad), gate, up), None


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`x cosine + (-x2, x1) sine` of `x = (x1, x2): (B, heads, T, d)`, on CPU, in a dtype that the kernels take.

    `cosine` and `sine`: (B or 1, T, d) of the same dtype, contiguous, without gradient.
    """
    tokens: Tensor = _Rotated.apply(x.transpose(1, 2), cosine, sine)  # type: ignore[no-untyped-call]
    return tokens.transpose(1, 2)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return operations.rotate(x.contiguous(), cosine, sine, transposed=False)

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return operations.rotate(ready(grad), *ctx.saved_tensors, transposed=True), None, None
