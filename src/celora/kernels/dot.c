/* The product of gathered rows with a packed 8-bit weight on CPUs with 8-bit dot products of vectors (VNNI) or of
 * matrices (AMX): rows are quantised, multiplied, scaled and scattered without a pass of their own for any of it.
 *
 *     out[t] = row_scale[k] column_scale * (q[k] W) for t = index[k],    q[k] = round(x[t] / row_scale[k])
 *
 * Both instructions multiply unsigned with signed bytes and add four products to each 32-bit sum. The weight is the
 * unsigned one, w + 128, so what has to be taken off, 128 sum(q[k]), is one number a row. Vectors: a block of BLOCK
 * rows by two vectors of columns stays in registers over the whole depth, BLOCK + 2 loads for 2 BLOCK dots. Matrices:
 * 2 x 2 tiles of sums do, over a stretch of the depth whose part of the weight stays in the first cache.
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

static inline int64_t up_to(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

/* sum + start, which wrap where the one and the other are too large for 32 bits and together are not */
static inline float whole(int32_t sum, int32_t start) { return (float)(int32_t)((uint32_t)sum + (uint32_t)start); }

#define PANEL (2 * LANES) /* columns of the weight that lie together */

#if defined(__AMX_INT8__) && defined(__linux__) && LANES == 16 && !defined(NO_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#define TILE 16                 /* rows of a tile, of 64 bytes each */
#define DEEP 64                 /* what the depth is rounded up to */
#define SQUARE (2 * TILE)       /* rows, and columns, of a block of sums */
#define STRETCH (8 * DEEP)      /* of the depth at a time, about: 16 KiB of a panel */
#define CHUNK (1 << 20)         /* bytes of quantised rows at a time, for the second cache */
#define MOST_ROWS 1024          /* and how many of them at most */

static int matrices;

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

/* sums[r, c] = (first ? 0 : sums[r, c]) + sum_k q[r, k] (w[k, c] + 128) for SQUARE rows and k < deep. Meanwhile fetches
 * `lines` cache lines from `ahead` on with each step: a panel is new to this core when its turn comes. */
static void square(const int8_t *q, int64_t depth, int64_t deep, const uint8_t *panel, int first, const uint8_t *ahead,
                   int64_t lines, int32_t *sums) {
    const int64_t bytes = PANEL * sizeof(int32_t);
    begin_sums(sums, bytes, first);
    for (int64_t k = 0; k < deep; k += DEEP, q += DEEP, panel += DEEP * PANEL) {
        _tile_loadd(4, panel, 4 * PANEL);
        _tile_loadd(6, q, depth);
        _tile_dpbsud(0, 6, 4);
        _tile_loadd(5, panel + 64, 4 * PANEL);
        _tile_dpbsud(1, 6, 5);
        _tile_loadd(7, q + TILE * depth, depth);
        _tile_dpbsud(2, 7, 4);
        _tile_dpbsud(3, 7, 5);
        for (int64_t line = 0; line < lines; line++, ahead += 64) _mm_prefetch((const char *)ahead, _MM_HINT_T1);
    }
    end_sums(sums, bytes);
}

#else
#define DEEP 4
#define SQUARE 1
#endif

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

#ifdef LANES

/* What the depth of a packed weight, and the rows that there is scratch for, are rounded up to. */
int depth_step(void) { return DEEP; }
int rows_step(void) { return SQUARE; }

/* Multiply with matrix instructions from now on, or with vectors again. Returns whether it will be matrices: they were
 * there when this was compiled, and the system, which has to be asked, lets this process use them. */
int use_matrices(int wanted) {
#ifdef TILE
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* arch_prctl(2) */
    matrices = wanted && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
    return matrices;
#else
    (void)wanted;
    return 0;
#endif
}

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

