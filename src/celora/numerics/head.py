"""Language-model loss over labelled tokens only, in chunks. All logits and a weight gradient never exist in memory.

A token without a label contributes nothing to the loss, so its logits are not computed. For the other tokens, with
z = W h + b, y = the model's own scaling and soft-capping of z, and target t,

    log p = y_t - logsumexp(y),    d log p / dh = ((e_t - softmax(y)) dy/dz) W.

The forward computes both, while the chunk's logits are in memory. The loss is linear in the log p of its tokens. So
backward only scales the rows of the second: no logits are saved, and none are computed twice.

The second can be estimated, too. A softmax gradient G is large for few words: the targets, and words that the model
confuses them with. With a `keep_ratio`, only that share of W's rows is multiplied. For each chunk, word j is drawn with
probability `p_j = min(1, lambda max_t |G_tj|)` and weighted by `1 / p_j`. So the error averages out over the steps.

The draw also has little variance. Words with `p_j = 1` are certain. The others have nearly the same distribution q in
all tokens of the chunk. Their average is computed exactly, and only the deviation D from it is drawn. Each row of D
adds up to zero, so the mean w may be subtracted from W's rows:

    G W = G_C W_C + a w + D (W - 1 w)  ~=  G_C W_C + a w + sum_{j drawn} (D_j / p_j) (W_j - w),

with C the certain words, `a = sum_{j not in C} G_j`, `q_j = max(0, -sum_t G_tj)` outside C, normalised, `w = q W` and
`D = G - a q`. The estimate is unbiased, whatever a and q are in D. There a leaves out a token's own target, and q the
tokens whose target is j: if targets were not certain, rows would add up to zero, and nothing would be subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from celora.errors import CELoraError
from celora.kernels import widened
from celora.kernels.backends import choose
from celora.kernels.operations import column_maxima, linear, softmax_rows
from celora.machine.device import reads_freely
from celora.numerics.head_in_graph import ChunkScores, Scorer, sizes
from celora.numerics.products.both_ways import Int8BothWays
from celora.numerics.sampling import as_weights
from celora.numerics.select import columns_of, drawn, grain

# Limits of a chunk: enough tokens for a fast product, few enough for little memory.
_CHUNK_NUMBERS, _CHUNK_ROWS = 2**24, 1024
_CERTAIN = 1 - 1e-6  # a probability that rounding may have lowered


@dataclass(frozen=True)
class Logits:
    """What a model does to its head's output before the softmax: `y = cap tanh(scale z / cap)`, or `scale z`."""

    scale: float = 1.0
    cap: float | None = None


@dataclass(frozen=True)
class TokenScores:
    """What the softmax says about each labelled token.

    Attributes:
        log_probs: log-probabilities of the targets, (N,) float32, differentiable; with label smoothing s,
            `(1-s) log p_t + s mean log p`.
        entropy: entropies of the distributions, (N,) float32, differentiable; None unless asked for.
        top1: whether the target is the most likely token, (N,) bool; None unless asked for.
    """

    log_probs: Tensor
    entropy: Tensor | None
    top1: Tensor | None


