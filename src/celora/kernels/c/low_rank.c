/* The tall and skinny products of a LoRA adapter in bfloat16, for AVX-512 with BF16. One side is as narrow as the rank.
 *
 *     out = alpha x M [+ out],  M: (depth, columns), depth or columns small;     out = p^T x,  p: (tokens, rank).
 *
 * Libraries first arrange both sides for a large product. A skinny one multiplies each number only a few times, so that
 * takes as long as the product. Here only the narrow side is arranged beforehand, in pairs. Sums are in float32. With
 * matrix instructions (AMX) libraries are faster than this, so that tier has none of it.
 */

#if defined(IN_PAIRS) && !defined(TILE)
#define LOW_RANK_PRODUCTS

#define TALL 8   /* rows of sums in registers, with up to two vectors of columns */
#define DEPTH 32 /* pairs of tokens that are interleaved at a time, for the second cache */

/* sum + pair x columns, in one instruction. Clang would load the pair into a vector first, which takes a cycle more. */
typedef int32_t __attribute__((may_alias, aligned(2))) pair_of_numbers;
static inline __m512 add_pair(__m512 sum, const char *pair, __m512bh columns) {
    __asm__("vdpbf16ps %1%{1to16%}, %2, %0" : "+v"(sum) : "m"(*(const pair_of_numbers *)pair), "v"(columns));
    return sum;
}

/* sum[r, v] = sum_k of pair k in row r (rows `row` bytes apart, pairs `step`) times that in vector v (`between` numbers
 * apart). `rows` and `vectors` must be constants. What is read soon is at `next`, unless NULL, every `apart` bytes. */
static inline __attribute__((always_inline)) void sum_pairs(const char *a, int64_t row, int64_t step, int64_t pairs,
                                                            const uint32_t *b, int64_t between, const int rows,
                                                            const int vectors, const char *next, int64_t apart,
                                                            __m512 sum[TALL][2]) {
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh columns[2];
        if (next) _mm_prefetch(next + k * apart, _MM_HINT_T0);
        for (int v = 0; v < vectors; v++) columns[v] = (__m512bh)load(b + v * between + k * LANES);
        for (int r = 0; r < rows; r++) {
            const char *pair = a + r * row + k * step;
            if (vectors == 1) sum[r][0] = add_pair(sum[r][0], pair, columns[0]);
            else
                for (int v = 0; v < vectors; v++)
                    sum[r][v] = _mm512_dpbf16_ps(sum[r][v], two_everywhere(pair), columns[v]);
        }
    }
}

/* So many of the lowest bits. */
static inline __mmask16 first_of(int64_t columns) {
    return (__mmask16)(columns >= LANES ? 0xffff : columns < 1 ? 0 : (1 << columns) - 1);
}

/* 16 pairs of numbers from two rows, of which the second may be missing, for zeros. Bytes are exact in bfloat16, the
 * upper half of float32. */
static inline __m512i of_pair(const void *row, int64_t i, int bytes, __mmask16 there) {
    if (!bytes)
        return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, (const bf16 *)row + i)), 16);
    const __m512i numbers = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, (const int8_t *)row + i));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(numbers));
}
static inline __m512i pair_up(const void *one, const void *two, int64_t i, int bytes, int64_t columns) {
    const __mmask16 there = first_of(columns - i);
    const __m512i low = _mm512_srli_epi32(of_pair(one, i, bytes, there), 16);
    return two ? _mm512_or_si512(low, of_pair(two, i, bytes, there)) : low;
}

/* alpha sum [+ out] */
static inline __m512 skinny_sum(__m512 sum, __m512 alpha, int add, const bf16 *out) {
    const __m512i before = add ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)out)) : all(0);
    return _mm512_fmadd_ps(sum, alpha, _mm512_castsi512_ps(_mm512_slli_epi32(before, 16)));
}

/* A tile of alpha x M [+ out] with `vectors` of M's pairs, whose columns are fewer where they do not fill these. */
static inline __attribute__((always_inline)) void skinny_tile(const bf16 *x, int64_t depth, int64_t stride,
                                                            const uint32_t *m, int64_t columns, const bf16 *next,
                                                            int64_t apart, float alpha, int add, bf16 *out,
                                                            int64_t out_stride, const int rows, const int vectors) {
    const int64_t pairs = depth / 2, between = (depth + 1) / 2 * LANES;
    __m512 sum[TALL][2];
    sum_pairs((const char *)x, 2 * stride, 4, pairs, m, between, rows, vectors, (const char *)next, apart, sum);
    if (depth % 2) /* the last number has no pair */
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)all(x[r * stride + depth - 1]),
                                             (__m512bh)load(m + v * between + pairs * LANES));
    const __m512 factor = _mm512_set1_ps(alpha);
    if (columns < vectors * LANES) {
        float sums[TALL][2 * LANES];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) _mm512_storeu_ps(sums[r] + v * LANES, sum[r][v]);
        for (int r = 0; r < rows; r++, out += out_stride)
            for (int c = 0; c < columns; c++)
                out[c] = to_bf16(fmaf(sums[r][c], alpha, add ? from_bf16(out[c]) : 0.0f));
    } else if (vectors == 2) {
        for (int r = 0; r < rows; r++, out += out_stride)
            two_bf16(out, skinny_sum(sum[r][0], factor, add, out), skinny_sum(sum[r][1], factor, add, out + LANES));
    } else {
        for (int r = 0; r < rows; r++, out += out_stride)
            _mm256_storeu_si256((__m256i *)out, (__m256i)_mm512_cvtneps_pbh(skinny_sum(sum[r][0], factor, add, out)));
    }
}

