/* Row-wise passes on CPU around an 8-bit product, of the softmax and between a decoder's products.
 *
 * Plain C, left to the compiler to vectorise. This file and what it includes are compiled once for each tier of
 * instructions, whose name is TIER (compiling.py). Every function exists for float32 and for bfloat16 (as its 16 bits):
 * the file includes itself once for each. Rows may be `stride` numbers apart. What Python calls is in `kernels.h`.
 */

#ifndef TYPE

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "team.h"

typedef uint16_t bf16;

static inline float from_f32(float x) { return x; }
static inline float to_f32(float x) { return x; }

static inline float from_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline int32_t magnitude_f32(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7fffffff;
}
static inline int32_t magnitude_bf16(bf16 x) { return (int32_t)(x & 0x7fff) << 16; }

static inline float from_magnitude(int32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* The scale of a row in which this magnitude is so many steps, and its inverse. A NaN stays one. */
static inline float scale_of_row(int32_t largest, float steps, float *scale) {
    const float most = from_magnitude(largest), step = most / steps;
    *scale = step < FLT_MIN ? FLT_MIN : step; /* smaller ones have no finite inverse; a NaN is not smaller */
    return step < FLT_MIN ? 1.0f / FLT_MIN : steps / most;
}

/* Round to nearest even. A NaN stays one where it has bits that are kept, as those have that come from bfloat16 or from
 * arithmetic. */
static inline bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* exp(x) for x <= 0, to 2 units in the last place; 0 below -87; a NaN stays one. 2^n (1 + f ln 2 + ...), |f| <= 1/2. */
static inline float exp_negative(float x) {
    float t = x * 1.44269504f;
    t = t < -125.0f ? -125.0f : t;
    float shifted = t + 12582912.0f; /* 1.5 * 2^23: rounds to the nearest integer, in the low bits */
    float f = t - (shifted - 12582912.0f);
    float p = 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    uint32_t power = (uint32_t)(bits - 0x4b400000 + 127) << 23;
    float two_to_n;
    memcpy(&two_to_n, &power, 4);
    return x < -87.0f ? 0.0f : p * two_to_n;
}

static inline float sigmoid(float x) {
    float e = exp_negative(-fabsf(x)); /* a NaN stays one */
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

/* Where a walk through the numbers from the largest down has met `count` of them or, with count < 0, a sum of `mass`:
 * the bits of the number it ends at, in `larger` how many were larger, and in `last` how many as large as that it has met.
 * One digit of them at a time, so that nothing is sorted. Sizes compare like their bits. */
static uint32_t walk_down(const float *x, int64_t rows, int64_t count, double mass, int64_t *larger, int64_t *last) {
    static const int shifts[] = {20, 9, 0}, digits[] = {2048, 2048, 512};
    uint32_t known = 0, mask = 0;
    int64_t met = 0;
    double held = 0;
    for (int level = 0; level < 3; level++) {
        int32_t number[2048] = {0};
        double sum[2048] = {0};
        for (int64_t t = 0; t < rows; t++) {
            uint32_t bits;
            memcpy(&bits, x + t, 4);
            if ((bits & mask) != known) continue;
            const int digit = (int)(bits >> shifts[level]) & (digits[level] - 1);
            number[digit]++;
            sum[digit] += x[t];
        }
        int digit = digits[level] - 1, smallest = 0;
        while (!number[smallest]) smallest++;
        for (; digit > smallest; digit--) {
            if (count < 0 ? held + sum[digit] >= mass : met + number[digit] >= count) break;
            met += number[digit];
            held += sum[digit];
        }
        known |= (uint32_t)digit << shifts[level];
        mask |= (uint32_t)(digits[level] - 1) << shifts[level];
        *last = number[digit];
    }
    float value;
    memcpy(&value, &known, 4);
    const int64_t missing = count < 0 ? (int64_t)ceil((mass - held) / value) : count - met;
    *last = missing < 1 ? 1 : missing < *last ? missing : *last;
    *larger = met;
    return known;
}

/* Choose rows by their squared norms: the `kept` largest or, with kept < 0, as many of the largest as hold `share` of
 * the sum (every row that is not zero if share is 1, every row if the sum is not finite or may have lost terms to
 * underflow), rounded up to a multiple of `step`. index: the chosen, ascending; position: where each row went, or -1.
 * Returns how many. */
static int64_t choose_rows(const float *squared, int64_t rows, int64_t kept, double share, int64_t step, int64_t *index,
                           int32_t *position) {
    uint32_t least = 0;
    int64_t larger = 0, last = rows; /* than the least; of those as large as it */
    if (kept < 0) {
        double sum = 0;
        int64_t nonzero = 0;
        for (int64_t t = 0; t < rows; t++) sum += squared[t], nonzero += squared[t] != 0;
        kept = nonzero;
        if (!(sum >= 1e-24 && sum < 1e300)) kept = rows;
        else if (share < 1) {
            least = walk_down(squared, rows, -1, share * sum, &larger, &last);
            kept = larger + last;
        }
        kept = kept < 1 ? 1 : kept;
        if (kept % step) least = 0, kept = (kept + step - 1) / step * step;
    }
    kept = kept > rows ? rows : kept;
    if (!least && kept < rows) least = walk_down(squared, rows, kept, 0, &larger, &last);
    int64_t k = 0;
    for (int64_t t = 0; t < rows; t++) {
        uint32_t bits;
        memcpy(&bits, squared + t, 4);
        bits &= 0x7fffffff; /* walk_down looks at no sign, which a NaN may have */
        const int chosen = kept == rows || bits > least || (bits == least && last-- > 0);
        position[t] = chosen ? (int32_t)k : -1;
        if (chosen) index[k++] = t;
    }
    return kept;
}

#define TYPE float
#define EACH(name) name##_f32
#include "rows.c"
#undef TYPE
#undef EACH

#define TYPE bf16
#define EACH(name) name##_bf16
#include "rows.c"
#undef TYPE
#undef EACH

#include "dot.c"
#include "attention.c"
#include "low_rank.c"
#include "kernels.h"

#else

static inline float EACH(squared_norm)(const TYPE *row, int64_t columns) {
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < columns; i++) {
        float value = EACH(from)(row[i]);
        sum += value * value;
    }
    return sum;
}

/* squared[t] = sum_i x[t, i]^2 */
static void EACH(squared_row_norms)(const TYPE *x, int64_t rows, int64_t columns, int64_t stride, float *squared,
                                    const team *team) {
    FOR_SHARE(t, rows) {
        squared[t] = EACH(squared_norm)(x + t * stride, columns);
    }
}

static inline float EACH(folded)(const TYPE *row, const float *fold, int64_t i) {
    return fold ? EACH(from)(row[i]) * fold[i] : EACH(from)(row[i]);
}

/* q[i] = offset + round(x[i] / scale) of x[i] = row[i] fold[i], or row[i] without fold; scale = max_i |x[i]| / 127. If
 * paired, max_i (|x[2i]| + |x[2i + 1]|) / 127: then two neighbours' magnitudes are at most 128 together. `paired` must be
 * a constant, and so must `fold` where it is NULL. */
static inline __attribute__((always_inline)) void EACH(quantise_row)(const TYPE *row, const float *fold, int64_t columns,
                                                                     const int paired, float offset, uint8_t *q,
                                                                     float *scale) {
    const float shift = 12582912.0f + offset; /* adding 1.5 * 2^23 rounds to even, the integer in the low bits */
    int32_t largest = 0; /* sizes compare like their bits, and a NaN is larger than all: it must come through */
    if (paired) {
        #pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < columns / 2; i++) {
            float one = EACH(folded)(row, fold, 2 * i), two = EACH(folded)(row, fold, 2 * i + 1);
            int32_t size = magnitude_f32(0.5f * fabsf(one) + 0.5f * fabsf(two)); /* their sum might overflow */
            largest = size > largest ? size : largest;
        }
    }
    #pragma omp simd reduction(max : largest)
    for (int64_t i = paired ? columns / 2 * 2 : 0; i < columns; i++) {
        int32_t size = magnitude_f32((paired ? 0.5f : 1.0f) * EACH(folded)(row, fold, i));
        largest = size > largest ? size : largest;
    }
    const float inverse = scale_of_row(largest, paired ? 63.5f : 127.0f, scale);
    #pragma omp simd
    for (int64_t i = 0; i < columns; i++) {
        float shifted = EACH(folded)(row, fold, i) * inverse + shift;
        uint32_t bits;
        memcpy(&bits, &shifted, 4);
        q[i] = (uint8_t)bits;
    }
}

