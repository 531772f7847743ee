"""Reads the weights of bitsandbytes, torchao and HQQ layers from their stored form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from celora.borrowed import borrow
from celora.weights.stored import StoredWeight

_UNPACK = "bitsandbytes.functional:_convert_weight_packed_for_cpu_inverse"


class _BitsAndBytes4(StoredWeight):
    """NF4 or FP4 in blocks of consecutive numbers, one scale each; the scales may be quantised themselves."""

    def __init__(self, module: Any, dtype: torch.dtype | None) -> None:
        weight = module.weight
        super().__init__(weight, weight.quant_state.shape, weight.quant_state.dtype, module.compute_dtype)
        self.state = weight.quant_state

    def dense(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(*self._as_quantised())
        return weight

    def rows(self, index: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

        out_features, in_features = self.shape
        stored, state = self._as_quantised()
        if in_features % state.blocksize:  # blocks that reach across rows
            return self.dense()[index]
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(scales, state.state2) + state.offset
        part = copy.copy(state)
        part.absmax = scales.view(out_features, -1)[index].view(-1)
        part.nested, part.shape = False, torch.Size((len(index), in_features))
        rows: Tensor = dequantize_4bit(stored.view(torch.uint8).view(out_features, -1)[index].view(-1, 1), part)
        return rows

    def _as_quantised(self) -> tuple[Tensor, Any]:
        """The quantised numbers in their first layout. On some CPUs, an evaluation changes the layout for good."""
        if not getattr(self.state, "packing_format_for_cpu", False):
            return self.stored, self.state
        state = copy.copy(self.state)
        scales, state.original_nested = state.absmax, False  # else the scales would be quantised again
        stored, state = borrow(_UNPACK)(self.stored, state)
        state.absmax = scales.t().reshape(-1).float()
        return stored, state


class _BitsAndBytes8(StoredWeight):
    """`W[i, j] = q[i, j] s[i] / 127` (LLM.int8). Products with outliers of the input use the same matrix."""

    def __init__(self, module: Any, dtype: torch.dtype | None) -> None:
        super().__init__(module.weight, module.weight.shape, dtype or torch.float16)
        # The first forward moves the scales from the weight to the layer's state.
        self.scale = module.weight.SCB if module.state.SCB is None else module.state.SCB

    @property
    def integers(self) -> tuple[Tensor, Tensor]:
        return self.stored, self.scale / 127

    def dense(self) -> Tensor:
        return self.to(self.dtype)

    def to(self, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        return _scaled(self.stored, self.scale, dtype)

    def rows(self, index: Tensor) -> Tensor:
        return _scaled(self.stored[index], self.scale[index], self.dtype)


def _scaled(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return q.to(dtype).mul_(scale[:, None] * (1 / 127))


_zeros = WeakTensorKeyDictionary()  # zero points that were looked at -> their version then, and whether all are zero


def _is_zero(point: Tensor | None) -> bool:
    """Whether this zero point changes nothing. An accelerator is waited for once."""
    if point is None:
        return True
    version, zero = _zeros.get(point, (-1, False))
    if version != point._version:
        zero = not bool(point.any())
        _zeros[point] = point._version, zero
    return bool(zero)


class _TorchAO(StoredWeight):
    """A tensor subclass of torchao's that knows how to de-quantise itself, under an ordinary nn.Linear."""

    def __init__(self, module: Any, dtype: torch.dtype | None) -> None:
        weight = module.weight
        super().__init__(getattr(weight, weight.tensor_data_names[0]), weight.shape, weight.dtype)
        self.weight = weight

    @property
    def integers(self) -> tuple[Tensor, Tensor] | None:
        weight = self.weight
        if type(weight).__name__ != "Int8Tensor" or weight.scale.shape != (self.shape[0], 1):
            return None
        if weight.act_pre_scale is not None or not _is_zero(weight.zero_point):
            return None
        return self.stored, weight.scale.view(-1).float()

    def dense(self) -> Tensor:
        weight: Tensor = self.weight.dequantize()
        return weight

    def rows(self, index: Tensor) -> Tensor:
        weight = self.weight
        names = [*weight.tensor_data_names, *getattr(weight, "optional_tensor_data_names", ())]
        parts = [part for part in (getattr(weight, name) for name in names) if part is not None]
        # In these kinds the first dimension of every part has one entry for each row, or one for all rows.
        by_rows = type(weight).__name__ in ("Int8Tensor", "IntxUnpackedToInt8Tensor")
        if not by_rows or any(part.dim() < 2 or len(part) != self.shape[0] for part in parts):
            return self.dense()[index]
        rows: Tensor = weight._apply_fn_to_data(lambda part: part[index]).dequantize()
        return rows


