/* The product of gathered rows with a packed 8-bit weight on CPUs with dot products of vectors (AVX2, VNNI, ARM's dot
 * products) or of matrices (AMX, ARM's I8MM): rows are quantised, multiplied, scaled and scattered without a pass of
 * their own for any of it.
 *
 *     out[t] = row_scale[k] column_scale * (q[k] W) for t = index[k],
 *     q[k] = round(x[t] / row_scale[k]),    row_scale[k] = max_i |x[t, i]| / 127
 *
 * In: x (tokens, rows), index (kept), the packed weight (rows, columns). Out: out (tokens, columns).
 *
 * A weight that is packed for `x W^T` also serves `g W`: its panels of square blocks are turned, one at a time, into a
 * thread's own scratch. Its scales, one for each of its rows, are then folded into g before g is quantised.
 *
 * x86's instructions multiply unsigned with signed bytes and add four products to each 32-bit sum. The weight is the
 * unsigned one, w + OFFSET, so what has to be taken off, OFFSET sum(q[k]), is one number a row. Vectors: a block of BLOCK
 * rows by two vectors of columns stays in registers over the whole depth, BLOCK + 2 loads for 2 BLOCK dots. Matrices:
 * 2 x 2 tiles of sums do, over a stretch of the depth whose part of the weight stays in the first cache, as the sums of
 * a group of rows do between stretches. ARM's have both signed: dot_arm.h.
 *
 * AVX2's VPMADDUBSW adds two products in 16 bits and saturates at 32767. So there a row's scale is the largest sum of two
 * neighbours' magnitudes / 127: such a sum is at most 128 then, and two products at most 128 * 255. This costs little:
 * large numbers seldom stand side by side.
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
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#define BLOCK 6
#define PAIRED 1
typedef __m256i ints;
static inline ints all(int32_t x) { return _mm256_set1_epi32(x); }
static inline ints load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline ints dot(ints sum, ints u, ints s) {
    const ints four = _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1));
    __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(four)); /* or gcc mixes rows and spills more than one sum */
    return sum;
}
#elif defined(__ARM_FEATURE_DOTPROD)
#include "dot_arm.h"
#endif

#ifdef LANES

#ifndef OFFSET
#define OFFSET 128 /* added to the weight's bytes */
#endif
#ifndef TOGETHER
#define TOGETHER 4 /* bytes of a column of the weight that lie together, and of a row that one number of a sum takes */
#endif
#ifndef PAIRED
#define PAIRED 0 /* how rows are quantised: see quantise_row */
#endif

static inline int64_t up_to(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

/* sum + start, which wrap where the one and the other are too large for 32 bits and together are not */
static inline float whole(int32_t sum, int32_t start) { return (float)(int32_t)((uint32_t)sum + (uint32_t)start); }

#define PANEL (2 * LANES) /* columns of the weight that lie together */

#if LANES == 16 && defined(__AVX512BF16__)
#define WIDE /* the sums of a panel's row are written by two vectors */
static inline void two_f32(float *to, __m512 left, __m512 right) {
    _mm512_storeu_ps(to, left);
    _mm512_storeu_ps(to + LANES, right);
}
static inline void two_bf16(bf16 *to, __m512 left, __m512 right) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(right, left)); /* one instruction for ten */
}
static inline __m512 scaled(const int32_t *sums, ints start, __m512 scale, const float *column) {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(load(sums), start));
    return _mm512_mul_ps(sum, _mm512_mul_ps(scale, _mm512_loadu_ps(column)));
}
#endif

#if defined(__AMX_INT8__) && defined(__linux__) && LANES == 16
#define TILE 16                 /* rows of a tile, of 64 bytes each */
#define DEEP 64                 /* what the depth is rounded up to */
#define SQUARE (2 * TILE)       /* rows, and columns, of a block of sums */
#define STRETCH (8 * DEEP)      /* of the depth at a time, about: 16 KiB of a panel */
#define GROUP (8 * SQUARE)      /* rows with their sums in the first cache: 32 KiB */
#define CHUNK (1 << 20)         /* bytes of quantised rows at a time, for the second cache */

/* Eight tiles of 16 rows of 64 bytes. Constant, as older compilers think that only its first bytes are read. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} all_tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
static void configure_tiles(void) { _tile_loadconfig(&all_tiles); }

/* Compilers are not told that loading a tile reads memory: what was written before must be there. */
#define BEFORE_TILES __asm__ volatile("" ::: "memory")

