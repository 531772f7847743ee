"""Each Triton kernel against torch: in the interpreter by the tests, on a GPU before anything there uses one.

`wrong` compares one operation at one size, and says what differs. Products are compared with their closed form in
float64, because some GPUs lack torch's own in 8 bits. `contenders` are the same by Triton and by torch, to be timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from celora.errors import first_line, out_of_memory
from celora.kernels import floats, plain
from celora.kernels.packed import BothWays
from celora.kernels.triton import judged, launches, product

# A sum in another order; and, of results in half precision, a step of theirs, where two roundings may fall apart.
_SUMS = 1e-5
_STEP = {torch.float32: _SUMS, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
_FLOATS = 4e-3  # of float32 sums of 8-bit floats: a tensor core may keep 14 bits of each partial sum

_ALL_TILES = 130  # rows of the products that are compared with all tiles: every variant takes a second to compile
_EIGHT_BITS = 0.02  # a number half-way between two steps of 8 bits may go either way

Pack = Callable[..., Any]  # weight, scale, perhaps input_scale, to a `PackedWeight`


def wrong(operation: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device, *, finite: bool) -> str:
    """What the kernel of an operation gets wrong for `x: (rows, columns)`, in words, or ''.

    Rows are apart in memory, of very different sizes, and one is zero. Without `finite`, one number is a NaN, and one
    infinite.
    """
    generator = torch.Generator(device).manual_seed(1000 * rows + columns)
    x = torch.randn(rows, columns + 3, device=device, generator=generator)
    x *= torch.logspace(-3, 2, max(1, rows), device=device)[:, None][:rows]
    x[1:2] = 0
    if not finite:
        x[2:3, :1], x[3:4, -4:-3] = float("nan"), float("inf")
    return _CHECKS[operation](x.to(dtype)[:, :columns], generator)


def _difference(name: str, found: Tensor, expected: Tensor, tolerance: float, least: float = 1e-30) -> str:
    """Where they differ by more than `tolerance` of the largest number of a row, or of `least`.

    What is not finite in one must not be in the other.
    """
    found, expected = found.double(), expected.double()
    if not torch.equal(torch.isfinite(found), torch.isfinite(expected)):
        return f"gave other numbers that are not finite than torch ({name})"
    if not found.numel():
        return ""
    found, expected = (t.nan_to_num(0, 0, 0).reshape(len(t), -1) for t in (found, expected))
    error = ((found - expected).abs() / expected.abs().amax(1, keepdim=True).clamp(min=least)).max()
    return f"was off by {float(error):.1e} of the largest number ({name})" if error > tolerance else ""


def _quantise(x: Tensor, generator: torch.Generator, dtype: torch.dtype = torch.int8) -> str:
    fold = torch.rand(x.shape[1], device=x.device, generator=generator) + 0.5
    for index in (None, torch.arange(0, len(x), 2, device=x.device)):
        for factor in (None, fold):
            q, scale = launches.quantise_rows(x, index, fold=factor, dtype=dtype)
            rows = (x if index is None else x[index]).float()
            steps, expected = _steps(rows if factor is None else rows * factor, dtype)
            finite = torch.isfinite(expected)
            steps = steps[finite]
            off = (q[finite].float() - steps).abs()
            apart = bool((off > 1 + steps.abs() / 8).any()) or float((off > 0).float().sum()) > 0.01 * off.numel() + 1
            if apart:
                return "rounded to other numbers than torch"
            if said := _difference("scales", scale, expected, _SUMS):
                return said
    return ""


def _steps(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows in float32 as the steps of `quantise_rows`, in float32, and their scales."""
    scale = plain.divisor(torch.linalg.vector_norm(rows, float("inf"), dim=1) / launches.LARGEST[dtype])
    return _rounded(rows / scale[:, None], dtype), scale


def _rounded(steps: Tensor, dtype: torch.dtype) -> Tensor:
    return steps.round() if dtype == torch.int8 else steps.to(dtype).float()


def _row_norms(x: Tensor, _: torch.Generator) -> str:
    return _difference("norms", launches.squared_row_norms(x), plain.squared_row_norms(x), _SUMS)


def _column_norms(x: Tensor, _: torch.Generator) -> str:
    found, expected = launches.squared_column_norms(x), plain.squared_column_norms(x)
    return _difference("norms", found[:, None], expected[:, None], _SUMS)


def _column_maxima(x: Tensor, _: torch.Generator) -> str:
    found, expected = launches.column_maxima(x), plain.column_maxima(x)
    return "" if found.isnan().equal(expected.isnan()) and found.nan_to_num().equal(expected.nan_to_num()) else (
        "found other maxima than torch"
    )  # fmt: skip