def score_tokens(
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logits: Logits | None = None,
    smoothing: float = 0.0,
    statistics: bool = False,
    keep_ratio: float = 1.0,
    seed: int = 0,
    measure: Callable[[Tensor, Tensor], None] | None = None,
    product: Int8BothWays | None = None,
    compare: Callable[[Tensor, Tensor, Tensor, Tensor | None], None] | None = None,
    compiled: Scorer | None = None,
) -> TokenScores:
    """The log-probabilities of `targets` after the tokens `rows`.

    Args:
        hidden: the last hidden states, (..., H), any number of leading dimensions.
        rows: which hidden states predict a labelled token, (N,) int64, indices into the flattened leading dimensions.
        targets: the labels, (N,) int64.
        weight: of the head, frozen, (V, H); bias: (V,) or None.
        logits: what the model does to the head's output; nothing if None.
        smoothing: label smoothing, 0 <= s < 1.
        statistics: compute entropy and top1 too.
        keep_ratio: share of the vocabulary that the gradient is multiplied with, 0 < keep_ratio <= 1; 1 is exact.
        seed: seed of that draw. Give different ones in different calls.
        measure: called with the estimate and the exact gradient of each chunk of tokens, (n, H) each. The gradient of
            the log-probabilities is exact then.
        product: computes the logits in 8 bits, from its own copy of the weight; exactly if None.
        compare: called with the first chunk's hidden states, (n, H), their logits `W h + b`, (n, V), W and b.
        compiled: `score_chunk` by `torch.compile`, for devices whose graphs need all shapes to be among a few. It takes
            the place of the kernels where the gradient is exact, nothing is measured, and no weight has to be cast.
    """
    logits = logits or Logits()
    if measure is not None or compare is not None or _kept(keep_ratio, weight) < len(weight):
        compiled = None
    log_probs, entropy, top1 = _Scores.apply(  # type: ignore[no-untyped-call]
        hidden,
        rows,
        targets,
        weight,
        bias,
        logits,
        smoothing,
        statistics,
        keep_ratio,
        seed,
        measure,
        product,
        compare,
        compiled,
    )
    if not statistics:
        return TokenScores(log_probs, None, None)
    if torch.is_grad_enabled() and hidden.requires_grad:
        entropy = _Entropy.apply(entropy, hidden, rows, weight, bias, logits, product)  # type: ignore[no-untyped-call]
    return TokenScores(log_probs, entropy, top1)


class _Entropy(torch.autograd.Function):
    """Gives known entropies their gradient. Few losses use it, so the logits are computed again then, chunk by chunk.

    With p = softmax(y) and H its entropy, `dH / dy_j = -p_j (log p_j + H)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        entropy: Tensor,
        hidden: Tensor,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logits: Logits,
        product: Int8BothWays | None,
    ) -> Tensor:
        ctx.save_for_backward(entropy, hidden, rows, weight, bias)
        ctx.logits, ctx.product, ctx.dtype = logits, product, _compute_dtype(hidden, weight)
        return entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        entropy, hidden, rows, weight, bias = ctx.saved_tensors
        if reads_freely(grad.device) and not grad.any():  # TRL may multiply its bonus by 0
            return None, torch.zeros_like(hidden), *[None] * 5
        chosen, scale, cap = _chosen(hidden, rows, ctx.dtype), ctx.logits.scale, ctx.logits.cap
        gradient = torch.empty_like(chosen)
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
            size = max(1, chunk_size(len(rows), len(w)) // 4)  # several float32 copies of a chunk
            buffer = _buffer(chosen, size, len(w), ctx.product)
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                y = _project(chosen[part], weight, w, b, buffer, ctx.product).float().mul_(scale)
                slope = None
                if cap is not None:
                    y.div_(cap).tanh_()
                    slope = (1 - y.square()).mul_(scale)
                    y.mul_(cap)
                log_p = y.log_softmax(dim=-1).clamp_(min=torch.finfo(torch.float32).min)
                by_y = log_p.exp().mul_(log_p.add_(entropy[part, None])).mul_(-grad[part, None])
                by_z = by_y.mul_(scale if slope is None else slope)
                linear(by_z.to(w.dtype), w.t(), out=gradient[part])
        return None, _at_rows(gradient, rows, hidden.shape, hidden.dtype), *[None] * 5


@torch.no_grad()
def mean_logits(hidden: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, logits: Logits) -> Tensor:
    """The mean over the vocabulary of the logits of the tokens `rows`, without a cap: (N,) float32.

    `mean_j s (w_j h + b_j) = s (w h + b)`, with the means w of the rows of W and b of the biases. Arguments are those
    of `score_tokens`.
    """
    means = torch.mv(_chosen(hidden, rows, torch.float32), weight.mean(0, dtype=torch.float32))
    return logits.scale * (means if bias is None else means + bias.mean(dtype=torch.float32))


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the head's products: autocast's, if it is on, or the weight's if the CPU does not multiply that."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden.dtype
    return weight.dtype if device == "cpu" and widened.autocasts() else torch.get_autocast_dtype(device)


def _chosen(hidden: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The hidden states `rows` of `hidden: (..., H)`: (N, H)."""
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows).to(dtype)


