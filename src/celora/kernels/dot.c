/* The product of gathered rows with a packed 8-bit weight on CPUs with 8-bit dot products of vectors (VNNI): rows are
 * quantised, multiplied, scaled and scattered without ever being written in between.
 *
 *     out[t] = row_scale[k] column_scale * (q[k] W) for t = index[k],    q[k] = round(x[t] / row_scale[k])
 *
 * The instruction multiplies unsigned with signed bytes and adds four products to each 32-bit sum. The weight is the
 * unsigned one, w + 128, so what has to be taken off, 128 sum(q[k]), is one number a row, where the sums begin. A block
 * of BLOCK rows by two vectors of columns stays in registers over the whole depth: BLOCK + 2 loads for 2 BLOCK dots.
 *
 * The file includes itself once for float32 and once for bfloat16, as rows.c does, whose names it uses.
 */

#ifndef TYPE

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#define LANES 16
#define BLOCK 12
typedef __m512i ints;
static inline ints all(int32_t x) { return _mm512_set1_epi32(x); }
static inline ints load(const void *p) { return _mm512_loadu_si512(p); }
static inline ints dot(ints sum, ints u, ints s) { return _mm512_dpbusd_epi32(sum, u, s); }
#elif defined(__AVXVNNI__)
#include <immintrin.h>
#define LANES 8
#define BLOCK 6
typedef __m256i ints;
static inline ints all(int32_t x) { return _mm256_set1_epi32(x); }
static inline ints load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline ints dot(ints sum, ints u, ints s) { return _mm256_dpbusd_avx_epi32(sum, u, s); }
#endif

#ifdef LANES

#define PANEL (2 * LANES) /* columns of the weight that lie together */

/* sums[r][h] = start[r] + sum_k q[r, k] (w[k, j] + 128) for the panel's columns j; rows: a constant */
static inline __attribute__((always_inline)) void block(const int8_t *q, int64_t depth, const uint8_t *panel,
                                                        const int32_t *start, const int rows, ints sums[BLOCK][2]) {
    ints sum[BLOCK][2]; /* of its own: in registers */
    #pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = all(start[r]);
    for (int64_t k = 0; k < depth; k += 4, panel += 4 * PANEL) {
        const ints left = load(panel), right = load(panel + 4 * LANES);
        #pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, q + r * depth + k, 4);
            const ints bytes = all(four);
            sum[r][0] = dot(sum[r][0], left, bytes);
            sum[r][1] = dot(sum[r][1], right, bytes);
        }
    }
    #pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sums[r][0] = sum[r][0], sums[r][1] = sum[r][1];
}

static void blocks(const int8_t *q, int64_t depth, const uint8_t *panel, const int32_t *start, int rows,
                   ints sums[BLOCK][2]) {
    switch (rows) {
        case BLOCK: block(q, depth, panel, start, BLOCK, sums); break;
        #if BLOCK > 6
        case 8: block(q, depth, panel, start, 8, sums); break;
        case 7: block(q, depth, panel, start, 7, sums); break;
        case 6: block(q, depth, panel, start, 6, sums); break;
        #endif
        case 5: block(q, depth, panel, start, 5, sums); break;
        case 4: block(q, depth, panel, start, 4, sums); break;
        case 3: block(q, depth, panel, start, 3, sums); break;
        case 2: block(q, depth, panel, start, 2, sums); break;
        default: block(q, depth, panel, start, 1, sums); break;
    }
}

#endif

/* Columns that lie together in a packed weight; 0 where there are no such products. */
int panel_columns(void) {
#ifdef LANES
    return PANEL;
#else
    return 0;
#endif
}

#define TYPE float
#define EACH(name) name##_f32
#include "dot.c"
#undef TYPE
#undef EACH

#define TYPE bf16
#define EACH(name) name##_bf16
#include "dot.c"
#undef TYPE
#undef EACH

#else

#ifdef LANES

/* packed[panel, k / 4, column, k % 4] = 128 + round(w[k, j] * inverse[j]); 128, which is zero, past the end of w */
void EACH(pack_columns)(const TYPE *w, int64_t rows, int64_t columns, int64_t stride, const float *inverse,
                        uint8_t *packed, int threads) {
    const int64_t depth = (rows + 3) / 4 * 4, panels = (columns + PANEL - 1) / PANEL;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        uint8_t *to = packed + p * depth * PANEL;
        memset(to, 128, (size_t)(depth * PANEL));
        for (int64_t k = 0; k < rows; k++)
            for (int64_t c = 0; c < PANEL && p * PANEL + c < columns; c++) {
                const int64_t j = p * PANEL + c;
                const float shifted = EACH(from)(w[k * stride + j]) * inverse[j] + (12582912.0f + 128.0f);
                uint32_t bits;
                memcpy(&bits, &shifted, 4);
                to[k / 4 * 4 * PANEL + c * 4 + k % 4] = (uint8_t)bits;
            }
    }
}