/* The first four tiles, two by two, begin at the sums that are there, or at zero; rows `stride` bytes apart. */
static inline void begin_sums(const void *sums, int64_t stride, int first) {
    const char *at = sums, *below = at + TILE * stride; /* older compilers' macros add what is added in them in bytes */
    BEFORE_TILES;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, at, stride);
        _tile_loadd(1, at + 64, stride);
        _tile_loadd(2, below, stride);
        _tile_loadd(3, below + 64, stride);
    }
}

static inline void end_sums(void *sums, int64_t stride) {
    char *at = sums, *below = at + TILE * stride;
    _tile_stored(0, at, stride);
    _tile_stored(1, at + 64, stride);
    _tile_stored(2, below, stride);
    _tile_stored(3, below + 64, stride);
}

/* sums[r, c] = (first ? 0 : sums[r, c]) + sum_k q[r, k] (w[k, c] + 128) for SQUARE rows and k < deep */
static void square(const int8_t *q, int64_t stride, int64_t deep, const uint8_t *panel, int first, int32_t *sums) {
    const int64_t bytes = PANEL * sizeof(int32_t);
    begin_sums(sums, bytes, first);
    for (int64_t k = 0; k < deep; k += DEEP, q += DEEP, panel += DEEP * PANEL) {
        _tile_loadd(4, panel, 4 * PANEL);
        _tile_loadd(6, q, stride);
        _tile_dpbsud(0, 6, 4);
        _tile_loadd(5, panel + 64, 4 * PANEL);
        _tile_dpbsud(1, 6, 5);
        _tile_loadd(7, q + TILE * stride, stride);
        _tile_dpbsud(2, 7, 4);
        _tile_dpbsud(3, 7, 5);
    }
    end_sums(sums, bytes);
}

#else
#ifndef DEEP
#define DEEP 4
#endif
#define SQUARE 1
#endif

#ifndef OWN_BLOCK
/* sums[r][h] = start[r] + sum_k q[r, k] (w[k, j] + 128) for the panel's columns j; rows: a constant */
static inline __attribute__((always_inline)) void block(const int8_t *q, int64_t stride, int64_t depth,
                                                        const uint8_t *panel, const int32_t *start, const int rows,
                                                        ints sums[BLOCK][2]) {
    ints sum[BLOCK][2]; /* of its own: in registers */
    #pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = all(start[r]);
    for (int64_t k = 0; k < depth; k += 4, panel += 4 * PANEL) {
        const ints left = load(panel), right = load(panel + 4 * LANES);
        #pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, q + r * stride + k, 4);
            const ints bytes = all(four);
            sum[r][0] = dot(sum[r][0], left, bytes);
            sum[r][1] = dot(sum[r][1], right, bytes);
        }
    }
    #pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sums[r][0] = sum[r][0], sums[r][1] = sum[r][1];
}
#endif

static void blocks(const int8_t *q, int64_t stride, int64_t depth, const uint8_t *panel, const int32_t *start, int rows,
                   ints sums[BLOCK][2]) {
    switch (rows) {
        case BLOCK: block(q, stride, depth, panel, start, BLOCK, sums); break;
        #if BLOCK > 8
        case 8: block(q, stride, depth, panel, start, 8, sums); break;
        #endif
        #if BLOCK > 6
        case 7: block(q, stride, depth, panel, start, 7, sums); break;
        case 6: block(q, stride, depth, panel, start, 6, sums); break;
        #endif
        case 5: block(q, stride, depth, panel, start, 5, sums); break;
        case 4: block(q, stride, depth, panel, start, 4, sums); break;
        case 3: block(q, stride, depth, panel, start, 3, sums); break;
        case 2: block(q, stride, depth, panel, start, 2, sums); break;
        default: block(q, stride, depth, panel, start, 1, sums); break;
    }
}

/* What the depth of a turned panel is rounded up to: whole panels of the weight as it is packed. */
#define TURNED (DEEP < PANEL ? PANEL : DEEP)

/* A packed weight as one product reads it. turned: the depth of its panels as they are packed, or 0 where the product
 * reads them so; space: for one turned panel of this thread. */
typedef struct {
    const uint8_t *packed;
    int64_t depth, turned;
    uint8_t *space;
} weight;

#ifndef __ARM_FEATURE_DOTPROD
/* 4 x 4 bytes */
static inline void transpose_bytes(const uint8_t *from, uint8_t *to) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm_storeu_si128((__m128i *)to, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)from), order));
}
#endif

