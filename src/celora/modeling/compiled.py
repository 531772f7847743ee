"""Grafted layers inside torch.compile: refreshes and opaque estimates as custom operators."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from celora.errors import CELoraError
from celora.modeling.switch import Mode
from celora.weights.read import read

if TYPE_CHECKING:
    from celora.modeling.graft import LayerGraft

keys = itertools.count()
layers: weakref.WeakValueDictionary[int, LayerGraft] = weakref.WeakValueDictionary()
quantised: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()  # their modules


# Compiled graphs may not change Python objects, so there a refresh step calls the layer through an opaque operator; so
# does an estimate that torch.compile cannot look into.
@torch.library.custom_op("celora::observed_grad_input", mutates_args=())
def observed_grad_input(grad_output: Tensor, weight: Tensor, key: int) -> Tensor:
    layer = layers[key]
    layer.switch.compiled = True
    return layer.observe(grad_output, weight)


@observed_grad_input.register_fake
def _(grad_output: Tensor, weight: Tensor, key: int) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], weight.shape[1])


@torch.library.custom_op("celora::estimated_grad_input", mutates_args=())
def estimated_grad_input(grad_output: Tensor, weight: Tensor, key: int) -> Tensor:
    return layers[key].estimator.estimate(grad_output, weight)


@estimated_grad_input.register_fake
def _(grad_output: Tensor, weight: Tensor, key: int) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], weight.shape[1])


# What a quantised layer holds is nothing that a graph can take in, so its whole product is an operator.
@torch.library.custom_op("celora::read_and_multiplied", mutates_args=())
def read_and_multiplied(grad_output: Tensor, in_features: int, key: int, mode: str) -> Tensor:
    module = quantised.get(key)
    if module is None:
        raise CELoraError("a copy of a quantised model was compiled; run it once as it is before it is compiled.")
    return layers[key].grad_input(grad_output, read(module, grad_output.dtype), Mode(mode))


@read_and_multiplied.register_fake
def _(grad_output: Tensor, in_features: int, key: int, mode: str) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], in_features)
