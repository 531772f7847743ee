"""The kernels themselves. Only this file imports Triton; `launches` and `product` launch what is here.

Absolute values are compared as the integers that their bits are: the order is the same, and a NaN is above infinity, so
it is never lost in a maximum. Rounding adds and takes off 1.5 * 2^23 steps, which rounds to even as torch does.
Offsets of rows have 64 bits: the logits of a chunk, or a weight, may have more than 2^31 numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # the smallest normal number: `plain.divisor`


@triton.jit
def magnitude_bits(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def loaded_row(source, fold, j, inside, FOLDED: tl.constexpr):
    x = tl.load(source + j, mask=inside, other=0.0).to(tl.float32)
    if FOLDED:
        x = x * tl.load(fold + j, mask=inside, other=0.0)
    return x


@triton.jit
def quantise_row(
    x, index, fold, q, scale, columns, row_stride,
    LARGEST: tl.constexpr, GATHERED: tl.constexpr, FOLDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`q[k] = round(fold x[t] / s)` with `t = index[k]`, `s = scale[k] = max |fold x[t]| / LARGEST`. One program a row.

    Where a row is not finite, its scale is not, and its numbers of no account.
    """
    k = tl.program_id(0).to(tl.int64)
    row = tl.load(index + k) if GATHERED else k
    source = x + row * row_stride
    most = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, magnitude_bits(loaded_row(source, fold, j, j < columns, FOLDED)))
    step = tl.div_rn(tl.max(most, 0).to(tl.float32, bitcast=True), LARGEST)
    step = tl.where(step < SMALLEST, SMALLEST, step)
    tl.store(scale + k, step)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        steps = tl.div_rn(loaded_row(source, fold, j, j < columns, FOLDED), step)
        rounder = ROUNDER
        if LARGEST != 127.0:  # e4m3 has three bits after the first, and no finer steps below 2^-6
            power = tl.maximum(magnitude_bits(steps) & 0x7F800000, 121 << 23)
            rounder = power.to(tl.float32, bitcast=True) * (ROUNDER / 8.0)
        steps = (steps + rounder) - rounder
        steps = tl.where(tl.abs(steps) <= LARGEST, steps, 0.0)
        tl.store(q + k * columns + j, steps.to(q.dtype.element_ty), mask=j < columns)


@triton.jit
def square_row(x, squared, columns, row_stride, BLOCK: tl.constexpr):
    """`squared[t] = sum_i x[t, i]^2`. One program a row."""
    t = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        v = tl.load(x + t * row_stride + j, mask=j < columns, other=0.0).to(tl.float32)
        total += v * v
    tl.store(squared + t, tl.sum(total, 0))