/* Panel p of `g W` from a weight packed for `x W^T`: square blocks change places, and each is transposed. */
static void turn_panel(const weight *w, int64_t p, uint8_t *to) {
    const int64_t blocks = w->depth / PANEL, in_panel = PANEL / TOGETHER, bytes = TOGETHER * TOGETHER;
    for (int64_t o = 0; o < blocks; o++)
        for (int64_t b = 0; b < in_panel; b++) {
            const int64_t i = (p * in_panel + b) * TOGETHER;
            uint8_t *block = to + o * PANEL * PANEL + b * bytes;
            if (i >= w->turned) { /* past the end: zeros */
                for (int64_t c = 0; c < in_panel; c++) memset(block + c * TOGETHER * PANEL, OFFSET, bytes);
                continue;
            }
            const uint8_t *from = w->packed + (o * w->turned + i) * PANEL;
            for (int64_t c = 0; c < in_panel; c++) transpose_bytes(from + bytes * c, block + c * TOGETHER * PANEL);
        }
}

/* Bytes of a turned panel; 0 where the product reads panels as they are. */
static inline int64_t panel_bytes(int64_t depth, int turned) { return turned ? depth * PANEL : 0; }

/* The weight of a product, with the scratch that it needs. */
static inline weight weight_of(const uint8_t *packed, int64_t depth, int64_t turned, uint8_t *scratch, int64_t thread) {
    return (weight){packed, depth, turned ? up_to(turned, DEEP) : 0, scratch + thread * panel_bytes(depth, turned != 0)};
}

/* Panel p of the weight; `last` is the panel that this thread has turned, or -1. */
static inline const uint8_t *panel_of(const weight *w, int64_t p, int64_t *last) {
    if (!w->turned) return w->packed + p * w->depth * PANEL;
    if (p != *last) turn_panel(w, p, w->space);
    *last = p;
    return w->space;
}

#ifdef TILE
/* Fetches some of the PANEL x PANEL bytes that panel p consists of, or is turned from: they are new to this core. */
static inline void fetch_parts(const weight *w, int64_t p, int64_t from, int64_t to) {
    for (int64_t part = from; part < to; part++) {
        const int64_t row = w->turned ? part * w->turned + p * PANEL : p * w->depth + part * PANEL;
        for (int line = 0; line < PANEL * PANEL / 64; line++)
            _mm_prefetch((const char *)w->packed + row * PANEL + line * 64, _MM_HINT_T1);
    }
}
#endif

/* Bytes from one quantised row to the next. An odd number of cache lines: rows a power of two apart would share the
 * same few places of the caches, 16 of which a tile needs at once. */
static inline int64_t row_stride(int64_t depth) {
#ifdef TILE
    return up_to(depth, DEEP) | 64;
#else
    return up_to(depth, DEEP);
#endif
}

/* Bytes of scratch for so many quantised rows, and for these with turned panels of each thread behind them where the
 * weight is turned. The scratch may begin anywhere. */
static int64_t quantised_bytes(int64_t rows, int64_t depth) { return up_to(rows, SQUARE) * row_stride(depth) + 64; }
static int64_t scratch_bytes(int64_t rows, int64_t depth, int64_t threads, int turned) {
    if (!turned) return quantised_bytes(rows, depth);
    depth = up_to(depth, TURNED);
    return quantised_bytes(rows, depth) + threads * panel_bytes(depth, turned) + 64;
}
static inline int8_t *aligned(void *scratch) { return (int8_t *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63); }

#endif

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

/* packed[panel, k / TOGETHER, column, k % TOGETHER] = OFFSET + round(w[k, j] * inverse[j]); OFFSET, which is zero, past
 * the end of w */
static void EACH(pack_columns)(const TYPE *w, int64_t rows, int64_t columns, int64_t stride, const float *inverse,
                               uint8_t *packed, const team *team) {
    const int64_t depth = up_to(rows, DEEP), panels = up_to(columns, PANEL) / PANEL;
    FOR_SHARE(p, panels) {
        uint8_t *to = packed + p * depth * PANEL;
        memset(to, OFFSET, (size_t)(depth * PANEL));
        for (int64_t k = 0; k < rows; k++)
            for (int64_t c = 0; c < PANEL && p * PANEL + c < columns; c++) {
                const int64_t j = p * PANEL + c;
                const float shifted = EACH(from)(w[k * stride + j]) * inverse[j] + (12582912.0f + OFFSET);
                uint32_t bits;
                memcpy(&bits, &shifted, 4);
                to[k / TOGETHER * TOGETHER * PANEL + c * TOGETHER + k % TOGETHER] = (uint8_t)bits;
            }
    }
}

