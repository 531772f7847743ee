/* 8-bit products for dot.c by AVX2, which has no dot products of bytes that cannot overflow. Those of 16 bits can not,
 * and a vector of them makes 16 products where one of float32 makes 8.
 *
 * So bytes become 16 bits: the rows once for all panels of the weight, and a panel once for all rows. A STRETCH of a
 * panel's depth stays in the first cache while a group of rows is multiplied with it, as their sums do between stretches.
 * Both operands are signed, and nothing is added to the weight's bytes.
 */

#include <immintrin.h>

#define LANES 8
#define BLOCK 6
#define OFFSET 0
#define DEEP 16
#define PAIRS              /* rows and panels are read in 16 bits: [k / 2][row, or column][k % 2] */
#define STRETCH 512        /* of the depth at a time: 16 KiB of a panel */
#define GROUP (16 * BLOCK) /* rows with their sums in the first cache: 6 KiB */
typedef __m256i ints;
static inline ints load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

/* A panel of bytes, [k / 4][column][k % 4], in pairs */
static inline void pair_panel(const uint8_t *panel, int64_t depth, int16_t *to) {
    for (int64_t k = 0; k < depth; k += 4, panel += 8 * LANES, to += 8 * LANES)
        for (int half = 0; half < 2; half++) {
            const ints bytes = load(panel + 4 * LANES * half);
            const __m256 few = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes))),
                         more = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1)));
            const ints first = _mm256_castps_si256(_mm256_shuffle_ps(few, more, 0x88)),
                       second = _mm256_castps_si256(_mm256_shuffle_ps(few, more, 0xdd));
            _mm256_storeu_si256((__m256i *)(to + 2 * LANES * half), _mm256_permute4x64_epi64(first, 0xd8));
            _mm256_storeu_si256((__m256i *)(to + 2 * LANES * (half + 2)), _mm256_permute4x64_epi64(second, 0xd8));
        }
}

/* BLOCK rows of bytes, `stride` apart, in pairs; zeros for rows past the end */
static void pair_rows(const int8_t *q, int64_t stride, int64_t depth, int rows, int16_t *to) {
    for (int r = 0; r < BLOCK; r++)
        for (int64_t k = 0; k < depth; k += 2) {
            int16_t *pair = to + k * BLOCK + 2 * r;
            pair[0] = r < rows ? q[r * stride + k] : 0, pair[1] = r < rows ? q[r * stride + k + 1] : 0;
        }
}

/* sums[r][h] += sum_k q[r, k] w[k, j] for BLOCK rows of pairs */
static inline void block(const int16_t *q, int64_t depth, const uint8_t *panel, ints sums[BLOCK][2]) {
    ints sum[BLOCK][2];
    #pragma GCC unroll 16
    for (int r = 0; r < BLOCK; r++) sum[r][0] = sums[r][0], sum[r][1] = sums[r][1];
    for (int64_t k = 0; k < depth; k += 2, panel += 8 * LANES, q += 2 * BLOCK) {
        const ints left = load(panel), right = load(panel + 4 * LANES);
        #pragma GCC unroll 16
        for (int r = 0; r < BLOCK; r++) {
            int32_t two;
            memcpy(&two, q + 2 * r, 4);
            const ints pair = _mm256_set1_epi32(two);
            sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(left, pair));
            sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(right, pair));
            __asm__ volatile("" : "+x"(sum[r][0]), "+x"(sum[r][1])); /* gcc would mix rows and run out of registers */
        }
    }
    #pragma GCC unroll 16
    for (int r = 0; r < BLOCK; r++) sums[r][0] = sum[r][0], sums[r][1] = sum[r][1];
}

/* sums[r][h] = sum_k q[r, k] w[k, j] for up to GROUP rows of pairs */
static void group(const int16_t *q, int64_t depth, const uint8_t *panel, int rows, ints sums[GROUP][2]) {
    memset(sums, 0, GROUP * sizeof sums[0]);
    for (int64_t k = 0; k < depth; k += STRETCH)
        for (int r = 0; r < rows; r += BLOCK)
            block(q + r * depth + k * BLOCK, depth - k < STRETCH ? depth - k : STRETCH, panel + 4 * k * LANES, sums + r);
}
