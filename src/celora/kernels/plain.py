"""Every operation by torch's own operators, on any device. What the other backends compute is compared with these."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from celora.borrowed import borrow
from celora.errors import first_line, out_of_memory
from celora.kernels.backends import backends_of, choose
from celora.kernels.packed import BothWays, LibraryPacked, QuantisedRows
from celora.machine.device import exact_device
from celora.machine.timing import interleaved

INT_MM = "torch:_int_mm"
_PLAIN = (Tensor, nn.Parameter)
_LEAST = 1e-24  # a smaller sum of squares may have lost what matters of it to float32's underflow
_BLOCK_NUMBERS = 2**19  # float32 numbers worked on at once: 2 MiB, which a core's own cache holds
_BLOCK_NUMBERS_ELSEWHERE = 2**24  # 64 MiB: few launches, and little beside a weight, or the chunk's logits


def is_plain(x: Tensor) -> bool:
    """Whether x is a tensor of no other kind, on a CPU, and nothing traces it."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and type(x) in _PLAIN


def blocks(x: Tensor, numbers: int | None = None) -> Iterator[slice]:
    """Parts of the rows of `x: (T, n)`, of which float32 copies are small."""
    size = max(1, (numbers or _BLOCK_NUMBERS_ELSEWHERE) // max(1, x.shape[1]))
    return (slice(start, start + size) for start in range(0, len(x), size))


def squared_row_norms(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    return norms.square()


def column_maxima(x: Tensor) -> Tensor:
    return x.abs().amax(0).float()


def squared_column_norms(x: Tensor) -> Tensor:
    """Squares are summed rather than `linalg.vector_norm(dim=0)` taken, which is five times slower on CPU, and block
    by block, so that the wide copy of a half-precision gradient stays small.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
    for block in x.split(1024):
        total += block.to(dtype).square().sum(0)
    return total


def choose_rows(squared: Tensor, *, kept: int | None, share: float, step: int) -> tuple[Tensor, Tensor | None]:
    if kept is None:
        kept = rounded_up(int(energy_count(squared, share)), len(squared), step)
    return top_k(squared, kept), None


def top_k(scores: Tensor, k: int) -> Tensor:
    """Positions of the k highest scores, ascending (sorted indices gather faster): (k,) int64."""
    return torch.topk(scores, k, sorted=False).indices.sort().values


def measurable(squared: Tensor) -> Tensor:
    """Whether sums of squares tell large from small: finite in all, and not lost to underflow. () bool."""
    total = squared.sum()
    return torch.isfinite(total) & (total >= _LEAST)


def energy_count(squared: Tensor, share: float) -> Tensor:
    """How many of the largest `squared` hold `share` of their sum, a () int64 tensor; zeros are never needed.

    Everything that is not zero if `share` is 1, however small; everything where they are not `measurable`.
    """
    device, squared = squared.device, squared.to(exact_device(squared.device))
    needed = (squared != 0).sum()
    if share < 1:
        sums = squared.sort(descending=True).values.cumsum(0, dtype=torch.float64)
        needed = torch.minimum((sums < share * sums[-1]).sum() + 1, needed)
    return torch.where(measurable(squared), needed, len(squared)).to(device)


def rounded_up(count: int, total: int, step: int) -> int:
    """`count`, at least 1, rounded up to a multiple of `step`, at most `total`."""
    return min(total, -(-max(1, count) // step) * step)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor | None) -> Tensor:
    weight = weight.to(x.dtype)
    if out is None:
        return x @ weight.t() if bias is None else torch.nn.functional.linear(x, weight, bias)
    torch.mm(x, weight.t(), out=out)
    return out if bias is None else out.add_(bias)


def skinny_product(x: Tensor, m: Tensor, *, alpha: float, onto: Tensor | None) -> Tensor:
    if onto is not None:
        return onto.addmm_(x, m, alpha=alpha)
    y = x @ m
    return y if alpha == 1 else y.mul_(alpha)


def transposed_product(p: Tensor, x: Tensor) -> Tensor:
    return p.t() @ x.to(p.dtype)


def quantise_columns(weight: Tensor, scale: Tensor) -> Tensor:
    q, inverse = torch.empty(weight.shape, dtype=torch.int8, device=weight.device), 1 / scale
    for part in blocks(weight):  # no float32 copy of a large weight
        q[part] = (weight[part].float() * inverse).round_()
    return q


def quantise_rows(x: Tensor, index: Tensor | None, *, offset: int) -> tuple[Tensor, Tensor]:
    x = x if index is None else x.index_select(0, index)
    scale = divisor(torch.linalg.vector_norm(x, float("inf"), dim=1).float() / 127)
    # Row by row, whatever the order of x: products on GPUs want their first operand so.
    q = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format).div_(scale[:, None]).round_()
    q = q.add_(offset) if offset else q
    return q.to(torch.uint8 if offset else torch.int8), scale


def scatter_rows(
    y: Tensor,
    like: Tensor,
    index: Tensor | None,
    *,
    position: Tensor | None,
    row_scale: Tensor,
    column_scale: Tensor | None,
    onto: Tensor | None,
) -> Tensor:
    """Block by block into the result, so that only the sums are wide copies of it."""
    out = onto
    if out is None:
        out = like.new_empty(y.shape) if index is None else like.new_zeros(len(like), y.shape[1])
    for part in blocks(y):
        scaled = y[part] * row_scale[part, None]
        scaled = (scaled if column_scale is None else scaled.mul_(column_scale)).to(like.dtype)
        if index is None:
            out[part] = scaled
        else:
            out.index_copy_(0, index[part], scaled)
    return out


def softmax_rows(
    z: Tensor,
    targets: Tensor,
    *,
    scale: float,
    cap: float | None,
    smoothing: float,
    log_probs: Tensor,
    entropy: Tensor | None,
    top1: Tensor | None,
    write: bool,
) -> None:
    """Block by block, so that float32 copies stay in a core's cache, or are few launches on an accelerator."""
    numbers = _BLOCK_NUMBERS if z.device.type == "cpu" else _BLOCK_NUMBERS_ELSEWHERE
    size = max(1, numbers // z.shape[1])
    for start in range(0, len(z), size):
        part = slice(start, start + size)
        target = targets[part, None]
        y = z[part].to(torch.float32, copy=True)
        if cap is not None:
            y = y.mul_(scale / cap).tanh_().mul_(cap)
        elif scale != 1:
            y = y.mul_(scale)
        log_p = y.log_softmax(1)
        scored = log_p.gather(1, target)[:, 0]
        log_probs[part] = scored if smoothing == 0 else (1 - smoothing) * scored + smoothing * log_p.mean(1)
        p = log_p.exp()
        if entropy is not None:
            entropy[part] = -torch.special.xlogy(p, p).sum(1)
        if top1 is not None:
            top1[part] = scored >= log_p.amax(1)
        if write:
            grad = p.neg_() if smoothing == 0 else p.neg_().add_(smoothing / z.shape[1])
            grad.scatter_add_(1, target, torch.full_like(target, 1 - smoothing, dtype=grad.dtype))
            if cap is not None:
                grad.mul_(1 - (y / cap).square_())
            z[part] = grad if scale == 1 else grad.mul_(scale)


class Integers(LibraryPacked):
    """A weight for `torch._int_mm`, which sums in int32 and scales nothing."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        self.q, self.scale, self.column_scale = q, scale, scale

    @classmethod
    def pack(cls, weight: Tensor, scale: Tensor) -> Integers:
        """To be kept: laid out as GPUs want their second operand."""
        q = choose("quantise_columns", weight).run(weight, scale)
        return cls(column_major(padded(q, 0)), scale)

    @classmethod
    def quantise(cls, weight: Tensor, scale: Tensor) -> Integers:
        """For a single product: laid out anew only where that is needed."""
        if weight.device.type != "cpu":
            return cls.pack(weight, scale)
        return cls(choose("quantise_columns", weight).run(weight, scale), scale)

    def product(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        return integer_product(q.view(torch.int8), self.q)


class IntegersBothWays(LibraryPacked, BothWays):
    """A weight for `torch._int_mm` in both directions."""

    def __init__(self, q: Tensor, scale: Tensor, input_scale: Tensor | None = None) -> None:
        self.stored = self.q = q
        self.scale, self.input_scale = scale, input_scale
        self.column_scale = scale.new_ones(q.shape[1]) if input_scale is None else input_scale

    @classmethod
    def pack(cls, weight: Tensor, scale: Tensor, input_scale: Tensor | None = None) -> IntegersBothWays:
        q, inverse = torch.empty(weight.shape, dtype=torch.int8, device=weight.device), (1 / scale)[:, None]
        for part in blocks(weight):
            numbers = weight[part].float() * inverse[part]
            q[part] = (numbers if input_scale is None else numbers.div_(input_scale)).round_()
        return cls(q, scale, input_scale)

    @classmethod
    def holding(cls, stored: Tensor, scale: Tensor, in_features: int) -> IntegersBothWays:
        return cls(stored, scale)

    @classmethod
    def fits(cls, stored: Tensor, out_features: int, in_features: int) -> bool:
        # Asked of the table, which also takes a CPU whose sums overflow while bytes are counted for a GPU.
        backends = backends_of("pack_both_ways")
        return any(backend.run == IntegersBothWays.pack and backend.takes(stored.device) for backend in backends)

    def quantise(self, x: Tensor) -> QuantisedRows:
        return self.rounded(x, self.input_scale)

    @classmethod
    def rounded(cls, x: Tensor, input_scale: Tensor | None) -> QuantisedRows:
        """`quantise` for the weights with this `input_scale`."""
        scaled = x if input_scale is None else x.float() * input_scale
        q, scale = choose("quantise_rows", scaled).run(scaled, None, offset=0)
        return QuantisedRows(q.view(torch.int8), scale, input_scale)

    def multiply(self, x: QuantisedRows, bias: Tensor | None, out: Tensor) -> Tensor:
        sums = integer_product(x.q, padded(self.q, 1).t())
        for part in blocks(sums):  # the logits of a head are much larger than all else
            y = (x.scale[part, None] * self.scale).mul_(sums[part])
            out[part] = y if bias is None else y.add_(bias)
        return out

    def integers(self, index: Tensor | None = None) -> Tensor:
        return self.q if index is None else self.q[index]

    def columns(self, index: Tensor) -> Tensor:
        return self.q[:, index]

    def quantised(self, x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        kept = x if index is None else x.index_select(0, index)
        return super().quantised(kept.float() * self.scale, None)

    def product(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        weight = self.q if self.q.device.type == "cpu" else column_major(padded(self.q, 0))
        return integer_product(q.view(torch.int8), weight)


def why_no_integers(device: torch.device) -> str:
    """Why torch's own 8-bit product cannot be used on this device, or ''."""
    if device.type not in ("cpu", "cuda"):
        return f"there are no int8 products on {device.type}"
    if borrow(INT_MM) is None:
        return "this version of torch has no int8 products"
    wrong = wrong_integers(device)
    if wrong and device.type == "cpu":
        return "oneDNN's 8-bit sums overflow under the limit ONEDNN_MAX_CPU_ISA"
    return f"torch's int8 product {wrong}" if wrong else ""


def takes_integers(device: torch.device) -> bool:
    return not why_no_integers(device)


def integers_are_slow(device: torch.device) -> str:
    """Why 8-bit products cannot pay on this device, or ''."""
    slow = device.type == "cpu" and one_by_one()
    return "torch has no fast 8-bit products for this CPU, and multiplies number by number" if slow else ""


def pays_with_integers(device: torch.device) -> bool:
    """Whether torch's own 8-bit product can be used on this device, and is not known to be slow there."""
    return takes_integers(device) and not integers_are_slow(device)


def describe_integers(device: torch.device) -> str:
    how = "" if device.type != "cpu" else ", number by number" if one_by_one() else ", through oneDNN"
    return f"torch's integer product{how}"


@functools.cache
def wrong_integers(device: torch.device) -> str:
    """What is wrong with torch's 8-bit product on this device, or ''; '' too for a GPU that is not here.

    Not all of them can be used: kept below VNNI, oneDNN on a CPU sums pairs in 16 bits, and some GPUs lack them.
    """
    here = device.type == "cpu" or torch.cuda.is_available()
    return wrong_product(integer_product, torch.int8, device, 127) if here else ""


def wrong_product(
    multiply: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, device: torch.device, largest: int
) -> str:
    """What is wrong with one product `a b` of 8-bit matrices on this device, in words, or ''.

    Args:
        multiply: a: (17, 64), and b: (64, 64) as GPUs want it, to (17, 64) in a dtype of its own.
        dtype: of a and b.
        largest: of their whole numbers, which `dtype` holds exactly. Some sums have only the largest.
    """
    a, b = (
        (torch.arange(64 * rows, device="cpu") * 37 % (2 * largest + 1) - largest).view(rows, 64) for rows in (17, 64)
    )
    a[0], b[:, 0] = largest, largest
    try:
        found = multiply(a.float().to(dtype).to(device), column_major(b.float().to(dtype).to(device))).cpu()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        return f"fails on this device: {first_line(error)}"
    return "" if found.equal((a @ b).to(found.dtype)) else "is wrong on this device"


@functools.cache
def one_by_one() -> bool:
    """Whether `torch._int_mm` on CPU is a loop over single numbers, as without fast instructions.

    It then takes 20 times as long as float32's product and more; elsewhere half as long or, at worst, about as long.
    """
    integers = borrow(INT_MM)
    if integers is None:
        return True
    cpu = torch.device("cpu")
    whole = torch.ones(64, 512, device=cpu), torch.ones(512, 512, device=cpu)
    bits = tuple(x.to(torch.int8) for x in whole)
    calls = {"bits": lambda: integers(*bits), "whole": lambda: torch.mm(*whole)}
    times = interleaved(calls, repeats=3, device=cpu)
    return times["bits"]["time_ms"] > 4 * times["whole"]["time_ms"]


def integer_product(q: Tensor, weight: Tensor) -> Tensor:
    """`q W`: (K, out) int8, (out, in) int8 -> (K, in) int32. W may have rows of zeros at its end, which q lacks."""
    rows = len(q)
    if q.shape[1] < len(weight):
        q = padded(q, 1)
    if q.device.type == "cuda" and rows <= 16:  # what its kernels refuse
        q = torch.cat([q, q.new_zeros(32 - rows, q.shape[1])])
    y: Tensor = borrow(INT_MM)(q, weight)
    return y[:rows]


def padded(x: Tensor, dim: int) -> Tensor:
    """`x` with zeros at the end of dimension `dim`, the one that a product sums over.

    Kernels of GPUs want a multiple of 16, and `columns` keeps any number.
    """
    missing = -x.shape[dim] % 16
    return nn.functional.pad(x, (0, 0, 0, missing) if dim == 0 else (0, missing)) if missing else x


def column_major(q: Tensor) -> Tensor:
    """`(out, in)` laid out as GPUs want their second operand."""
    return q.t().contiguous().t()


def row_scales(weight: Tensor) -> Tensor:
    """The scales that make each row of `weight: (out, in)` at most 127: (out,) float32."""
    largest: Tensor = torch.linalg.vector_norm(weight.detach(), float("inf"), dim=1)
    return divisor(largest.float() / 127)


def divisor(scale: Tensor) -> Tensor:
    """At least the smallest normal number: smaller ones are too coarse to divide by. A NaN stays one."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)