/* quantise_row of row index[k] for each k; of all rows if !index */
static void EACH(quantise_rows)(const TYPE *x, const int64_t *index, int64_t rows, int64_t columns, int64_t stride,
                                float offset, uint8_t *q, float *scale, const team *team) {
    FOR_SHARE(k, rows)
        EACH(quantise_row)(x + (index ? index[k] : k) * stride, NULL, columns, 0, offset, q + k * columns, scale + k);
}

/* out[t] = scale[k] y[k] for k = position[t]; 0 where position[t] < 0, or what is there if !fill */
static void EACH(scatter_rows)(const TYPE *y, const int32_t *position, int64_t rows, int64_t columns,
                               const float *scale, TYPE *out, int fill, const team *team) {
    FOR_SHARE(t, rows) {
        int64_t k = position ? position[t] : t;
        TYPE *to = out + t * columns;
        if (k < 0) {
            if (fill) memset(to, 0, (size_t)columns * sizeof(TYPE));
            continue;
        }
        const TYPE *row = y + k * columns;
        float s = scale[k];
        #pragma omp simd
        for (int64_t i = 0; i < columns; i++) to[i] = EACH(to)(EACH(from)(row[i]) * s);
    }
}

/* the same from sums of 8-bit products: out[t, j] = scale[k] column_scale[j] y[k, j] */
static void EACH(scatter_sums)(const int32_t *y, const int32_t *position, int64_t rows, int64_t columns,
                               const float *scale, const float *column_scale, TYPE *out, int fill, const team *team) {
    FOR_SHARE(t, rows) {
        int64_t k = position ? position[t] : t;
        TYPE *to = out + t * columns;
        if (k < 0) {
            if (fill) memset(to, 0, (size_t)columns * sizeof(TYPE));
            continue;
        }
        const int32_t *row = y + k * columns;
        float s = scale[k];
        #pragma omp simd
        for (int64_t j = 0; j < columns; j++) to[j] =
            EACH(to)((float)row[j] * (s * column_scale[j]));
    }
}

