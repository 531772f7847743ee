"""The operations that estimators, products and passes ask for, and the table of backends that compute them.

In: plain tensors. Out: plain tensors, or a weight packed as one backend multiplies with it. The caller names only the
operation. Which backend computes it is decided here and nowhere else: the first in its row below that takes the tensor.
`torch` takes all tensors. Products in 8 bits, and operations without it, are only asked for where they are `available`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from celora.kernels import floats, onednn, plain, plain_passes, widened
from celora.kernels.backends import Backend, available, choose, define
from celora.kernels.c import attention as c_attention
from celora.kernels.c import both as c_both
from celora.kernels.c import dot as c_dot
from celora.kernels.c import library as c
from celora.kernels.c import low_rank as c_low_rank
from celora.kernels.c import rows as c_rows
from celora.kernels.packed import BothWays, PackedWeight
from celora.kernels.triton import judged, launches, product


def _triton(operation: str, run: Callable[..., Any]) -> Backend:
    return Backend("triton", run, judged.takes(operation), judged.why_not(operation), described=judged.describe)


define(
    "squared_row_norms",
    Backend("c", c_rows.squared_row_norms, c.supported),
    _triton("squared_row_norms", launches.squared_row_norms),
    Backend("torch", plain.squared_row_norms),
)
define(
    "column_maxima",
    Backend("c", c_rows.column_maxima, c.supported),
    _triton("column_maxima", launches.column_maxima),
    Backend("torch", plain.column_maxima),
)
define(
    "squared_column_norms",
    _triton("squared_column_norms", launches.squared_column_norms),
    Backend("torch", plain.squared_column_norms),
)
define("choose_rows", Backend("c", c_rows.choose_rows, c.supported), Backend("torch", plain.choose_rows))
define(
    "quantise_rows",
    Backend("c", c_rows.quantise_rows, c.supported),
    _triton("quantise_rows", launches.quantise_rows),
    Backend("torch", plain.quantise_rows),
)
define("quantise_columns", Backend("c", c_rows.quantise_columns, c.supported), Backend("torch", plain.quantise_columns))
define("scatter_rows", Backend("c", c_rows.scatter, c.supported), Backend("torch", plain.scatter_rows))
define(
    "softmax_rows",
    Backend("c", c_rows.softmax_rows, c.supported),
    _triton("softmax_rows", launches.softmax_rows),
    Backend("torch", plain.softmax_rows),
)
define(
    "capped_softmax_rows",
    _triton("softmax_rows", launches.softmax_rows),
    Backend("torch", plain.softmax_rows),
)
define(
    "rms_norm",
    Backend("c", c_rows.rms_norm, c.supported),
    Backend("torch", plain_passes.rms_norm, plain_passes.takes),
)
define(
    "rms_norm_backward",
    Backend("c", c_rows.rms_norm_backward, c.supported),
    Backend("torch", plain_passes.rms_norm_backward, plain_passes.takes),
)
define(
    "gated",
    Backend("c", c_rows.gated, c.supported),
    Backend("torch", plain_passes.gated, plain_passes.takes),
)
define(
    "gated_backward",
    Backend("c", c_rows.gated_backward, c.supported),
    Backend("torch", plain_passes.gated_backward, plain_passes.takes),
)
define("rotate", Backend("c", c_rows.rotate, c.supported))
define(
    "linear",
    Backend("onednn", onednn.linear, onednn.takes_floats),
    Backend("float32", widened.linear, widened.takes),
    Backend("torch", plain.linear),
)
define(
    "skinny_product",
    Backend("c", c_low_rank.skinny_product, c_low_rank.takes),
    Backend("onednn", onednn.skinny_product, onednn.takes_floats),
    Backend("float32", widened.skinny_product, widened.takes),
    Backend("torch", plain.skinny_product),
)
define(
    "transposed_product",
    Backend("c", c_low_rank.transposed_product, c_low_rank.takes),
    Backend("onednn", onednn.transposed_product, onednn.takes_floats),
    Backend("float32", widened.transposed_product, widened.takes),
    Backend("torch", plain.transposed_product),
)
define("attention", Backend("c", c_attention.attention, c_attention.takes), by_device=True)
define("attention_backward", Backend("c", c_attention.attention_backward, c_attention.takes), by_device=True)
_INTEGERS: Any = {
    "takes": plain.takes_integers,
    "why_not": plain.why_no_integers,
    "slow": plain.integers_are_slow,
    "described": plain.describe_integers,
}
define(
    "pack_weight",
    Backend("c", c_dot.Panels.pack, c_dot.takes, c_dot.why_not, described=c_dot.describe, any_rows=True),
    Backend("onednn", onednn.Prepacked.pack, onednn.takes, described=onednn.describe),
    _triton("pack_weight", product.TiledWeight.pack),
    Backend("torch", plain.Integers.pack, **_INTEGERS),
    by_device=True,
)
define(
    "pack_both_ways",
    Backend("c", c_both.TurnedPanels.pack, c_dot.takes, c_dot.why_not, described=c_dot.describe, any_rows=True),
    _triton("pack_both_ways", product.TiledBothWays.pack),
    Backend("torch", plain.IntegersBothWays.pack, **_INTEGERS),
    by_device=True,
)
define(
    "hold_both_ways",
    Backend("triton", product.TiledBothWays.holding, judged.takes("pack_both_ways")),
    Backend("torch", plain.IntegersBothWays.holding, plain.pays_with_integers),
    by_device=True,
)
define(
    "pack_floats",
    _triton("pack_floats", product.TiledFloats.pack),
    Backend("torch", floats.ScaledFloats.pack, floats.takes, floats.why_not, floats.slow),
    by_device=True,
)
define("quantise_weight", Backend("torch", plain.Integers.quantise, **_INTEGERS), by_device=True)


def squared_row_norms(x: Tensor) -> Tensor:
    """`||x[t, :]||^2` of `x: (T, n)`, in float32 at least: (T,)."""
    found: Tensor = choose("squared_row_norms", x).run(x)
    return found


def column_maxima(x: Tensor) -> Tensor:
    """`max_t |x[t, i]|` of `x: (T, n)`: (n,) float32. The cheapest measure of a column there is."""
    found: Tensor = choose("column_maxima", x).run(x)
    return found


def squared_column_norms(x: Tensor) -> Tensor:
    """`||x[:, i]||^2` of `x: (T, n)`, in float32 at least: (n,)."""
    found: Tensor = choose("squared_column_norms", x).run(x)
    return found


def choose_rows(squared: Tensor, *, kept: int | None, share: float, step: int) -> tuple[Tensor, Tensor | None]:
    """The `kept` largest of `squared: (T,)`, ascending: (K,) int64.

    And their inverse where it comes for free, else None: where row t went, or -1, (T,) int32.
    With `kept=None` as many as hold `share` of the sum, at least one, rounded up to a multiple of `step`.
    """
    found: tuple[Tensor, Tensor | None] = choose("choose_rows", squared).run(squared, kept=kept, share=share, step=step)
    return found


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
    """Fill in what the softmax of `y = cap tanh(scale z / cap)`, or `y = scale z` without cap, says of `z: (N, V)`.

    Args:
        targets: (N,) int64.
        smoothing: s makes the log-probability of target t `(1 - s) log p_t + s mean log p`.
        log_probs: (N,) float32, written. entropy: (N,) float32, and top1: (N,) bool, written unless None.
        write: z becomes the gradient of `log_probs`.
    """
    operation = "softmax_rows" if cap is None else "capped_softmax_rows"
    choose(operation, z).run(
        z,
        targets,
        scale=scale,
        cap=cap,
        smoothing=smoothing,
        log_probs=log_probs,
        entropy=entropy,
        top1=top1,
        write=write,
    )


def pack_weight(weight: Tensor, scale: Tensor) -> PackedWeight:
    """`weight: (out, in)` in 8 bits, to be kept, with these `scale`s of its columns: (in,) float32."""
    found: PackedWeight = choose("pack_weight", weight.device).run(weight, scale)
    return found


def pack_floats(weight: Tensor, scale: Tensor) -> PackedWeight:
    """`weight: (out, in)` in 8-bit floats (e4m3), with these `scale`s of its columns: (in,) float32."""
    found: PackedWeight = choose("pack_floats", weight.device).run(weight, scale)
    return found


def pack_both_ways(weight: Tensor, scale: Tensor, input_scale: Tensor | None = None) -> BothWays:
    """`weight: (out, in)` in 8 bits for `x W^T` and `G W`, with these `scale`s of its rows: (out,) float32.

    With `input_scale`, (in,) float32, these are the scales of the rows of `weight / input_scale`.
    """
    found: BothWays = choose("pack_both_ways", weight.device).run(weight, scale, input_scale)
    return found


def hold_both_ways(q: Tensor, scale: Tensor) -> BothWays:
    """The weight `diag(scale) q` of `q: (out, in)` int8, row by row, and `scale: (out,)` float32. Nothing is copied.

    Only `available` where a product of such bytes is not known to be slow.
    """
    found: BothWays = choose("hold_both_ways", q.device).run(q, scale, q.shape[1])
    return found


def quantise_weight(weight: Tensor, scale: Tensor) -> PackedWeight:
    """`pack_weight` for a single product: it takes less time to make, and more to multiply with."""
    found: PackedWeight = choose("quantise_weight", weight.device).run(weight, scale)
    return found


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`round(x / scale)` of `x: (T, n)` with `scale = max |row| / 127`: (T, n) int8, and the scales: float32 (T,)."""
    q, scale = choose("quantise_rows", x).run(x, None, offset=0)
    return q.view(torch.int8), scale