/* The transpose, with one scale for each row of w: packed[panel, k / TOGETHER, column, k % TOGETHER] =
 * OFFSET + round(w[j, k] inverse[j]). Panels are whole, and their number such that their columns are a whole number of TURNED. */
static void EACH(pack_rows)(const TYPE *w, int64_t rows, int64_t columns, int64_t stride, const float *inverse,
                            uint8_t *packed, const team *team) {
    const int64_t depth = up_to(columns, DEEP), panels = up_to(rows, TURNED) / PANEL;
    FOR_SHARE(p, panels) {
        uint8_t *to = packed + p * depth * PANEL;
        memset(to, OFFSET, (size_t)(depth * PANEL));
        for (int64_t c = 0; c < PANEL && p * PANEL + c < rows; c++) {
            const TYPE *row = w + (p * PANEL + c) * stride;
            for (int64_t k = 0; k < columns; k++) {
                const float shifted = EACH(from)(row[k]) * inverse[p * PANEL + c] + (12582912.0f + OFFSET);
                uint32_t bits;
                memcpy(&bits, &shifted, 4);
                to[k / TOGETHER * TOGETHER * PANEL + c * TOGETHER + k % TOGETHER] = (uint8_t)bits;
            }
        }
    }
}

/* A block's rows k, ..., k + count - 1 of the panel that begins at column j, from their sums: out[t, j + c] =
 * scales[k] column_scale[j + c] (sums[., c] + starts[k]) + bias[j + c]; starts: NULL where the sums have them already;
 * bias: NULL for 0 */
static inline void EACH(write_block)(const int32_t *sums, int64_t k, int64_t count, int64_t j, const int64_t *index,
                                     const int32_t *starts, const float *scales, const float *column_scale,
                                     const float *bias, int64_t columns, TYPE *out) {
    const int64_t width = columns - j < PANEL ? columns - j : PANEL;
    const float *column = column_scale + j;
    for (const int64_t end = k + count; k < end; k++, sums += PANEL) {
        TYPE *to = out + (index ? index[k] : k) * columns + j;
        const float scale = scales[k];
        const int32_t start = starts ? starts[k] : 0;
        if (bias) {
            #pragma omp simd
            for (int c = 0; c < width; c++)
                to[c] = EACH(to)(whole(sums[c], start) * (scale * column[c]) + bias[j + c]);
        } else if (width == PANEL) {
            #ifdef WIDE
            const ints starts_all = all(start);
            const __m512 scale_all = _mm512_set1_ps(scale), left = scaled(sums, starts_all, scale_all, column);
            EACH(two)(to, left, scaled(sums + LANES, starts_all, scale_all, column + LANES));
            #else
            #pragma omp simd
            for (int c = 0; c < PANEL; c++) to[c] = EACH(to)(whole(sums[c], start) * (scale * column[c]));
            #endif
        } else {
            for (int c = 0; c < width; c++) to[c] = EACH(to)(whole(sums[c], start) * (scale * column[c]));
        }
    }
}

/* The products of `kept` quantised rows. */
static void EACH(vector_products)(const int8_t *q, int64_t stride, const int64_t *index, int64_t kept, const weight *w,
                                  const int32_t *starts, const float *scales, const float *column_scale,
                                  const float *bias, int64_t columns, TYPE *out, const team *team) {
    const int64_t panels = up_to(columns, PANEL) / PANEL, blocks_of_rows = up_to(kept, BLOCK) / BLOCK;
    const int64_t threads = team->threads;
    int64_t last = -1;
    /* Whole panels to each thread; some of the rows, too, where there are too few panels for that to come out even. */
    const int64_t parts = panels % threads == 0 || panels > 8 * threads ? 1 : threads;
    FOR_SHARE(at, panels * parts) {
        const int64_t p = at / parts, part = at % parts;
        int64_t k = blocks_of_rows * part / parts * BLOCK, end = blocks_of_rows * (part + 1) / parts * BLOCK;
        end = end < kept ? end : kept;
        const uint8_t *panel = k < end ? panel_of(w, p, &last) : NULL;
        while (k < end) {
            int count = end - k < BLOCK ? (int)(end - k) : BLOCK;
            if (BLOCK > 6 && count > 8 && count < BLOCK) count = count > 10 ? 6 : 5; /* 9, 10, 11 in two */
            ints sums[BLOCK][2];
            blocks(q + k * stride, stride, w->depth, panel, starts + k, count, sums);
            EACH(write_block)((const int32_t *)sums, k, count, p * PANEL, index, NULL, scales, column_scale, bias,
                              columns, out);
            k += count;
        }
    }
}

