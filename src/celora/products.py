"""The arithmetic of `grad_output @ W`: in the gradient's own dtype, or in 8 bits with one scale per row and column.

Every estimator that computes such a product does it through a `Product`, so 8 bits compose with all of them:

    G ~= s_G q_G,   W ~= q_W s_W,      G W ~= s_G (q_G q_W) s_W,

`s_G: (T, 1)` one scale per token, `s_W: (1, in)` one per input column, both outside the sum over `out`.
Source: symmetric absmax quantisation as in LLM.int8 (arXiv 2208.07339), here for the backward's only frozen operand.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from celora import kernels
from celora.borrowed import borrow
from celora.cpu import features
from celora.errors import unknown
from celora.select import as_weights, column_maxima, critical_rows, grain, squared_row_norms
from celora.timing import interleaved

_INT_MM, _SCALED_MM = "torch:_int_mm", "torch:_scaled_mm"
_PREPACK, _QLINEAR = "torch:ops.onednn.qlinear_prepack", "torch:ops.onednn.qlinear_pointwise"
_OFFSET = 128  # the zero point of unsigned activations


class Product(ABC):
    """Multiplies the gradients of one layer with its weight; may keep a copy of the weight in another format."""

    name: ClassVar[str]
    relative_cost: ClassVar[float] = 1.0  # of a multiplication, nominally
    traceable: ClassVar[bool] = False  # whether torch.compile can look inside

    def __call__(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """`(T, out) , (out, in) -> (T, in)`, in the dtype of `grad_output`."""
        return self.rows(grad_output, weight, None)

    def rows(
        self,
        grad_output: Tensor,
        weight: Tensor,
        index: Tensor | None,
        *,
        position: Tensor | None = None,
        factors: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        """`factors[k] G[t] W` at each row t = index[k], ascending, and `onto[t]`, or 0 without, at the others: (T, in).

        All rows if `index` is None. `position`, the inverse of `index` (k or -1 for each t, int32), may be given where
        it is known. `onto` is overwritten.
        """
        kept = grad_output if index is None else grad_output.index_select(0, index)
        y = self._multiply(kept, weight)
        if factors is not None:
            y = y.mul_(as_weights(factors, y.dtype)[:, None])
        if index is None:
            return y
        onto = grad_output.new_zeros(grad_output.shape[0], weight.shape[1]) if onto is None else onto
        return onto.index_copy_(0, index, y)

    def critical_rows(
        self,
        grad_output: Tensor,
        weight: Tensor,
        *,
        kept: int | None,
        share: float,
        onto: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """`rows` for those of the largest norms: `kept` of them or, with None, as many as hold `share` of `||G||^2`.

        `onto` computes what the others become; it is not called where there are none.
        """
        squared = squared_row_norms(grad_output)
        step = self.grain(len(squared), squared.device)
        index, position = critical_rows(squared, kept=kept, share=share, step=step)
        if len(index) == len(grad_output):
            return self(grad_output, weight)
        return self.rows(grad_output, weight, index, position=position, onto=None if onto is None else onto())

    @abstractmethod
    def _multiply(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """`(K, out) , (out, in) -> (K, in)`, in the dtype of `grad_output`."""

    def grain(self, rows: int, device: torch.device) -> int:
        """What a number of kept rows is rounded up to, out of `rows` on this device: see `select.grain`."""
        return grain(rows)

    @property
    def holds_copy(self) -> bool:
        """Whether a copy of the weight is kept, so that the weight itself is not read."""
        return False

    def recheck(self, weight: Tensor) -> None:  # noqa: B027 - optional by design
        """Drop what was derived from the weight if the weight has changed, in a way that its version does not tell."""

    def forget(self) -> None:  # noqa: B027 - optional by design
        """Drop what was derived from the weight."""

    def unavailable(self, out_features: int, in_features: int, device: torch.device) -> str:
        """Why a layer of this shape cannot be multiplied so on this device, or ''."""
        return ""

    def slow(self, device: torch.device) -> str:
        """Why it cannot pay on this device, whatever the shape, or ''."""
        return ""


class Native(Product):
    """In the dtype of the gradient: what autograd does."""

    name = "native"
    traceable = True

    def _multiply(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        return grad_output @ weight.to(grad_output.dtype)


class _EightBit(Product):
    """What the 8-bit formats share: a quantised copy of the weight, made anew when the weight is another one.

    The copy is recognised by address and version; a weight changed through `.data` is noticed at the next refresh,
    which calls `recheck`, by its column maxima.
    """

    relative_cost = 0.5

    def __init__(self, *, copy: bool = True) -> None:
        self.copy = copy
        self.forget()

    def forget(self) -> None:
        self._made_of: object = None
        self._packed: Any = None
        self._scale: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"copy": self.copy}  # packed weights can be neither pickled nor copied; they are made again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def holds_copy(self) -> bool:
        return self._packed is not None

    def _follow(self, weight: Tensor) -> Tensor:
        """The weight's column scales, after making the copy if there is to be one and it is not up to date."""
        if self._scale is not None and isinstance(weight, DTensor):  # sharded: `recheck` sees it whole at refreshes
            return self._scale
        now = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._scale is None or self._made_of != now:
            self._scale = self._scale_of(weight)
            self._packed = self._pack(weight.detach()) if self.copy else None
            self._made_of = now
        return self._scale

    _largest: ClassVar[float]

    def _scale_of(self, weight: Tensor) -> Tensor:
        return _divisor(column_maxima(weight.detach()) / self._largest)

    def recheck(self, weight: Tensor) -> None:
        known = self._scale
        if known is not None and not (known.device == weight.device and torch.equal(known, self._scale_of(weight))):
            self.forget()

    @abstractmethod
    def _pack(self, weight: Tensor) -> Any: ...