/* out[index[k]] = factor[k] x[index[k]] W in 8 bits, all rows without index; factor: NULL for 1. Rows with position < 0
 * become 0 if fill. scratch: (kept, rows of W rounded up to 4). scales, starts: (kept,). */
void EACH(gathered_product)(const TYPE *x, int64_t tokens, int64_t rows, int64_t stride, const int64_t *index,
                            const int32_t *position, int64_t kept, const float *factor, const uint8_t *packed,
                            const float *column_scale, int64_t columns, int8_t *scratch, float *scales,
                            int32_t *starts, TYPE *out, int fill, int threads) {
    const int64_t depth = (rows + 3) / 4 * 4, panels = (columns + PANEL - 1) / PANEL;
    /* Whole panels to each thread; some of the rows, too, where there are too few panels for that to come out even. */
    const int64_t parts = panels % threads == 0 || panels > 8 * threads ? 1 : threads;
    const int64_t blocks_of_rows = (kept + BLOCK - 1) / BLOCK;
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(static)
        for (int64_t k = 0; k < kept; k++) {
            int8_t *q = scratch + k * depth;
            EACH(quantise_row)(x + (index ? index[k] : k) * stride, rows, 0.0f, (uint8_t *)q, scales + k);
            memset(q + rows, 0, (size_t)(depth - rows));
            int32_t sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < rows; i++) sum += q[i];
            starts[k] = -128 * sum;
            if (factor) scales[k] *= factor[k];
        }
        #pragma omp for collapse(2) schedule(static) nowait
        for (int64_t p = 0; p < panels; p++)
            for (int64_t part = 0; part < parts; part++) {
                const int64_t width = columns - p * PANEL < PANEL ? columns - p * PANEL : PANEL;
                const int64_t first = blocks_of_rows * part / parts * BLOCK;
                int64_t end = blocks_of_rows * (part + 1) / parts * BLOCK;
                end = end < kept ? end : kept;
                float column[PANEL] = {0};
                memcpy(column, column_scale + p * PANEL, (size_t)width * sizeof(float));
                for (int64_t k = first; k < end;) {
                    int count = end - k < BLOCK ? (int)(end - k) : BLOCK;
                    if (BLOCK > 6 && count > 8 && count < BLOCK) count = count > 10 ? 6 : 5; /* 9, 10, 11 in two */
                    ints sums[BLOCK][2];
                    blocks(scratch + k * depth, depth, packed + p * depth * PANEL, starts + k, count, sums);
                    for (int r = 0; r < count; r++, k++) {
                        TYPE *to = out + (index ? index[k] : k) * columns + p * PANEL;
                        const float scale = scales[k];
                        const int32_t *sum = (const int32_t *)sums[r];
                        if (width == PANEL) {
                            #pragma omp simd
                            for (int c = 0; c < PANEL; c++) to[c] = EACH(to)((float)sum[c] * (scale * column[c]));
                        } else {
                            for (int c = 0; c < width; c++) to[c] = EACH(to)((float)sum[c] * (scale * column[c]));
                        }
                    }
                }
            }
        if (position && fill) {
            #pragma omp for schedule(static) nowait
            for (int64_t t = 0; t < tokens; t++)
                if (position[t] < 0) memset(out + t * columns, 0, (size_t)columns * sizeof(TYPE));
        }
    }
}

/* gathered_product of the critical rows alone, which choose_rows chooses by their norms; the others become 0. Returns
 * how many. For each token, work holds an index, four numbers of four bytes, and `depth` bytes. */
int64_t EACH(critical_product)(const TYPE *x, int64_t tokens, int64_t rows, int64_t stride, int64_t kept, double share,
                               const uint8_t *packed, const float *column_scale, int64_t columns, void *work, TYPE *out,
                               int threads) {
    int64_t *index = work;
    float *squared = (float *)(index + tokens), *scales = squared + tokens;
    int32_t *starts = (int32_t *)(scales + tokens), *position = starts + tokens;
    EACH(squared_row_norms)(x, tokens, rows, stride, squared, threads);
    kept = choose_rows(squared, tokens, kept, share, 1, index, position);
    EACH(gathered_product)(x, tokens, rows, stride, index, position, kept, NULL, packed, column_scale, columns,
                           (int8_t *)(position + tokens), scales, starts, out, 1, threads);
    return kept;
}

#endif

#endif