/* packed[panel, k / 4, column, k % 4] = 128 + round(w[k, j] * inverse[j]); 128, which is zero, past the end of w */
void EACH(pack_columns)(const TYPE *w, int64_t rows, int64_t columns, int64_t stride, const float *inverse,
                        uint8_t *packed, int threads) {
    const int64_t depth = up_to(rows, DEEP), panels = up_to(columns, PANEL) / PANEL;
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

/* A block's rows k, ..., k + count - 1 of the panel that begins at column j, from their sums: out[t, j + c] =
 * scales[k] column_scale[j + c] (sums[., c] + starts[k]); starts: NULL where the sums have them already */
static inline void EACH(write_block)(const int32_t *sums, int64_t k, int64_t count, int64_t j, const int64_t *index,
                                     const int32_t *starts, const float *scales, const float *column_scale,
                                     int64_t columns, TYPE *out) {
    const int64_t width = columns - j < PANEL ? columns - j : PANEL;
    const float *column = column_scale + j;
    for (const int64_t end = k + count; k < end; k++, sums += PANEL) {
        TYPE *to = out + (index ? index[k] : k) * columns + j;
        const float scale = scales[k];
        const int32_t start = starts ? starts[k] : 0;
        if (width == PANEL) {
            #pragma omp simd
            for (int c = 0; c < PANEL; c++) to[c] = EACH(to)(whole(sums[c], start) * (scale * column[c]));
        } else {
            for (int c = 0; c < width; c++) to[c] = EACH(to)(whole(sums[c], start) * (scale * column[c]));
        }
    }
}

/* The products of `kept` quantised rows, on the threads that come here together. */
static void EACH(vector_products)(const int8_t *q, int64_t depth, const int64_t *index, int64_t kept,
                                  const uint8_t *packed, const int32_t *starts, const float *scales,
                                  const float *column_scale, int64_t columns, TYPE *out, int threads) {
    const int64_t panels = up_to(columns, PANEL) / PANEL, blocks_of_rows = up_to(kept, BLOCK) / BLOCK;
    /* Whole panels to each thread; some of the rows, too, where there are too few panels for that to come out even. */
    const int64_t parts = panels % threads == 0 || panels > 8 * threads ? 1 : threads;
    #pragma omp for collapse(2) schedule(static) nowait
    for (int64_t p = 0; p < panels; p++)
        for (int64_t part = 0; part < parts; part++) {
            int64_t k = blocks_of_rows * part / parts * BLOCK, end = blocks_of_rows * (part + 1) / parts * BLOCK;
            end = end < kept ? end : kept;
            while (k < end) {
                int count = end - k < BLOCK ? (int)(end - k) : BLOCK;
                if (BLOCK > 6 && count > 8 && count < BLOCK) count = count > 10 ? 6 : 5; /* 9, 10, 11 in two */
                ints sums[BLOCK][2];
                blocks(q + k * depth, depth, packed + p * depth * PANEL, starts + k, count, sums);
                EACH(write_block)((const int32_t *)sums, k, count, p * PANEL, index, NULL, scales, column_scale, columns,
                                  out);
                k += count;
            }
        }
}

#ifdef TILE

/* The same with tiles. A thread goes through all panels with a chunk of the rows that stays in its second cache. */
static void EACH(matrix_products)(const int8_t *q, int64_t depth, const int64_t *index, int64_t kept,
                                  const uint8_t *packed, const int32_t *starts, const float *scales,
                                  const float *column_scale, int64_t columns, TYPE *out, int threads) {
    const int64_t panels = up_to(columns, PANEL) / PANEL;
    int64_t most = CHUNK / depth < MOST_ROWS ? CHUNK / depth : MOST_ROWS;
    most = most < SQUARE ? SQUARE : most;
    int64_t chunks = (kept + most - 1) / most;
    if (kept >= 2 * SQUARE * threads) chunks = up_to(chunks, threads); /* about the rows it has quantised */
    const int64_t chunk = kept ? up_to((kept + chunks - 1) / chunks, SQUARE) : SQUARE;
    chunks = (kept + chunk - 1) / chunk;
    const int64_t stretches = depth < STRETCH ? 1 : (depth + STRETCH / 2) / STRETCH;
    const int64_t stretch = up_to((depth + stretches - 1) / stretches, DEEP);
    configure_tiles();
    #pragma omp for collapse(2) schedule(static) nowait
    for (int64_t part = 0; part < chunks; part++)
        for (int64_t p = 0; p < panels; p++) {
            int32_t sums[MOST_ROWS * PANEL] __attribute__((aligned(64)));
            const int64_t first = part * chunk, end = first + chunk < kept ? first + chunk : kept;
            const int64_t squares = (end - first + SQUARE - 1) / SQUARE, lines = (SQUARE + squares - 1) / squares;
            for (int64_t from = 0; from < depth; from += stretch) {
                const int64_t deep = depth - from < stretch ? depth - from : stretch;
                const uint8_t *here = packed + (p * depth + from) * PANEL, *ahead = here + deep * PANEL;
                for (int64_t k = first; k < end; k += SQUARE, ahead += deep / DEEP * lines * 64) {
                    int32_t *to = sums + (deep < depth ? k - first : 0) * PANEL;
                    square(q + k * depth + from, depth, deep, here, from == 0, ahead, lines, to);
                    if (from + deep == depth)
                        EACH(write_block)(to, k, end - k < SQUARE ? end - k : SQUARE, p * PANEL, index, starts, scales,
                                          column_scale, columns, out);
                }
            }
        }
    _tile_release();
}

#endif

/* out[index[k]] = factor[k] x[index[k]] W in 8 bits, all rows without index; factor: NULL for 1. Rows with position < 0
 * become 0 if fill. scratch: (kept, rows of W), rounded up to rows_step and depth_step. scales, starts: (kept,). */
void EACH(gathered_product)(const TYPE *x, int64_t tokens, int64_t rows, int64_t stride, const int64_t *index,
                            const int32_t *position, int64_t kept, const float *factor, const uint8_t *packed,
                            const float *column_scale, int64_t columns, int8_t *scratch, float *scales,
                            int32_t *starts, TYPE *out, int fill, int threads) {
    const int64_t depth = up_to(rows, DEEP);
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
            starts[k] = (int32_t)(-128 * (uint32_t)sum);
            if (factor) scales[k] *= factor[k];
        }
        #ifdef TILE
        if (matrices && rows)
            EACH(matrix_products)(scratch, depth, index, kept, packed, starts, scales, column_scale, columns, out,
                                  threads);
        else
        #endif
            EACH(vector_products)(scratch, depth, index, kept, packed, starts, scales, column_scale, columns, out,
                                  threads);
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
