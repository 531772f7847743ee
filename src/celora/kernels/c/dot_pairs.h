/* 8-bit products for dot.c by AVX2, which has no dot products of bytes that cannot overflow. Those of 16 bits can not,
 * and a vector of them makes 16 products where one of float32 makes 8.
 *
 * So bytes become 16 bits: a panel of the weight once for all rows of a product, a block of rows for a STRETCH of the
 * depth at a time, which stays in the first cache. Both operands are signed, and nothing is added to the weight's bytes.
 */

#include <immintrin.h>

#define LANES 8
#define BLOCK 6
#define OFFSET 0
#define DEEP 16
#define PAIRS     /* panels are read as pairs of 16 bits: [k / 2][column][k % 2] */
#define OWN_BLOCK /* `block` is here */
#define STRETCH 512
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

/* As dot.c's: sums[r][h] = sum_k q[r, k] w[k, j] */
static inline __attribute__((always_inline)) void block(const int8_t *q, int64_t stride, int64_t depth,
                                                        const uint8_t *panel, const int32_t *start, const int rows,
                                                        ints sums[BLOCK][2]) {
    int16_t wide[BLOCK][STRETCH];
    ints sum[BLOCK][2];
    (void)start; /* zero */
    #pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (; depth > 0; depth -= STRETCH, q += STRETCH) {
        const int64_t deep = depth < STRETCH ? depth : STRETCH;
        for (int r = 0; r < rows; r++)
            for (int64_t k = 0; k < deep; k += 16) {
                const __m128i bytes = _mm_loadu_si128((const __m128i *)(q + r * stride + k));
                _mm256_storeu_si256((__m256i *)(wide[r] + k), _mm256_cvtepi8_epi16(bytes));
            }
        for (int64_t k = 0; k < deep; k += 2, panel += 8 * LANES) {
            const ints left = load(panel), right = load(panel + 4 * LANES);
            #pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                int32_t two;
                memcpy(&two, wide[r] + k, 4);
                const ints pair = _mm256_set1_epi32(two);
                sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(left, pair));
                sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(right, pair));
            }
        }
    }
    #pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sums[r][0] = sum[r][0], sums[r][1] = sum[r][1];
}