/* The largest of y = scale z, and of no numbers -infinity; a NaN is not larger. In lanes: clang vectorises no maximum. */
static inline float EACH(largest)(const TYPE *z, int64_t columns, float scale) {
    enum { LANES_OF_ROW = 64 };
    float lane[LANES_OF_ROW], most = -INFINITY;
    for (int l = 0; l < LANES_OF_ROW; l++) lane[l] = -INFINITY;
    int64_t i = 0;
    for (; i + LANES_OF_ROW <= columns; i += LANES_OF_ROW)
        #pragma omp simd
        for (int l = 0; l < LANES_OF_ROW; l++) {
            const float y = EACH(from)(z[i + l]) * scale;
            lane[l] = y > lane[l] ? y : lane[l];
        }
    for (int l = 0; i < columns; i++, l++) {
        const float y = EACH(from)(z[i]) * scale;
        lane[l] = y > lane[l] ? y : lane[l];
    }
    for (int l = 0; l < LANES_OF_ROW; l++) most = lane[l] > most ? lane[l] : most;
    return most;
}

/* What the softmax of y = scale z says about the target of each row: log_probs, and entropy and top1 unless NULL. With
 * write, z becomes the gradient of log_probs with respect to it. Smoothing s: (1 - s) log p_target + s mean log p. */