class Int8(_EightBit):
    """8-bit integers: `round(x / scale)` in [-127, 127].

    On x86 CPUs with 8-bit dot products, of vectors (VNNI) or matrices (AMX), the copy of the weight takes one byte a
    number, packed for a kernel of ours that gathers, quantises, multiplies, scales and scatters in one call; or, where
    it could not be built, or not for the AMX that is there, for oneDNN's quantised linear. Elsewhere, and with
    `copy=False`, which quantises the weight anew for each product, through `torch._int_mm`. The passes around those are
    compiled C where `celora.kernels` could be built, else torch operators; float16 on CPU always takes the latter.
    """

    name = "int8"
    _largest = 127.0

    def unavailable(self, out_features: int, in_features: int, device: torch.device) -> str:
        if device.type not in ("cpu", "cuda"):
            return f"there are no int8 products on {device.type}"
        if device.type == "cuda" and in_features % 8:
            return f"int8 products on CUDA need in_features that are a multiple of 8, not {in_features}"
        if self._gathers(device):
            return ""
        if borrow(_INT_MM) is None:
            return "this version of torch has no int8 products"
        if device.type == "cpu" and not _sums_are_exact():
            return "oneDNN's 8-bit sums overflow as it is limited here (ONEDNN_MAX_CPU_ISA)"
        return ""

    def slow(self, device: torch.device) -> str:
        if device.type != "cpu" or (self.copy and (_gathered_products() or _onednn(device))) or not _one_by_one():
            return ""
        return "torch has no fast 8-bit products for this CPU, and multiplies number by number"

    def rows(
        self,
        grad_output: Tensor,
        weight: Tensor,
        index: Tensor | None,
        *,
        position: Tensor | None = None,
        factors: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        if self._gathers(weight.device):
            return self._gathered(grad_output, weight, index, position, factors, onto)
        if not kernels.supported(grad_output):
            return super().rows(grad_output, weight, index, factors=factors, onto=onto)
        column_scale, unsigned = self._follow(weight), self._unsigned(weight)
        q, scale = kernels.quantise_rows(grad_output, index, offset=_OFFSET if unsigned else 0)
        if factors is not None:
            scale = scale * factors.to(scale.dtype)
        y = self._product(q, weight, grad_output.dtype)
        fill = onto is None
        if unsigned and index is None:
            onto = y  # in place: each number is read before it is written
        out = grad_output.new_empty(grad_output.shape[0], weight.shape[1]) if onto is None else onto
        if index is not None and position is None:
            position = _positions(index, len(grad_output))
        if unsigned:
            kernels.scatter_rows(y, position, scale, out, fill=fill)
        else:
            kernels.scatter_sums(y, position, scale, column_scale, out, fill=fill)
        return out

    def critical_rows(
        self,
        grad_output: Tensor,
        weight: Tensor,
        *,
        kept: int | None,
        share: float,
        onto: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        if onto is not None or not (self._gathers(weight.device) and kernels.supported(grad_output)):
            return super().critical_rows(grad_output, weight, kept=kept, share=share, onto=onto)
        scale, columns = self._follow(weight), weight.shape[1]
        return kernels.critical_product(grad_output, self._packed, scale, columns=columns, kept=kept, share=share)

    def grain(self, rows: int, device: torch.device) -> int:
        return 1 if self._gathers(device) else super().grain(rows, device)

    def _gathers(self, device: torch.device) -> bool:
        return self.copy and device.type == "cpu" and _gathered_products()

    def _gathered(
        self,
        grad_output: Tensor,
        weight: Tensor,
        index: Tensor | None,
        position: Tensor | None,
        factors: Tensor | None,
        onto: Tensor | None,
    ) -> Tensor:
        column_scale = self._follow(weight)
        g = grad_output if kernels.supported(grad_output) else grad_output.float().contiguous()
        if index is not None and position is None:
            position = _positions(index, len(g))
        fill = onto is None
        out = g.new_empty(g.shape[0], weight.shape[1]) if onto is None else onto.to(g.dtype)
        factors = None if factors is None else factors.float()
        kernels.gathered_product(
            g, self._packed, column_scale, out, index=index, position=position, factors=factors, fill=fill
        )
        return out.to(grad_output.dtype)

    def _multiply(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """In torch operators."""
        column_scale, unsigned = self._follow(weight), self._unsigned(weight)
        q, scale = _quantise_rows(grad_output, _OFFSET if unsigned else 0)
        y = self._product(q, weight, grad_output.dtype).float() * scale[:, None]
        return (y if unsigned else y * column_scale).to(grad_output.dtype)

    def _unsigned(self, weight: Tensor) -> bool:
        return self.copy and _onednn(weight.device)

    def _product(self, q: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`q q_W`: with the column scales applied, in bf16 or fp32, if q is unsigned; else the bare int32 sums."""
        assert self._scale is not None
        if self._unsigned(weight):
            half = dtype == torch.bfloat16
            return _packed_product(q, self._packed, self._scale, torch.bfloat16 if half else torch.float32)
        return _integer_product(q.view(torch.int8), self._quantised(weight, self._scale))

    def _pack(self, weight: Tensor) -> Tensor:
        assert self._scale is not None
        if self._gathers(weight.device):
            weight = weight if kernels.supported(weight) else weight.float().contiguous()
            return kernels.pack_columns(weight, 1 / self._scale)
        if _onednn(weight.device):
            transposed = _quantise_columns(weight, self._scale).t().contiguous()
            packed: Tensor = borrow(_PREPACK)(transposed, None)
            return packed
        return _column_major(_padded(_quantise_columns(weight, self._scale), 0))

    def _quantised(self, weight: Tensor, scale: Tensor) -> Tensor:
        if self.copy:
            packed: Tensor = self._packed
            return packed
        q = _quantise_columns(weight.detach(), scale)
        return q if q.device.type == "cpu" else _column_major(_padded(q, 0))


class Fp8(_EightBit):
    """8-bit floats (e4m3, largest 448) through `torch._scaled_mm`: fast on GPUs of compute capability 8.9 and above.

    On CPU it works, and is slow.
    """

    name = "fp8"
    _largest = 448.0

    def unavailable(self, out_features: int, in_features: int, device: torch.device) -> str:
        if device.type not in ("cpu", "cuda"):
            return f"there are no fp8 products on {device.type}"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            return "fp8 products need a GPU of compute capability 8.9 or above; use int8"
        if borrow(_SCALED_MM) is None:
            return "this version of torch has no fp8 products"
        if in_features % 16:
            return f"fp8 products need in_features that are a multiple of 16, not {in_features}"
        return ""

    def slow(self, device: torch.device) -> str:
        return "fp8 is emulated on a CPU" if device.type == "cpu" else ""

    def _multiply(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        column_scale = self._follow(weight)
        scale = _divisor(torch.linalg.vector_norm(grad_output, float("inf"), dim=1).float() / self._largest)
        y: Tensor = borrow(_SCALED_MM)(
            _padded(grad_output.float() / scale[:, None], 1).to(torch.float8_e4m3fn),
            self._packed if self.copy else self._pack(weight.detach()),
            scale_a=scale[:, None],
            scale_b=column_scale[None],
            out_dtype=torch.bfloat16,
        )
        return y.to(grad_output.dtype)

    def _pack(self, weight: Tensor) -> Tensor:
        assert self._scale is not None
        return _column_major(_padded(weight.float() / self._scale, 0).to(torch.float8_e4m3fn))


PRODUCTS: dict[str, type[Product]] = {cls.name: cls for cls in (Native, Int8, Fp8)}


def make_product(name: str, *, copy: bool = True) -> Product:
    """The product called `name`; CELoraError with the nearest name if there is none."""
    if name not in PRODUCTS:
        raise unknown("precision", name, PRODUCTS)
    cls = PRODUCTS[name]
    return cls(copy=copy) if issubclass(cls, _EightBit) else cls()


def int8_path(device: torch.device) -> str:
    """What multiplies in 8 bits on this device, and why not something faster; or why nothing does."""
    if reason := Int8().unavailable(16, 16, device):
        return f"none: {reason}"
    if device.type != "cpu":
        return "torch's integer product"
    vectors = "AVX-512 VNNI" if features()["vnni"] else "AVX-VNNI"
    if _gathered_products():
        return f"celora's own kernel, with {'AMX' if kernels.multiplies_matrices() else vectors}"
    lacking = kernels.why_not() or (
        "celora's kernel has no AMX here"
        if kernels.panel_columns()
        else "this CPU has no VNNI, which celora's kernel needs"
    )
    if _onednn(device):
        return f"oneDNN's quantised linear: {lacking}"
    return f"torch's integer product, {'number by number' if _one_by_one() else 'through oneDNN'}: {lacking}"


def _onednn(device: torch.device) -> bool:
    """Whether oneDNN has a fast quantised linear here. Unsigned activations: signed ones can meet a reference kernel
    that takes a hundred times as long."""
    return device.type == "cpu" and _dot_products() and None not in (borrow(_PREPACK), borrow(_QLINEAR))


def _gathered_products() -> bool:
    """Whether our kernel is there, and nothing faster: oneDNN may know matrix instructions where it does not."""
    return kernels.panel_columns() > 0 and kernels.multiplies_matrices() == kernels.matrix_instructions()


def _dot_products() -> bool:
    return features()["vnni"]


@functools.cache
def _sums_are_exact() -> bool:
    """Whether 8-bit products on CPU are summed without overflow: kept below VNNI, oneDNN sums pairs in 16 bits."""
    most = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
    return bool((borrow(_INT_MM)(most, most.t().contiguous()) == 64 * 127**2).all())


@functools.cache
def _one_by_one() -> bool:
    """Whether `torch._int_mm` on CPU is a loop over single numbers, as without fast instructions: 20 times as slow as
    float32's product and more, where it would be twice as fast or, at worst, about as fast."""
    integers = borrow(_INT_MM)
    if integers is None:
        return True
    whole = torch.ones(64, 512, device="cpu"), torch.ones(512, 512, device="cpu")
    bits = tuple(x.to(torch.int8) for x in whole)
    times = interleaved({"bits": lambda: integers(*bits), "whole": lambda: torch.mm(*whole)}, repeats=3)
    return times["bits"]["time_ms"] > 4 * times["whole"]["time_ms"]


def _packed_product(q: Tensor, packed: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    zero_points = _zero_points(column_scale.shape[0])
    y: Tensor = borrow(_QLINEAR)(
        q, 1.0, _OFFSET, packed, column_scale, zero_points, None, 1.0, 0, dtype, "none", [], ""
    )
    return y


@functools.lru_cache(maxsize=64)
def _zero_points(columns: int) -> Tensor:
    return torch.zeros(columns, dtype=torch.int32)


def _integer_product(q: Tensor, weight: Tensor) -> Tensor:
    rows = len(q)
    if q.shape[1] < len(weight):
        q = _padded(q, 1)
    if q.device.type == "cuda" and rows <= 16:  # what its kernels refuse
        q = torch.cat([q, q.new_zeros(32 - rows, q.shape[1])])
    y: Tensor = borrow(_INT_MM)(q, weight)
    return y[:rows]


def _quantise_rows(x: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """`kernels.quantise_rows` in torch operators."""
    scale = _divisor(torch.linalg.vector_norm(x, float("inf"), dim=1).float() / 127)
    q = (x.float() / scale[:, None]).round() + offset
    return q.to(torch.uint8 if offset else torch.int8), scale


def _quantise_columns(weight: Tensor, scale: Tensor) -> Tensor:
    inverse = 1 / scale
    if kernels.supported(weight):
        return kernels.quantise_columns(weight, inverse)
    return (weight.float() * inverse).round().to(torch.int8)


def _padded(x: Tensor, dim: int) -> Tensor:
    """`x` with zeros at the end of dimension `dim`, the one that a product sums over.

    Kernels of GPUs want a multiple of 16, and `columns` keeps any number.
    """
    missing = -x.shape[dim] % 16
    return nn.functional.pad(x, (0, 0, 0, missing) if dim == 0 else (0, missing)) if missing else x


def _column_major(q: Tensor) -> Tensor:
    """`(out, in)` laid out as GPUs want their second operand."""
    return q.t().contiguous().t()


def _divisor(scale: Tensor) -> Tensor:
    """At least the smallest normal number: smaller ones are too coarse to divide by. A NaN stays one."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)


def _positions(index: Tensor, rows: int) -> Tensor:
    """The inverse of `index`: where row t went, or -1: (rows,) int32."""
    position = torch.full((rows,), -1, dtype=torch.int32)
    position[index] = torch.arange(len(index), dtype=torch.int32)
    return position