def rms_norm(x: Tensor, weight: Tensor, *, offset: float, eps: float, rounds: bool) -> tuple[Tensor, Tensor]:
    """`(offset + weight) x r` of `x: (..., n)` with `r = 1 / sqrt(mean x^2 + eps)`, and r: float32. Where `available`.

    `x r` is rounded to x's dtype before it is multiplied, if `rounds`. All contiguous.
    """
    found: tuple[Tensor, Tensor] = choose("rms_norm", x).run(x, weight, offset=offset, eps=eps, rounds=rounds)
    return found


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, *, offset: float) -> Tensor:
    """The gradient of x from that of `rms_norm`, whose r is `inverse`; all contiguous."""
    found: Tensor = choose("rms_norm_backward", x).run(grad, x, weight, inverse, offset=offset)
    return found


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) up`, of contiguous tensors; `silu(gate)` is rounded to their dtype first. Where `available`."""
    found: Tensor = choose("gated", gate).run(gate, up)
    return found


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from that of `gated`; all contiguous."""
    found: tuple[Tensor, Tensor] = choose("gated_backward", gate).run(grad, gate, up)
    return found


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, *, transposed: bool) -> Tensor:
    """Rotary embedding of `x: (B, T, heads, d)`: `(x1 c1 - x2 s1, x2 c2 + x1 s2)`; all contiguous. Where `available`.

    `cosine`, `sine`: (B or 1, T, d), whose halves are c1 and c2, s1 and s2. With `transposed` the gradient of x from
    that of the result: `(x1 c1 + x2 s2, x2 c2 - x1 s1)`.
    """
    found: Tensor = choose("rotate", x).run(x, cosine, sine, transposed=transposed)
    return found


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """`x W^T + b` of `x: (..., in)` and `weight: (out, in)`: (..., out), in `out` if it is given.

    All of x's dtype but the weight, which is cast if it has another one.
    """
    found: Tensor = choose("linear", x).run(x, weight, bias, out=out)
    return found


def skinny_product(x: Tensor, m: Tensor, *, alpha: float = 1.0, onto: Tensor | None = None) -> Tensor:
    """`alpha x M` of `x: (T, k)` and `m: (k, n)`, of which k or n is small: (T, n), added to `onto` in place if given.

    All of one dtype; `onto` with contiguous rows.
    """
    found: Tensor = choose("skinny_product", x).run(x, m, alpha=alpha, onto=onto)
    return found


def transposed_product(p: Tensor, x: Tensor) -> Tensor:
    """`p^T x` of `p: (T, r)`, of which r is small, and `x: (T, n)`: (r, n), in p's dtype or float32.

    `x` may be int8, whatever p is.
    """
    found: Tensor = choose("transposed_product", p).run(p, x)
    return found


def attention(query: Tensor, key: Tensor, value: Tensor, sequences: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of each of `sequences`, (batch, first token, length): (S, 3) int64, which hold every token.

    `query: (B, H, T, d)`, `key`, `value`: (B, H or fewer, T, d), float32 or bfloat16, d a multiple of 32. Returns
    (B, T, H, d) and the logarithms of the sums of the softmax, float32 (B, H, T). Where `available`.
    """
    run = choose("attention", query.device).run
    found: tuple[Tensor, Tensor] = run(query, key, value, sequences, scale=scale)
    return found


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logs: Tensor,
    sequences: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, as they are shaped, from that of `attention`'s `out`: (B, T, H, d)."""
    run = choose("attention_backward", query.device).run
    found: tuple[Tensor, Tensor, Tensor] = run(grad, query, key, value, out, logs, sequences, scale=scale)
    return found


__all__ = [
    "attention",
    "attention_backward",
    "available",
    "choose_rows",
    "column_maxima",
    "gated",
    "gated_backward",
    "hold_both_ways",
    "linear",
    "pack_both_ways",
    "pack_floats",
    "pack_weight",
    "quantise_rows",
    "quantise_weight",
    "rms_norm",
    "rms_norm_backward",
    "rotate",
    "skinny_product",
    "softmax_rows",
    "squared_column_norms",
    "squared_row_norms",
    "transposed_product",
]