static void EACH(softmax_rows)(TYPE *z, int64_t rows, int64_t columns, const int64_t *target, float scale,
                               float smoothing, float *log_probs, float *entropy, uint8_t *top1, int write,
                               const team *team) {
    FOR_SHARE(t, rows) {
        TYPE *row = z + t * columns;
        const float most = EACH(largest)(row, columns, scale);
        float sum = 0, expected = 0, mean = 0; /* of exp(y - most), of y - most under it, of y - most */
        if (entropy || smoothing > 0) {
            #pragma omp simd reduction(+ : sum, expected, mean)
            for (int64_t i = 0; i < columns; i++) {
                float y = EACH(from)(row[i]) * scale - most, e = exp_negative(y);
                sum += e;
                expected += e > 0 ? e * y : 0;
                mean += y;
            }
        } else {
            #pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < columns; i++) sum += exp_negative(EACH(from)(row[i]) * scale - most);
        }
        float log_sum = logf(sum), of_target = EACH(from)(row[target[t]]) * scale;
        log_probs[t] = (1 - smoothing) * (of_target - most - log_sum);
        if (smoothing > 0) log_probs[t] += smoothing * (mean / (float)columns - log_sum);
        if (entropy) entropy[t] = log_sum - expected / sum;
        if (top1) top1[t] = of_target >= most;
        if (!write) continue;
        float share = scale / sum, even = scale * smoothing / (float)columns;
        float at_target = (1 - smoothing) * scale + even - share * exp_negative(of_target - most);
        #pragma omp simd
        for (int64_t i = 0; i < columns; i++)
            row[i] = EACH(to)(even - share * exp_negative(EACH(from)(row[i]) * scale - most));
        row[target[t]] = EACH(to)(at_target);
    }
}

/* y = (offset + w) x r with r = 1 / sqrt(mean x^2 + eps), which is kept in `inverse`; x r is rounded first if `rounds`. */
static void EACH(rms_norm)(const TYPE *x, int64_t rows, int64_t columns, const TYPE *w, float offset, float eps,
                           int rounds, TYPE *y, float *inverse, const team *team) {
    FOR_SHARE(t, rows) {
        const TYPE *row = x + t * columns;
        TYPE *to = y + t * columns;
        const float r = inverse[t] = 1.0f / sqrtf(EACH(squared_norm)(row, columns) / (float)columns + eps);
        if (rounds) {
            #pragma omp simd
            for (int64_t i = 0; i < columns; i++)
                to[i] = EACH(to)((offset + EACH(from)(w[i])) * EACH(from)(EACH(to)(EACH(from)(row[i]) * r)));
        } else {
            #pragma omp simd
            for (int64_t i = 0; i < columns; i++)
                to[i] = EACH(to)((offset + EACH(from)(w[i])) * (EACH(from)(row[i]) * r));
        }
    }
}

/* The gradient of x, from that of y: r h - r^3 mean(h x) x with h = (offset + w) grad. */
static void EACH(rms_norm_backward)(const TYPE *grad, const TYPE *x, int64_t rows, int64_t columns, const TYPE *w,
                                    float offset, const float *inverse, TYPE *out, const team *team) {
    FOR_SHARE(t, rows) {
        const TYPE *g = grad + t * columns, *row = x + t * columns;
        TYPE *to = out + t * columns;
        const float r = inverse[t];
        float along = 0;
        #pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < columns; i++)
            along += (offset + EACH(from)(w[i])) * EACH(from)(g[i]) * (EACH(from)(row[i]) * r);
        along *= r / (float)columns;
        #pragma omp simd
        for (int64_t i = 0; i < columns; i++) {
            float h = (offset + EACH(from)(w[i])) * EACH(from)(g[i]);
            to[i] = EACH(to)(r * h - along * (EACH(from)(row[i]) * r));
        }
    }
}

/* out = silu(gate) up, silu(gate) = gate sigmoid(gate) rounded first */
static void EACH(gated)(const TYPE *gate, const TYPE *up, int64_t rows, int64_t columns, TYPE *out, const team *team) {
    FOR_SHARE(t, rows) {
        const TYPE *a = gate + t * columns, *b = up + t * columns;
        TYPE *to = out + t * columns;
        #pragma omp simd
        for (int64_t i = 0; i < columns; i++) {
            float x = EACH(from)(a[i]);
            to[i] = EACH(to)(EACH(from)(EACH(to)(x * sigmoid(x))) * EACH(from)(b[i]));
        }
    }
}

