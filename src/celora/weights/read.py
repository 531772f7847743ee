"""Reads the weight of a frozen layer: plain or de-quantised, whole or some rows.

Most layers have their `(out, in)` weight as a tensor. GPT-2's Conv1D has `(in, out)`; celora reads it through a
transposed view. For a quantised layer, `read` gives a `StoredWeight`. It behaves like the matrix, as far as estimators
need: `weight[index]` de-quantises only those rows; `weight.to(dtype)` and `weight.detach()` de-quantise everything,
each time.

celora recognises layers by the names of their classes. So it imports no quantisation package before it is needed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from celora.machine.device import default_device
from celora.weights.quantised import is_kind, stored_kind, why_refused

_PLAIN = (nn.Parameter, DTensor)


def plain_weight(module: nn.Module) -> Tensor | None:
    """The weight of a frozen layer as a tensor, (out, in); None if the layer is quantised."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and type(weight) in _PLAIN:
        plain: Tensor = weight
        return plain
    if _is_conv1d(module):
        return cast(Tensor, weight.t())
    return cast(Tensor, weight) if stored_kind(module) is None else None


def read(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of a frozen layer, (out, in): a tensor, or a `StoredWeight` if the layer is quantised.

    Args:
        module: a layer for which `unreadable` says ''.
        dtype: the dtype of the layer's activations. 8-bit weights are de-quantised to it.
    """
    weight = plain_weight(module)
    if weight is not None:
        return weight
    kind = stored_kind(module)
    assert kind is not None
    return kind(module, dtype)


def unreadable(module: nn.Module) -> str:
    """Why `read` cannot give the matrix that the layer's own backward multiplies with; '' if it can."""
    if _is_conv1d(module):
        return ""
    if stored_kind(module) is not None:
        return why_refused(module)
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} is not a linear layer"
    if type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} computes its own forward"
    if not module.weight.is_floating_point():
        return f"its weight is stored as {module.weight.dtype}"
    if type(module.weight) not in _PLAIN:
        return f"its weight is a {type(module.weight).__name__}"
    return ""


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer of any kind; (0, 0) for any other module."""
    names = ("nf", "nx") if _is_conv1d(module) else ("out_features", "in_features")
    out_features, in_features = (int(getattr(module, name, 0)) for name in names)
    return out_features, in_features


def device_of(module: nn.Module) -> torch.device:
    """The device where the layer's weight is, or will be: a launcher or accelerate may not have loaded it yet."""
    stored: Any = module.W_q if is_kind(module, "hqq", "HQQLinear") else module.weight
    if stored.is_meta:
        return default_device()
    return cast(torch.device, stored.device)


def bias_of(module: nn.Module) -> Tensor | None:
    """The layer's bias, (out,), if it has one."""
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def is_trainable(module: nn.Module) -> bool:
    """Whether the layer's weight gets a gradient."""
    return bool(getattr(getattr(module, "weight", None), "requires_grad", False))


def _is_conv1d(module: nn.Module) -> bool:
    return is_kind(module, "transformers", "Conv1D")