#ifdef TILE

/* The same with tiles. A thread goes through all panels with a chunk of the rows that stays in its second cache. */
static void EACH(matrix_products)(const int8_t *q, int64_t stride, const int64_t *index, int64_t kept, const weight *w,
                                  const int32_t *starts, const float *scales, const float *column_scale,
                                  const float *bias, int64_t columns, TYPE *out, const team *team) {
    const int64_t depth = w->depth, threads = team->threads;
    int64_t last = -1;
    const int64_t panels = up_to(columns, PANEL) / PANEL, most = CHUNK / depth < SQUARE ? SQUARE : CHUNK / depth;
    int64_t chunks = (kept + most - 1) / most;
    if (kept >= 2 * SQUARE * threads) chunks = up_to(chunks, threads); /* about the rows it has quantised */
    const int64_t chunk = kept ? up_to((kept + chunks - 1) / chunks, SQUARE) : SQUARE;
    chunks = (kept + chunk - 1) / chunk;
    const int64_t stretches = depth < STRETCH ? 1 : (depth + STRETCH / 2) / STRETCH;
    const int64_t stretch = up_to((depth + stretches - 1) / stretches, DEEP);
    configure_tiles();
    FOR_SHARE(at, chunks * panels) {
        const int64_t part = at / panels, p = at % panels;
        int32_t sums[GROUP * PANEL] __attribute__((aligned(64)));
        const int64_t end = (part + 1) * chunk < kept ? (part + 1) * chunk : kept;
        const int64_t squares = (end - part * chunk + SQUARE - 1) / SQUARE;
        const int64_t parts = depth / PANEL, steps = squares * ((depth + stretch - 1) / stretch);
        int64_t step = 0;
        const uint8_t *panel = panel_of(w, p, &last);
        for (int64_t group = part * chunk; group < end; group += GROUP)
            for (int64_t from = 0; from < depth; from += stretch) {
                const int64_t deep = depth - from < stretch ? depth - from : stretch;
                for (int64_t k = group; k < end && k < group + GROUP; k += SQUARE) {
                    int32_t *to = sums + (k - group) * PANEL;
                    if (p + 1 < panels) fetch_parts(w, p + 1, parts * step / steps, parts * (step + 1) / steps);
                    step++;
                    square(q + k * stride + from, stride, deep, panel + from * PANEL, from == 0, to);
                    if (from + deep == depth)
                        EACH(write_block)(to, k, end - k < SQUARE ? end - k : SQUARE, p * PANEL, index, starts,
                                          scales, column_scale, bias, columns, out);
                }
            }
    }
    _tile_release();
}

#endif

/* Rows of x in 8 bits, as the products read them: all of them without index. fold: what each number is multiplied with
 * first, or NULL. */
static void EACH(quantise_gathered)(const TYPE *x, int64_t rows, int64_t stride, const int64_t *index, int64_t kept,
                                    const float *fold, int8_t *quantised, int64_t stride_of_q, int64_t depth,
                                    float *scales, int32_t *starts, const team *team) {
    FOR_SHARE(k, kept) {
        int8_t *q = quantised + k * stride_of_q;
        const TYPE *row = x + (index ? index[k] : k) * stride;
        if (fold) EACH(quantise_row)(row, fold, rows, PAIRED, 0.0f, (uint8_t *)q, scales + k);
        else EACH(quantise_row)(row, NULL, rows, PAIRED, 0.0f, (uint8_t *)q, scales + k);
        memset(q + rows, 0, (size_t)(depth - rows));
        int32_t sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < rows; i++) sum += q[i];
        starts[k] = (int32_t)(-OFFSET * (uint32_t)sum);
    }
}