class _HQQ(StoredWeight):
    """`(q - zero) scale` in groups. A byte of a 4-bit weight has one number of its first half and one of its second."""

    def __init__(self, module: Any, dtype: torch.dtype | None) -> None:
        super().__init__(module.W_q, module.meta["shape"], module.compute_dtype)
        self.meta, self._dequantize = module.meta, module.dequantize

    def dense(self) -> Tensor:
        weight: Tensor = self._dequantize()
        return weight

    def rows(self, index: Tensor) -> Tensor:
        meta, packing = self.meta, self.meta["packing"]
        in_features, size = self.shape[1], self.meta["group_size"]
        along_rows = meta["axis"] == 1 and size is not None and in_features % size == 0
        if not along_rows or packing not in ("4bit_u8", "8bit_u8") or "scale" not in meta or "zero" not in meta:
            return self.dense()[index]
        per_row = in_features // size
        groups = (index[:, None] * per_row + torch.arange(per_row, device=index.device)).view(-1)
        stored = self.stored.view(torch.uint8)
        if packing == "4bit_u8":
            half = len(stored)
            packed = stored[groups % half]
            q = torch.where((groups < half)[:, None], packed >> 4, packed & 15)
        else:
            q = stored[groups]
        rows: Tensor = (q.to(self.dtype) - meta["zero"][groups]) * meta["scale"][groups]
        return rows.view(-1, in_features)


def stored_kind(module: nn.Module) -> Callable[[Any, torch.dtype | None], StoredWeight] | None:
    """The class that reads this quantised layer; None if it is not quantised. celora's own layers name theirs."""
    own: Callable[[Any, torch.dtype | None], StoredWeight] | None = getattr(type(module), "stored_weight", None)
    if own is not None:
        return own
    if is_kind(module, "bitsandbytes", "Linear4bit"):
        return _BitsAndBytes4
    if is_kind(module, "bitsandbytes", "Linear8bitLt"):
        return _BitsAndBytes8
    if is_kind(module, "hqq", "HQQLinear"):
        return _HQQ
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return _TorchAO if plain and is_kind(module.weight, "torchao", "TorchAOBaseTensor") else None


def is_kind(thing: object, package: str, name: str) -> bool:
    """Whether one of the thing's classes is this one of this package."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == package for c in type(thing).__mro__)


def why_refused(module: Any) -> str:
    """Why a layer of a known kind cannot be read; '' if it can."""
    if is_kind(module, "bitsandbytes", "Linear4bit"):
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            return "its weight is not quantised yet; move the model to its device first"
        if getattr(state, "packing_format_for_cpu", False) and borrow(_UNPACK) is None:
            return "evaluation has packed its weight anew"
    if is_kind(module, "bitsandbytes", "Linear8bitLt"):
        if module.state.has_fp16_weights:
            return "it quantises its weight anew in every forward"
        if module.weight.dtype != torch.int8:
            return "its weight is not quantised yet; move the model to its device first"
    if is_kind(module, "hqq", "HQQLinear") and not module.ready:
        return "its weight is not quantised yet"
    if getattr(getattr(module, "weight", None), "act_pre_scale", None) is not None:
        return "it scales its input before it multiplies"
    return ""
