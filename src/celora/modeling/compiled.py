"""Grafted layers under torch.compile. Refreshes, and estimates that it cannot trace, become custom operators.

A custom operator takes only tensors and numbers. So it gets the layer's key, and looks up the layer.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from celora.errors import CELoraError
from celora.kernels.operations import linear, quantise_rows
from celora.modeling.switch import Mode
from celora.weights.read import read

if TYPE_CHECKING:
    from celora.modeling.graft import LayerGraft


def is_compiled(module: nn.Module) -> bool:
    """Whether this module is compiled in place, by `nn.Module.compile`."""
    return module._compiled_call_impl is not None


keys = itertools.count()
layers: weakref.WeakValueDictionary[int, LayerGraft] = weakref.WeakValueDictionary()
quantised: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()  # base layers, by the same keys


# What they read changes between steps (statistics, copies, draws), so a CUDA graph must not record them.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


# A compiled graph must not change Python objects, but a refresh counts and collects statistics.
@torch.library.custom_op("celora::grad_input", mutates_args=(), tags=_TAGS)
def grad_input(grad_output: Tensor, weight: Tensor | None, in_features: int, key: int, mode: str) -> Tensor:
    """`LayerGraft.grad_input`. Without a `weight`, it is a quantised one, whose parts a graph cannot contain."""
    layer = layers[key]
    layer.switch.compiled = True
    return layer.grad_input(grad_output, _read(key, grad_output.dtype) if weight is None else weight, Mode(mode))


@grad_input.register_fake
def _(grad_output: Tensor, weight: Tensor | None, in_features: int, key: int, mode: str) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], in_features)


@torch.no_grad()
def multiplied(
    x: Tensor, weight: Tensor, bias: Tensor | None, key: int, dtype: torch.dtype, measures: bool = False
) -> Tensor:
    """`x W^T + b` in `dtype`, by the product of the layer with this key. `measures`: also measure its error."""
    layer = layers[key]
    product: Any = layer.estimator.product
    y: Tensor = product.forward(x, weight, bias, dtype)
    if measures:
        exact = linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        layer.of_forward.measure(y.reshape(-1, y.shape[-1]), exact.reshape(-1, y.shape[-1]))
        product.look(x, weight)
    return y


@torch.library.custom_op("celora::forward_product", mutates_args=(), tags=_TAGS)
def forward_product(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    key: int,
    dtype: torch.dtype,
    measures: bool,
) -> Tensor:
    """`multiplied`. Without a `weight`, it is a quantised one, as in `grad_input`."""
    return multiplied(x, _read(key, dtype) if weight is None else weight, bias, key, dtype, measures)


@forward_product.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    key: int,
    dtype: torch.dtype,
    measures: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features, dtype=dtype)


@torch.library.custom_op("celora::rounded_rows", mutates_args=(), tags=_TAGS)
def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x: (T, n)` in 8 bits and the scales of its rows, by the kernels that a graph cannot contain."""
    return quantise_rows(x)


@rounded_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]  # `len` would make a graph for each number of rows
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)


def _read(key: int, dtype: torch.dtype) -> Tensor:
    module = quantised.get(key)
    if module is None:
        raise CELoraError("a copy of a quantised model was compiled; run it once before you compile it.")
    return read(module, dtype)