/* The products of quantised rows by whatever instructions there are. */
static void EACH(products)(const int8_t *q, int64_t stride, int64_t rows, const int64_t *index, int64_t kept,
                           const weight *w, const int32_t *starts, const float *scales, const float *column_scale,
                           const float *bias, int64_t columns, TYPE *out, const team *team) {
    #ifdef TILE
    if (rows) {
        EACH(matrix_products)(q, stride, index, kept, w, starts, scales, column_scale, bias, columns, out, team);
        return;
    }
    #endif
    (void)rows;
    EACH(vector_products)(q, stride, index, kept, w, starts, scales, column_scale, bias, columns, out, team);
}

/* out[t] = x[t] W in 8 bits for each row t of index, all rows without. Rows with position < 0 become 0 if fill.
 * turned: 0, or the number of columns of a weight that pack_rows has packed, for x W with that weight and x multiplied
 * with fold. scratch: of scratch_bytes. scales, starts: (kept,). */
static void EACH(gathered_product)(const TYPE *x, int64_t tokens, int64_t rows, int64_t stride, const int64_t *index,
                                   const int32_t *position, int64_t kept, const float *fold,
                                   const uint8_t *packed, int64_t turned, const float *column_scale, int64_t columns,
                                   void *scratch, float *scales, int32_t *starts, TYPE *out, int fill,
                                   const team *team) {
    const int64_t depth = up_to(rows, turned ? TURNED : DEEP), stride_of_q = row_stride(depth);
    int8_t *quantised = aligned(scratch);
    uint8_t *space = (uint8_t *)aligned(quantised + up_to(kept, SQUARE) * stride_of_q);
    const weight w = weight_of(packed, depth, turned, space, team->thread);
    EACH(quantise_gathered)(x, rows, stride, index, kept, fold, quantised, stride_of_q, depth, scales, starts, team);
    celora_meet(team);
    EACH(products)(quantised, stride_of_q, rows, index, kept, &w, starts, scales, column_scale, NULL, columns, out, team);
    if (position && fill)
        FOR_SHARE(t, tokens)
            if (position[t] < 0) memset(out + t * columns, 0, (size_t)columns * sizeof(TYPE));
}

/* gathered_product of the critical rows alone, which choose_rows chooses by their norms; the others become 0. Returns
 * how many. work holds that number; for each token, an index and four numbers of four bytes; and then the scratch. */
static int64_t EACH(critical_product)(const TYPE *x, int64_t tokens, int64_t rows, int64_t stride, int64_t kept,
                                      double share, const float *fold, const uint8_t *packed, int64_t turned,
                                      const float *column_scale, int64_t columns, void *work, TYPE *out,
                                      const team *team) {
    int64_t *chosen = work, *index = chosen + 1;
    float *squared = (float *)(index + tokens), *scales = squared + tokens;
    int32_t *starts = (int32_t *)(scales + tokens), *position = starts + tokens;
    EACH(squared_row_norms)(x, tokens, rows, stride, squared, team);
    celora_meet(team);
    if (!team->thread) *chosen = choose_rows(squared, tokens, kept, share, 1, index, position);
    celora_meet(team);
    EACH(gathered_product)(x, tokens, rows, stride, index, position, *chosen, fold, packed, turned, column_scale,
                           columns, position + tokens, scales, starts, out, 1, team);
    return *chosen;
}

/* All rows of x in 8 bits, to be multiplied with several weights. fold: what each feature is multiplied with first, or
 * NULL. q: of quantised_bytes; scales, starts: (tokens,). */
static void EACH(quantise_input)(const TYPE *x, int64_t tokens, int64_t rows, int64_t stride, const float *fold,
                                 void *q, float *scales, int32_t *starts, const team *team) {
    const int64_t depth = up_to(rows, DEEP);
    EACH(quantise_gathered)(x, rows, stride, NULL, tokens, fold, aligned(q), row_stride(depth), depth, scales,
                            starts, team);
}

/* out = x W^T + bias from quantise_input's x and a weight of pack_rows with its scales; bias: NULL for 0 */
static void EACH(quantised_product)(const void *q, const float *scales, const int32_t *starts, int64_t tokens,
                                    int64_t rows, const uint8_t *packed, const float *column_scale, const float *bias,
                                    int64_t columns, TYPE *out, const team *team) {
    const int64_t depth = up_to(rows, DEEP);
    const weight w = weight_of(packed, depth, 0, NULL, team->thread);
    EACH(products)(aligned((void *)q), row_stride(depth), rows, NULL, tokens, &w, starts, scales, column_scale, bias,
                   columns, out, team);
}

#endif

#endif