@triton.jit
def reduce_columns(
    x, partial, rows, columns, row_stride,
    SQUARED: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of `PART` rows, each column's sum of squares or, without `SQUARED`, the bits of its largest `|x|`."""
    part, j = tl.program_id(1), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    found = tl.zeros((ROWS, COLUMNS), tl.float32 if SQUARED else tl.int32)
    for start in range(0, PART, ROWS):
        t = part * PART + start + tl.arange(0, ROWS)
        inside = (t < rows)[:, None] & (j < columns)[None, :]
        v = tl.load(x + t[:, None].to(tl.int64) * row_stride + j[None, :], mask=inside, other=0.0)
        if SQUARED:
            found += v.to(tl.float32) * v.to(tl.float32)
        else:
            found = tl.maximum(found, magnitude_bits(v))
    reduced = tl.sum(found, 0) if SQUARED else tl.max(found, 0)
    tl.store(partial + part.to(tl.int64) * columns + j, reduced, mask=j < columns)


@triton.jit
def scaled(z, scale, cap, CAPPED: tl.constexpr):
    """`y = cap tanh(scale z / cap)`, or `scale z`."""
    y = z.to(tl.float32) * scale
    if CAPPED:
        shrunk = tl.exp(-2.0 * tl.abs(y) / cap)
        size = cap * (1.0 - shrunk) / (1.0 + shrunk)
        y = tl.where(y < 0, -size, size)
    return y


@triton.jit
def softmax_row(
    z, targets, log_probs, entropy, top1, columns, row_stride, scale, cap, smoothing,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `softmax_rows` says of one row, in two readings of it; the second writes the gradient where z was.

    A target that is no column makes all of it NaN: looking before the launch would wait for the device.
    """
    t = tl.program_id(0).to(tl.int64)
    row, target = z + t * row_stride, tl.load(targets + t)
    given = (target >= 0) & (target < columns)
    at_target = scaled(tl.load(row + target, mask=given, other=float("nan")), scale, cap, CAPPED)
    most, total, weighted, plainly = float("-inf"), 0.0, 0.0, 0.0
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        y = scaled(tl.load(row + j, mask=j < columns, other=float("-inf")), scale, cap, CAPPED)
        y = tl.where(j < columns, y, float("-inf"))  # a cap makes something finite of what is past the end
        now = tl.maximum(most, tl.max(y, 0))
        base = tl.where(now == float("-inf"), 0.0, now)  # as long as every word is impossible
        old = tl.where(most == float("-inf"), 0.0, tl.exp(most - base))
        p = tl.exp(y - base)
        if ENTROPY:  # sum p (y - base), of which the earlier part was taken from another base
            moved = tl.where(most == float("-inf"), 0.0, total * (most - base))
            weighted = (weighted + moved) * old + tl.sum(tl.where(p == 0.0, 0.0, p * (y - base)), 0)
        total = total * old + tl.sum(p, 0)
        plainly += tl.sum(tl.where(j < columns, y, 0.0), 0)
        most = now
    base = tl.where(most == float("-inf"), 0.0, most)
    log_total = tl.log(total)  # base is subtracted first: added to this, it would cost digits
    log_p = (at_target - base) - log_total
    tl.store(log_probs + t, (1.0 - smoothing) * log_p + smoothing * ((plainly / columns - base) - log_total)
             if smoothing != 0.0 else log_p)  # fmt: skip
    if ENTROPY:
        tl.store(entropy + t, log_total - weighted / total)
    if TOP1:
        tl.store(top1 + t, ((at_target >= most) & (total > 0.0)).to(tl.int8))
    if WRITE:
        for start in range(0, columns, BLOCK):
            j = start + tl.arange(0, BLOCK)
            y = scaled(tl.load(row + j, mask=j < columns, other=0.0), scale, cap, CAPPED)
            grad = smoothing / columns - tl.exp((y - base) - log_total) + tl.where(j == target, 1.0 - smoothing, 0.0)
            grad = tl.where(given, grad, float("nan"))
            if CAPPED:
                grad = grad * (1.0 - (y / cap) * (y / cap))
            tl.store(row + j, (grad * scale).to(z.dtype.element_ty), mask=j < columns)


@triton.jit
def scaled_product(
    a, b, a_scale, b_scale, bias, index, out, rows, columns, depth, b_depth_stride, b_column_stride, out_stride,
    SCATTERED: tl.constexpr, BIASED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`out[t] = a_scale[k] (a[k] b) b_scale + bias` with `t = index[k]`, in 8 bits; a: (rows, depth), contiguous.

    Programs are numbered so that `GROUP` blocks of rows share a block of b while it is in the L2 cache.
    """
    number, wide = tl.program_id(0), tl.cdiv(columns, COLUMNS)
    first = number // (GROUP * wide) * GROUP
    height = tl.minimum(tl.cdiv(rows, ROWS) - first, GROUP)
    k = (first + number % (GROUP * wide) % height) * ROWS + tl.arange(0, ROWS)
    j = number % (GROUP * wide) // height * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, DEPTH)
    left = a + k[:, None].to(tl.int64) * depth + i[None, :]
    right = b + i[:, None].to(tl.int64) * b_depth_stride + j[None, :].to(tl.int64) * b_column_stride
    whole: tl.constexpr = a.dtype.element_ty == tl.int8
    sums = tl.zeros((ROWS, COLUMNS), tl.int32 if whole else tl.float32)
    for start in range(0, depth, DEPTH):
        more = i < depth - start
        x = tl.load(left, mask=(k < rows)[:, None] & more[None, :], other=0.0)
        y = tl.load(right, mask=more[:, None] & (j < columns)[None, :], other=0.0)
        # Hopper's own sums of 8-bit floats keep 14 bits: they are added up in float32 every DEPTH numbers.
        more_exact: tl.constexpr = None if whole else DEPTH
        sums = tl.dot(x, y, sums, max_num_imprecise_acc=more_exact, out_dtype=sums.dtype)
        left += DEPTH
        right += DEPTH * b_depth_stride
    result = sums.to(tl.float32) * tl.load(a_scale + k, mask=k < rows, other=0.0)[:, None]
    result *= tl.load(b_scale + j, mask=j < columns, other=0.0)[None, :]
    if BIASED:
        result += tl.load(bias + j, mask=j < columns, other=0.0).to(tl.float32)[None, :]
    t = tl.load(index + k, mask=k < rows, other=0) if SCATTERED else k.to(tl.int64)
    inside = (k < rows)[:, None] & (j < columns)[None, :]
    tl.store(out + t[:, None] * out_stride + j[None, :], result.to(out.dtype.element_ty), mask=inside)