static inline __attribute__((always_inline)) void skinny_rows(const bf16 *x, int64_t depth, int64_t stride,
                                                            const uint32_t *m, int64_t columns, float alpha, int add,
                                                            bf16 *out, int64_t out_stride, const int rows) {
    const int reads = depth > 4 * LANES; /* the long side is fetched ahead: rows of x, or the tile below in out */
    for (int64_t c = 0; c < columns; c += 2 * LANES, out += 2 * LANES, m += (depth + 1) / 2 * 2 * LANES) {
        const bf16 *next = reads ? c ? NULL : x + rows * stride : out + rows * out_stride;
        const int64_t apart = reads ? 4 * TALL : 2 * out_stride;
        if (columns - c > LANES)
            skinny_tile(x, depth, stride, m, columns - c, next, apart, alpha, add, out, out_stride, rows, 2);
        else skinny_tile(x, depth, stride, m, columns - c, next, apart, alpha, add, out, out_stride, rows, 1);
    }
}

/* out = alpha x M [+ out]. M's numbers are `down` apart in its columns and `right` in its rows, one of which is 1.
 * panels: room for M in vectors of 16 columns, which hold the pairs of its depth. */
static void skinny_product_bf16(const bf16 *x, int64_t rows, int64_t depth, int64_t stride, const bf16 *m, int64_t down,
                              int64_t right, int64_t columns, float alpha, int add, bf16 *out, int64_t out_stride,
                              uint32_t *panels, const team *team) {
    const int64_t pairs = (depth + 1) / 2;
    FOR_SHARE(i, up_to(columns, LANES) / LANES * pairs) {
        const int64_t first = i / pairs * LANES, k = 2 * (i % pairs);
        const bf16 *at = m + k * down + first * right, *under = k + 1 < depth ? at + down : NULL;
        uint32_t *to = panels + i * LANES;
        if (right == 1) _mm512_storeu_si512(to, pair_up(at, under, 0, 0, columns - first));
        else
            for (int c = 0; c < LANES; c++, at += right)
                to[c] = first + c >= columns ? 0 : under ? at[0] | (uint32_t)at[1] << 16 : at[0];
    }
    celora_meet(team);
    FOR_SHARE(block, up_to(rows, TALL) / TALL) {
        int64_t t = block * TALL;
        bf16 *to = out + t * out_stride;
        if (t + TALL <= rows)
            skinny_rows(x + t * stride, depth, stride, panels, columns, alpha, add, to, out_stride, TALL);
        else
            for (; t < rows; t++, to += out_stride)
                skinny_rows(x + t * stride, depth, stride, panels, columns, alpha, add, to, out_stride, 1);
    }
}

/* out += p^T x: (rank, columns), of x in bfloat16 or, with `bytes`, in 8 bits. scratch: room for 2 DEPTH rows of x, and
 * of p for each thread, in pairs. Threads share the columns. */
static void transposed_product_bf16(const bf16 *p, int64_t tokens, int64_t rank, int64_t p_stride, const void *x,
                                    int bytes, int64_t columns, int64_t stride, float *out, uint32_t *scratch,
                                    const team *team) {
    enum { WIDTH = 2 * LANES, ROOM = WIDTH * DEPTH };
    const int64_t blocks = up_to(columns, WIDTH) / WIDTH, ranks = up_to(rank, LANES);
    const int64_t size = bytes ? 1 : 2, row = stride * size;
    const int64_t first = share_of(blocks, team->thread, team->threads);
    const int64_t last = share_of(blocks, team->thread + 1, team->threads);
    uint32_t *of_x = scratch + first * ROOM + team->thread * DEPTH * ranks, *of_p = of_x + (last - first) * ROOM;
    if (first == last) return; /* nothing would read its pairs of p */
    for (int64_t t = 0; t < tokens; t += 2 * DEPTH) {
        const int64_t pairs = tokens - t < 2 * DEPTH ? (tokens - t + 1) / 2 : DEPTH;
        for (int64_t k = 0; k < pairs; k++) {
            const int alone = t + 2 * k + 1 == tokens;
            const bf16 *low = p + (t + 2 * k) * p_stride;
            const char *at = (const char *)x + (t + 2 * k) * row;
            for (int64_t r = 0; r < ranks; r += LANES)
                _mm512_storeu_si512(of_p + k * ranks + r, pair_up(low, alone ? NULL : low + p_stride, r, 0, rank));
            for (int64_t v = 2 * first; v < 2 * last; v++)
                _mm512_storeu_si512(of_x + ((v - 2 * first) * DEPTH + k) * LANES,
                                    pair_up(at, alone ? NULL : at + row, v * LANES, bytes, columns));
        }
        for (int64_t block = first; block < last; block++)
            for (int64_t r = 0; r < rank; r += TALL) {
                __m512 sum[TALL][2];
                const int64_t later = (t + 2 * DEPTH + r / TALL * DEPTH) * row + block * WIDTH * size;
                sum_pairs((const char *)(of_p + r), 4, 4 * ranks, pairs, of_x + (block - first) * ROOM, DEPTH * LANES,
                          TALL, 2, r < 2 * TALL ? (const char *)x + later : NULL, row, sum);
                for (int i = 0; i < TALL && r + i < rank; i++)
                    for (int v = 0; v < 2; v++) {
                        const int64_t c = block * WIDTH + v * LANES;
                        const __mmask16 there = first_of(columns - c);
                        float *to = out + (r + i) * columns + c;
                        _mm512_mask_storeu_ps(to, there, _mm512_add_ps(_mm512_maskz_loadu_ps(there, to), sum[i][v]));
                    }
            }
    }
}

#undef TALL
#undef DEPTH
#endif