def _buffer(chosen: Tensor, rows: int, words: int, product: Int8BothWays | None) -> Tensor | None:
    """Where the logits of each chunk of `rows` are written; None if what multiplies `chosen` cannot write there."""
    writes = product is not None or choose("linear", chosen).name != "onednn"
    return chosen.new_empty(rows, words) if writes else None


def _project(
    chosen: Tensor, weight: Tensor, w: Tensor, b: Tensor | None, buffer: Tensor | None, product: Int8BothWays | None
) -> Tensor:
    """`chosen w^T + b`, (n, V), in 8 bits if there is a `product`; w is `weight` in the dtype of `chosen`."""
    if buffer is None:
        return linear(chosen, w, b)
    out = buffer[: len(chosen)]
    if product is None:
        return linear(chosen, w, b, out=out)
    product.project(chosen, weight, b, out)
    return out


def _at_rows(gradient: Tensor, rows: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Gradients of some hidden states, (N, H), at their places among all: (..., H)."""
    full = gradient.new_zeros(shape, dtype=dtype)
    full.view(-1, shape[-1]).index_copy_(0, rows, gradient.to(dtype))
    return full


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        rows: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logits: Logits,
        smoothing: float,
        statistics: bool,
        keep_ratio: float,
        seed: int,
        measure: Callable[[Tensor, Tensor], None] | None,
        product: Int8BothWays | None,
        compare: Callable[[Tensor, Tensor, Tensor, Tensor | None], None] | None,
        compiled: Scorer | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, count, wanted, real = _compute_dtype(hidden, weight), len(rows), ctx.needs_input_grad[0], rows
        graph = None if compiled is None or not count else _graph(compiled, weight, dtype, product)
        if count and reads_freely(hidden.device):  # an accelerator's gather asserts the same
            least, most = (int(bound) for bound in targets.aminmax())
            if not 0 <= least <= most < len(weight):
                raise CELoraError(
                    f"labels from {least} to {most} for a head of {len(weight)} words; expected 0 to "
                    f"{len(weight) - 1}, or -100 for no label."
                )
            # Pad to a round number of tokens. Nobody reads the scores of the padding.
            rows, targets = (_padded(t, -count % grain(count)) for t in (rows, targets))
        size = chunk_size(len(rows), len(weight))
        if graph is not None:
            size, extra = sizes(count, size)
            rows, targets = (_padded(t, extra) for t in (rows, targets))
        n, chosen = len(rows), _chosen(hidden, rows, dtype)
        log_probs = hidden.new_empty(n, dtype=torch.float32)
        entropy = hidden.new_empty(n if statistics else 0, dtype=torch.float32)
        top1 = hidden.new_empty(n if statistics else 0, dtype=torch.bool)
        gradient = torch.empty_like(chosen) if wanted else None
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            buffer = None if graph else _buffer(chosen, size, len(w), product)
            for start in range(0, n, max(1, size)):
                part = slice(start, start + size)
                out = ChunkScores(
                    log_probs[part],
                    entropy[part] if statistics else None,
                    top1[part] if statistics else None,
                    None if gradient is None else gradient[part],
                )
                if graph is not None:
                    graph(chosen[part], targets[part], b, logits, smoothing, out)
                    continue
                z = _project(chosen[part], weight, w, b, buffer, product)
                if compare is not None and start == 0:
                    compare(chosen[part], z, w, b)
                softmax_rows(
                    z,
                    targets[part],
                    scale=logits.scale,
                    cap=logits.cap,
                    smoothing=smoothing,
                    log_probs=out.log_probs,
                    entropy=out.entropy,
                    top1=out.top1,
                    write=wanted,
                )
                if out.gradient is not None:
                    through_the_head(z, w, targets[part], keep_ratio, out.gradient, seed + start)
                    if measure is not None and start < count:  # behind that, all is padding
                        estimate = out.gradient.clone()
                        linear(z, w.t(), out=out.gradient)
                        measure(estimate[: count - start], out.gradient[: count - start])
                del z  # without a buffer, the next chunk's logits would be beside it
        log_probs, entropy, top1 = log_probs[:count], entropy[:count], top1[:count]
        ctx.save_for_backward(None if gradient is None else gradient[:count], real)
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        ctx.mark_non_differentiable(entropy, top1)
        return log_probs, entropy, top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        gradient, rows = ctx.saved_tensors
        return _at_rows(gradient * grad[:, None], rows, ctx.shape, ctx.dtype), *[None] * 13


def _graph(
    compiled: Scorer, weight: Tensor, dtype: torch.dtype, product: Int8BothWays | None
) -> Callable[[Tensor, Tensor, Tensor | None, Logits, float, ChunkScores], None] | None:
    """What fills in the scores of a chunk by a graph; None if a graph cannot read this weight where it is.

    What is gathered or cast is somewhere else in each call. On devices that are read freely, kernels are faster.
    """
    if not isinstance(weight, nn.Parameter) or weight.dtype != dtype or reads_freely(weight.device):
        return None
    copy = None if product is None else product.in_graphs(weight)
    if product is not None and copy is None:
        return None

    def fill_in(
        hidden: Tensor, targets: Tensor, bias: Tensor | None, logits: Logits, smoothing: float, out: ChunkScores
    ) -> None:
        found = compiled(
            hidden,
            targets,
            weight,
            bias,
            copy,
            scale=logits.scale,
            cap=logits.cap,
            smoothing=smoothing,
            statistics=out.entropy is not None,
            wanted=out.gradient is not None,
        )
        for place, values in zip(out, found, strict=True):
            if place is not None and values is not None:
                place.copy_(values)  # the next replay of a CUDA graph writes over its results

    return fill_in


def _padded(t: Tensor, count: int) -> Tensor:
    """The first number again at the end, `count` times."""
    return torch.cat([t, t[:1].expand(count)])


def _kept(keep_ratio: float, weight: Tensor) -> int:
    """How many words the gradient of the logits is multiplied with."""
    return max(1, round(keep_ratio * len(weight)))


def chunk_size(tokens: int, words: int) -> int:
    """How many tokens a chunk has."""
    chunks = max(1, -(-tokens // max(_CHUNK_ROWS, _CHUNK_NUMBERS // words)))
    return -(-tokens // chunks)


def through_the_head(grad: Tensor, weight: Tensor, targets: Tensor, keep_ratio: float, out: Tensor, seed: int) -> None:
    """`out = grad W`, or its estimate from words drawn (see above): (n, V) x (V, H) -> (n, H); `targets: (n,)`."""
    kept = _kept(keep_ratio, weight)
    largest = None if kept == len(weight) else column_maxima(grad)
    # If a token's gradient is no number, there is no choice of words. Looking would wait for an accelerator.
    if largest is None or (reads_freely(largest.device) and not bool(torch.isfinite(largest).all())):
        linear(grad, weight.t(), out=out)
        return
    index, factors, p = drawn(largest, kept, seed=seed, draw=0)
    own = grad.gather(1, targets[:, None])[:, 0].float()
    q = grad.sum(0).float().neg_().index_add_(0, targets, own).clamp_(min=0) * (p < _CERTAIN)
    q = (q / q.sum().clamp(min=torch.finfo(torch.float32).tiny)).to(grad.dtype)
    some, total = columns_of(grad, index), grad.sum(1).float()  # `sum(dtype=float32)` would copy grad first
    a = total - torch.mv(some, (p[index] >= _CERTAIN).to(some.dtype)).float() - own * (p[targets] < _CERTAIN)
    some.addr_(a.to(some.dtype), q[index], alpha=-1).mul_(as_weights(factors, some.dtype))
    linear(some, weight.index_select(0, index).t(), out=out)
    left = total - some.sum(1, dtype=torch.float32)
    out.addr_(left.to(out.dtype), linear(q[None], weight.t())[0])