def _softmax(x: Tensor, generator: torch.Generator) -> str:
    x = torch.where(x.isfinite(), x.clamp(-20, 20), x)
    x[4:5, ::2] = float("-inf")  # words that a model rules out
    targets = torch.randint(x.shape[1], (len(x),), device=x.device, generator=generator)
    likeliest = x.float().nan_to_num(-30).argmax(1)
    targets = torch.where(torch.arange(len(x), device=x.device) % 2 == 0, likeliest, targets)
    cases = ((None, 0.0, 1.0, 0), (30.0, 0.0, 0.7, 3), (None, 0.1, 0.7, 3), (30.0, 0.1, 1.0, 0))
    for cap, smoothing, scale, apart in cases:
        found, expected = (
            _scores(run, x, targets, cap, smoothing, scale, apart)
            for run in (launches.softmax_rows, plain.softmax_rows)
        )
        for name in ("log_probs", "entropy"):
            if said := _difference(name, found[name][:, None], expected[name][:, None], 10 * _SUMS, 1.0):
                return said
        if said := _difference("gradient", found["gradient"], expected["gradient"], _STEP[x.dtype] * 2, 0.1 * scale):
            return said
        if not found["top1"].equal(expected["top1"]):
            return "found another likeliest word than torch"
    return ""


def _scores(
    run: Callable[..., None],
    x: Tensor,
    targets: Tensor,
    cap: float | None,
    smoothing: float,
    scale: float,
    apart: int,
) -> dict[str, Tensor]:
    """`gradient` also has the numbers between two rows, `apart` zeros that nothing may write to."""
    z, count = torch.nn.functional.pad(x, (0, apart)), len(x)
    log_probs, entropy = (torch.empty(count, device=x.device) for _ in range(2))
    top1 = torch.empty(count, dtype=torch.bool, device=x.device)
    run(
        z[:, : x.shape[1]],
        targets,
        scale=scale,
        cap=cap,
        smoothing=smoothing,
        log_probs=log_probs,
        entropy=entropy,
        top1=top1,
        write=True,
    )
    return {"gradient": z, "log_probs": log_probs, "entropy": entropy, "top1": top1}


def _product(x: Tensor, generator: torch.Generator, dtype: torch.dtype) -> str:
    """Both layouts of a weight of as many columns, against the closed form in float64. `_ALL_TILES` rows: all tiles."""
    q, scale = launches.quantise_rows(x, None, dtype=dtype)
    depth, wide = x.shape[1], x.shape[1] // 2 + 1
    w = torch.randn(depth, wide, device=x.device, generator=generator)
    w = (w * 40).round().clamp(-127, 127).to(torch.int8) if dtype == torch.int8 else w.to(dtype)
    b_scale, bias = (torch.rand(wide, device=x.device, generator=generator) + 0.5 for _ in range(2))
    sums = q.double() @ w.double()
    if dtype == torch.int8:
        sums = sums.float().double()
    closed = sums * scale.double()[:, None] * b_scale.double() + bias.double()
    tolerance = max(_STEP[x.dtype], _SUMS if dtype == torch.int8 or x.device.type == "cpu" else _FLOATS)
    index = torch.arange(len(x), device=x.device) * 2
    for tiles in product.TILES if len(x) == _ALL_TILES else product.TILES[-1:]:
        for laid_out in (w, plain.column_major(w)):
            out = torch.full((2 * len(x), wide), 7.0, device=x.device, dtype=x.dtype)
            product.scaled_product(q, laid_out, scale, b_scale, out, bias=bias, index=index, tiles=tiles)
            if bool((out[1::2] != 7).any()):
                return "wrote into rows that were not asked for"
            if said := _difference(f"product, {tiles}", out[::2], closed.to(x.dtype), tolerance):
                return said
    return ""


def _weight(x: Tensor, generator: torch.Generator, pack: Pack, dtype: torch.dtype, dim: int) -> str:
    """Rows of a packed weight, some of them onto others, against the closed form in float64.

    `dim` is 0 with a scale for each column of the weight, and 1 with one for each row.
    """
    w = torch.randn(x.shape[1], 48, device=x.device, generator=generator).to(x.dtype)
    scale = plain.divisor(torch.linalg.vector_norm(w.float(), float("inf"), dim=dim) / launches.LARGEST[dtype])
    index = torch.arange(0, len(x), 2, device=x.device)
    found = torch.ones(len(x), 48, device=x.device, dtype=x.dtype)
    expected = found.clone()
    pack(w, scale).rows(x, index, position=None, onto=found)
    steps, row_scale = _steps(x[index].float() * (scale if dim else 1), dtype)
    closed = steps.double() @ _rounded(w.float() / scale.unsqueeze(dim), dtype).double()
    expected[index] = (closed * row_scale[:, None] * (1 if dim else scale)).to(x.dtype)
    return _difference("rows", found, expected, _EIGHT_BITS)


def _forward(x: Tensor, generator: torch.Generator, pack: Pack) -> str:
    """`x W^T + bias` with a scale for each input feature, against the closed form in float64."""
    w = torch.randn(48, x.shape[1], device=x.device, generator=generator).to(x.dtype)
    input_scale = torch.rand(x.shape[1], device=x.device, generator=generator) + 0.5
    bias = torch.rand(48, device=x.device, generator=generator).to(x.dtype)
    steps, scale = _steps(w.float() / input_scale, torch.int8)
    packed = pack(w, scale, input_scale)
    found = packed.multiply(packed.quantise(x), bias, x.new_empty(len(x), 48))
    rows, row_scale = _steps(x.float() * input_scale, torch.int8)
    closed = rows.double() @ steps.double().t() * row_scale[:, None] * scale + bias
    return _difference("forward", found, closed.to(x.dtype), _EIGHT_BITS)


