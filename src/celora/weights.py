"""How the weight of a frozen layer is read: as it is, or de-quantised, all of it or only some rows.

Most layers hold their `(out, in)` weight as a tensor; GPT-2's Conv1D holds `(in, out)`, read through a transposed view.
Quantised layers hold something else. There a `StoredWeight` stands for the matrix they multiply with and offers what
estimators ask of a weight: `weight[index]` de-quantises those rows only, `weight.to(dtype)` and `weight.detach()`
everything, anew each time; `data_ptr()` and `_version` tell when a copy made of it is out of date.

Kinds of layers are told by their classes' names, so no quantisation package is imported here before it is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from celora.borrowed import borrow

if TYPE_CHECKING:  # estimators are written for tensors, and read no more of them than this offers
    _TensorLike = Tensor
else:
    _TensorLike = object

_PLAIN = (nn.Parameter, DTensor)
_UNPACK = "bitsandbytes.functional:_convert_weight_packed_for_cpu_inverse"


class StoredWeight(_TensorLike):
    """The frozen `(out, in)` weight of a quantised layer, de-quantised when and as far as it is read.

    Holds on to the layer's own tensors, never to a copy.

    Attributes:
        shape, device: of the matrix.
        dtype: what it is de-quantised to.
        compute_dtype: of the layer's own products, or None for the dtype of its activations.
    """

    requires_grad = is_meta = False

    def __init__(
        self, stored: Tensor, shape: torch.Size, dtype: torch.dtype, compute_dtype: torch.dtype | None = None
    ) -> None:
        self.stored = stored.data
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, stored.device
        self.compute_dtype = compute_dtype
        self._version = stored._version

    def dense(self) -> Tensor:
        """All of it, (out, in), in `dtype`."""
        raise NotImplementedError

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index: (K,)` of it, (K, in), in `dtype`."""
        return self.dense()[index]

    def data_ptr(self) -> int:
        return self.stored.data_ptr()

    def detach(self) -> Tensor:
        return self.dense()

    def to(self, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        return self.dense().to(dtype)

    def __getitem__(self, index: Tensor) -> Tensor:  # type: ignore[override]
        return self.rows(index)


class SelectedRows(StoredWeight):
    """Rows `index: (K,)` of a weight that `read` gave, read when a product makes its copy of them."""

    def __init__(self, weight: Tensor, index: Tensor) -> None:
        stored = weight.stored if isinstance(weight, StoredWeight) else weight
        super().__init__(stored, torch.Size((len(index), weight.shape[1])), weight.dtype)
        self.whole, self.kept = weight, index

    def dense(self) -> Tensor:
        return rows_of(self.whole, self.kept, self.dtype)


def held(module: nn.Module) -> Tensor | None:
    """The weight of a frozen layer, (out, in), if the layer holds it as a tensor; None if it is quantised."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and type(weight) in _PLAIN:
        plain: Tensor = weight
        return plain
    if _is_conv1d(module):
        return cast(Tensor, weight.t())
    return cast(Tensor, weight) if _stored_kind(module) is None else None


def read(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of a frozen layer, (out, in): a tensor, or a `StoredWeight` if the layer is quantised.

    Args:
        module: a layer for which `unreadable` says ''.
        dtype: of its activations, which the numbers of 8-bit weights take on.
    """
    weight = held(module)
    if weight is not None:
        return weight
    kind = _stored_kind(module)
    assert kind is not None
    return kind(module, dtype)


def rows_of(weight: Tensor, index: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """Rows `index: (K,)` of a weight that `read` gave, (K, in), in `dtype`; into `out` if that is given.

    Not `weight[index]` where it is a tensor: on CPU that goes number by number, and `index_select` row by row.
    """
    if isinstance(weight, StoredWeight):
        rows = weight[index].to(dtype)
    elif out is not None and weight.dtype == dtype:
        return torch.index_select(weight.detach(), 0, index, out=out)
    else:
        rows = weight.detach().index_select(0, index).to(dtype)
    return rows if out is None else out.copy_(rows)


def unreadable(module: nn.Module) -> str:
    """Why `read` would not give the matrix that the layer's own backward multiplies with, or ''."""
    if _is_conv1d(module):
        return ""
    if _stored_kind(module) is not None:
        return _refused(module)
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
    """(out_features, in_features) of a linear layer of any kind; zeros where there is no such thing."""
    names = ("nf", "nx") if _is_conv1d(module) else ("out_features", "in_features")
    out_features, in_features = (int(getattr(module, name, 0)) for name in names)
    return out_features, in_features


def device_of(module: nn.Module) -> torch.device:
    """Where the layer's weight is, or will be: a launcher or accelerate may have left it out so far."""
    stored: Any = module.W_q if _is(module, "hqq", "HQQLinear") else module.weight
    if stored.is_meta:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return cast(torch.device, stored.device)


def bias_of(module: nn.Module) -> Tensor | None:
    """The layer's bias, (out,), if it has one."""
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def trains(module: nn.Module) -> bool:
    """Whether the layer's weight is trained."""
    return bool(getattr(getattr(module, "weight", None), "requires_grad", False))


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
        """What was quantised, in its first layout: evaluation on some CPUs packs it anew, and leaves it so."""
        if not getattr(self.state, "packing_format_for_cpu", False):
            return self.stored, self.state
        state = copy.copy(self.state)
        scales, state.original_nested = state.absmax, False  # which would quantise the scales once more
        stored, state = borrow(_UNPACK)(self.stored, state)
        state.absmax = scales.t().reshape(-1).float()
        return stored, state


class _BitsAndBytes8(StoredWeight):
    """`W[i, j] = q[i, j] s[i] / 127` (LLM.int8); products with outliers of the input use the same matrix."""

    def __init__(self, module: Any, dtype: torch.dtype | None) -> None:
        super().__init__(module.weight, module.weight.shape, dtype or torch.float16)
        # The first forward moves them from the weight to the layer's state.
        self.scale = module.weight.SCB if module.state.SCB is None else module.state.SCB

    def dense(self) -> Tensor:
        return self.to(self.dtype)

    def to(self, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        return _scaled(self.stored, self.scale, dtype)

    def rows(self, index: Tensor) -> Tensor:
        return _scaled(self.stored[index], self.scale[index], self.dtype)


def _scaled(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return q.to(dtype).mul_(scale[:, None] * (1 / 127))


class _TorchAO(StoredWeight):
    """A tensor subclass of torchao's that knows how to de-quantise itself, under an ordinary nn.Linear."""

    def __init__(self, module: Any, dtype: torch.dtype | None) -> None:
        weight = module.weight
        super().__init__(getattr(weight, weight.tensor_data_names[0]), weight.shape, weight.dtype)
        self.weight = weight

    def dense(self) -> Tensor:
        weight: Tensor = self.weight.dequantize()
        return weight

    def rows(self, index: Tensor) -> Tensor:
        weight = self.weight
        names = [*weight.tensor_data_names, *getattr(weight, "optional_tensor_data_names", ())]
        parts = [part for part in (getattr(weight, name) for name in names) if part is not None]
        # Of these kinds it is known that the first dimension of every part is that of the rows, or one for all rows.
        by_rows = type(weight).__name__ in ("Int8Tensor", "IntxUnpackedToInt8Tensor")
        if not by_rows or any(part.dim() < 2 or len(part) != self.shape[0] for part in parts):
            return self.dense()[index]
        rows: Tensor = weight._apply_fn_to_data(lambda part: part[index]).dequantize()
        return rows


class _HQQ(StoredWeight):
    """`(q - zero) scale` in groups; a byte of a 4-bit weight holds a number of its first and one of its second half."""

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


def _stored_kind(module: nn.Module) -> Callable[[Any, torch.dtype | None], StoredWeight] | None:
    """How to read a quantised layer; None for any other."""
    if _is(module, "bitsandbytes", "Linear4bit"):
        return _BitsAndBytes4
    if _is(module, "bitsandbytes", "Linear8bitLt"):
        return _BitsAndBytes8
    if _is(module, "hqq", "HQQLinear"):
        return _HQQ
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return _TorchAO if plain and _is(module.weight, "torchao", "TorchAOBaseTensor") else None


def _is_conv1d(module: nn.Module) -> bool:
    return _is(module, "transformers", "Conv1D")


def _is(thing: object, package: str, name: str) -> bool:
    """Whether one of the thing's classes is this one of this package."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == package for c in type(thing).__mro__)


def _refused(module: Any) -> str:
    """What keeps a layer of a known kind from being read."""
    if _is(module, "bitsandbytes", "Linear4bit"):
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            return "its weight is not quantised yet; move the model to its device first"
        if getattr(state, "packing_format_for_cpu", False) and borrow(_UNPACK) is None:
            return "evaluation has packed its weight anew"
    if _is(module, "bitsandbytes", "Linear8bitLt"):
        if module.state.has_fp16_weights:
            return "it quantises its weight anew in every forward"
        if module.weight.dtype != torch.int8:
            return "its weight is not quantised yet; move the model to its device first"
    if _is(module, "hqq", "HQQLinear") and not module.ready:
        return "its weight is not quantised yet"
    if getattr(getattr(module, "weight", None), "act_pre_scale", None) is not None:
        return "it scales its input before it multiplies"
    return ""