/* The gradients of gate and up from that of out. */
static void EACH(gated_backward)(const TYPE *grad, const TYPE *gate, const TYPE *up, int64_t rows, int64_t columns,
                                 TYPE *of_gate, TYPE *of_up, const team *team) {
    FOR_SHARE(t, rows) {
        const TYPE *g = grad + t * columns, *a = gate + t * columns, *b = up + t * columns;
        TYPE *to_a = of_gate + t * columns, *to_b = of_up + t * columns;
        #pragma omp simd
        for (int64_t i = 0; i < columns; i++) {
            float x = EACH(from)(a[i]), s = sigmoid(x), change = EACH(from)(g[i]);
            to_b[i] = EACH(to)(change * (x * s));
            to_a[i] = EACH(to)(change * EACH(from)(b[i]) * (s * (1.0f + x * (1.0f - s))));
        }
    }
}

/* q's halves turned by the angles of its token: (q1 c1 - q2 s1, q2 c2 + q1 s2), or the transposed turn; each product
 * is rounded first. A token is `heads` x `columns` numbers; its angles are row t of `angles`, which come again. */
static void EACH(rotate)(const TYPE *q, int64_t tokens, int64_t heads, int64_t columns, const TYPE *cosine,
                         const TYPE *sine, int64_t angles, int transposed, TYPE *out, const team *team) {
    const int64_t half = columns / 2;
    FOR_SHARE(t, tokens) {
        const TYPE *c = cosine + t % angles * columns, *s = sine + t % angles * columns;
        for (int64_t h = 0; h < heads; h++) {
            const TYPE *one = q + (t * heads + h) * columns, *two = one + half;
            TYPE *to = out + (t * heads + h) * columns;
            #pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float a = EACH(from)(one[i]), b = EACH(from)(two[i]);
                float up = EACH(from)(s[i + half]), down = -EACH(from)(s[i]), other = up;
                up = transposed ? down : up;
                down = transposed ? other : down;
                float first = EACH(from)(EACH(to)(a * EACH(from)(c[i])));
                float second = EACH(from)(EACH(to)(b * EACH(from)(c[i + half])));
                to[i] = EACH(to)(first + EACH(from)(EACH(to)(b * down)));
                to[i + half] = EACH(to)(second + EACH(from)(EACH(to)(a * up)));
            }
        }
    }
}

/* largest[j] = max_i |w[i, j]|: each thread takes a share of the columns */
static void EACH(column_maxima)(const TYPE *w, int64_t rows, int64_t columns, int64_t stride, float *largest,
                                const team *team) {
    const int64_t first = share_of(columns, team->thread, team->threads);
    const int64_t last = share_of(columns, team->thread + 1, team->threads);
    int32_t *sizes = (int32_t *)largest; /* as bits, which a NaN leads */
    for (int64_t j = first; j < last; j++) sizes[j] = 0;
    for (int64_t i = 0; i < rows; i++) {
        const TYPE *row = w + i * stride;
        #pragma omp simd
        for (int64_t j = first; j < last; j++) {
            int32_t size = EACH(magnitude)(row[j]);
            sizes[j] = size > sizes[j] ? size : sizes[j];
        }
    }
}

/* q[i, j] = round(w[i, j] * inverse[j]) */
static void EACH(quantise_columns)(const TYPE *w, int64_t rows, int64_t columns, int64_t stride, const float *inverse,
                                   int8_t *q, const team *team) {
    FOR_SHARE(i, rows) {
        const TYPE *row = w + i * stride;
        int8_t *to = q + i * columns;
        #pragma omp simd
        for (int64_t j = 0; j < columns; j++) {
            float shifted = EACH(from)(row[j]) * inverse[j] + 12582912.0f;
            uint32_t bits;
            memcpy(&bits, &shifted, 4);
            to[j] = (int8_t)(uint8_t)bits;
        }
    }
}

#endif