# Products quantise rows in a launch of their own, so each is also refused where that kernel is wrong.
_CHECKS: dict[str, Callable[[Tensor, torch.Generator], str]] = {
    "quantise_rows": _quantise,
    "squared_row_norms": _row_norms,
    "squared_column_norms": _column_norms,
    "column_maxima": _column_maxima,
    "softmax_rows": _softmax,
    "pack_weight": lambda x, g: (
        _quantise(x, g) or _product(x, g, torch.int8) or _weight(x, g, product.TiledWeight.pack, torch.int8, 0)
    ),
    "pack_both_ways": lambda x, g: (
        _quantise(x, g)
        or _product(x, g, torch.int8)
        or _weight(x, g, product.TiledBothWays.pack, torch.int8, 1)
        or _forward(x, g, product.TiledBothWays.pack)
    ),
    "pack_floats": lambda x, g: (
        _quantise(x, g, torch.float8_e4m3fn)
        or _product(x, g, torch.float8_e4m3fn)
        or _weight(x, g, product.TiledFloats.pack, torch.float8_e4m3fn, 0)
    ),
}
OPERATIONS = tuple(_CHECKS)


def wrong_somewhere(operation: str, device: torch.device, dtypes: Sequence[torch.dtype] = judged.DTYPES) -> str:
    """`wrong` at sizes from one row up, in these dtypes, finite and not: the first that differs or fails, or ''."""
    sizes = ((1, 16), (37, 112), (_ALL_TILES, 1040), (64, 4096))  # torch's own products want multiples of 16
    cases = ((*size, dtype, finite) for size in sizes for dtype in dtypes for finite in (True, False))
    try:
        found = (
            wrong(operation, rows, columns, dtype, device, finite=finite) for rows, columns, dtype, finite in cases
        )
        return next((text for text in found if text), "")
    except Exception as error:  # one that this GPU or this version of Triton refuses: torch's is there
        if out_of_memory(error):
            raise  # another time there may be enough
        return f"failed: {type(error).__name__}: {first_line(error)}"


def contenders(
    operation: str,
    device: torch.device,
    tokens: int,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Callable[[], object]]:
    """The same by Triton and by torch for a layer of `shape` (out, in) and the gradient of its output, in this dtype.

    A weight multiplies every second row of the gradient: (tokens / 2, out) @ (out, in). One for both directions also
    multiplies the input: (tokens, in) @ (in, out). The softmax is of (tokens, out), in place. Without torch, where its
    own product in 8 bits cannot run on this device.
    """
    generator = torch.Generator(device).manual_seed(0)  # the user's draws stay as they are

    def drawn(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device, generator=generator, dtype=dtype)

    g = drawn(tokens, shape[0])
    if not operation.startswith("pack"):
        named = {"triton": getattr(launches, operation), "torch": getattr(plain, operation)}
        more: dict[str, Any] = {"offset": 0, "index": None} if operation == "quantise_rows" else {}
        if operation == "softmax_rows":
            log_probs, entropy = (torch.empty(tokens, device=device) for _ in range(2))
            more = {"targets": torch.zeros(tokens, dtype=torch.int64, device=device), "scale": 1.0, "cap": None}
            more |= {"smoothing": 0.0, "log_probs": log_probs, "entropy": entropy, "write": True}
            more |= {"top1": torch.empty(tokens, dtype=torch.bool, device=device)}
        return {name: functools.partial(run, g, **more) for name, run in named.items()}
    w, x, (ours, torchs, torch_takes) = drawn(*shape), drawn(tokens, shape[1]), _PACKED[operation]
    scale = plain.row_scales(w if operation == "pack_both_ways" else w.t())
    weights = {"triton": ours(w, scale)}
    if torch_takes(device):
        weights["torch"] = torchs(w, scale)
    backward = {"index": torch.arange(0, tokens, 2, device=device), "position": None, "onto": None}

    def both(weight: Any) -> Tensor:
        if isinstance(weight, BothWays):
            weight.multiply(weight.quantise(x), None, torch.empty_like(g))
        found: Tensor = weight.rows(g, **backward)
        return found

    return {name: functools.partial(both, weight) for name, weight in weights.items()}


# The operation by Triton, by torch, and whether torch's can be used on a device.
_PACKED: dict[str, tuple[Pack, Pack, Callable[[torch.device], bool]]] = {
    "pack_weight": (product.TiledWeight.pack, plain.Integers.pack, plain.takes_integers),
    "pack_both_ways": (product.TiledBothWays.pack, plain.IntegersBothWays.pack, plain.takes_integers),
    "pack_floats": (product.TiledFloats.pack, floats.ScaledFloats.pack, floats.takes),
}
