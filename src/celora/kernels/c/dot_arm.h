/* ARM's 8-bit products for dot.c. Both operands are signed, so nothing is added to the weight's bytes.
 *
 * DOTPROD adds four products to each 32-bit sum, as x86's VNNI does, and takes a row's four bytes from a lane: 16 of a row
 * are loaded at once. I8MM multiplies two rows with two columns, eight deep, in an instruction: 32 products for 16. So
 * eight bytes of a column lie together there, and two rows are zipped.
 */

#include <arm_neon.h>

#define LANES 4
#define OFFSET 0
#define DEEP 16
#define OWN_BLOCK /* `block` is here */
typedef int32x4_t ints;

#define BLOCK 8

#ifdef __ARM_FEATURE_MATMUL_INT8

#define TOGETHER 8

/* 8 x 8 bytes */
static inline void transpose_bytes(const uint8_t *from, uint8_t *to) {
    static const uint8_t order[16] = {0, 8, 16, 24, 32, 40, 48, 56, 1, 9, 17, 25, 33, 41, 49, 57};
    const uint8x16x4_t bytes = {{vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)}};
    for (uint8_t n = 0; n < 4; n++)
        vst1q_u8(to + 16 * n, vqtbl4q_u8(bytes, vaddq_u8(vld1q_u8(order), vdupq_n_u8(2 * n))));
}

/* [a0 b0], [a1 b1] of eight bytes each */
static inline void zip_eights(int8x16_t a, int8x16_t b, int8x16_t zipped[2]) {
    const int64x2_t one = vreinterpretq_s64_s8(a), two = vreinterpretq_s64_s8(b);
    zipped[0] = vreinterpretq_s8_s64(vzip1q_s64(one, two));
    zipped[1] = vreinterpretq_s8_s64(vzip2q_s64(one, two));
}

/* sum + two rows times two columns, eight deep */
static inline ints add_product(ints sum, int8x16_t rows, int8x16_t columns) {
#ifdef __clang__
    return vmmlaq_s32(sum, rows, columns);
#else /* which would move and spill sums */
    __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(rows), "w"(columns));
    return sum;
#endif
}

/* As dot.c's: sums[r][h] = start[r] + sum_k q[r, k] w[k, j] */
static inline __attribute__((always_inline)) void block(const int8_t *q, int64_t stride, int64_t depth,
                                                        const uint8_t *panel, const int32_t *start, const int rows,
                                                        ints sums[BLOCK][2]) {
    const int pairs = (rows + 1) / 2; /* the last row twice where their number is odd */
    const int8_t *at = (const int8_t *)panel;
    ints sum[BLOCK / 2][4]; /* of rows 2r, 2r + 1 and columns 2c, 2c + 1 */
    (void)start;            /* zero */
    #pragma GCC unroll 16
    for (int r = 0; r < pairs; r++) sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = vdupq_n_s32(0);
    for (int64_t k = 0; k < depth; k += 16, at += 16 * 2 * LANES) {
        int8x16_t two[BLOCK / 2][2], columns[4]; /* two rows, eight deep; two columns, eight deep */
        #pragma GCC unroll 16
        for (int r = 0; r < pairs; r++) {
            const int8_t *row = q + 2 * r * stride + k;
            zip_eights(vld1q_s8(row), vld1q_s8(2 * r + 1 < rows ? row + stride : row), two[r]);
        }
        #pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            #pragma GCC unroll 4
            for (int c = 0; c < 4; c++) columns[c] = vld1q_s8(at + 64 * half + 16 * c);
            #pragma GCC unroll 16
            for (int r = 0; r < pairs; r++) {
                #pragma GCC unroll 4
                for (int c = 0; c < 4; c++) sum[r][c] = add_product(sum[r][c], two[r][half], columns[c]);
            }
        }
    }
    #pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < 2; h++) {
            int8x16_t both[2];
            zip_eights(vreinterpretq_s8_s32(sum[r / 2][2 * h]), vreinterpretq_s8_s32(sum[r / 2][2 * h + 1]), both);
            sums[r][h] = vreinterpretq_s32_s8(both[r % 2]);
        }
}

#else

#define TOGETHER 4

/* 4 x 4 bytes */
static inline void transpose_bytes(const uint8_t *from, uint8_t *to) {
    static const uint8_t order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    vst1q_u8(to, vqtbl1q_u8(vld1q_u8(from), vld1q_u8(order)));
}

static inline __attribute__((always_inline)) void block(const int8_t *q, int64_t stride, int64_t depth,
                                                        const uint8_t *panel, const int32_t *start, const int rows,
                                                        ints sums[BLOCK][2]) {
    ints sum[BLOCK][2];
    const int8_t *at = (const int8_t *)panel;
    (void)start; /* zero */
    #pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = vdupq_n_s32(0);
    for (int64_t k = 0; k < depth; k += 16, at += 16 * 2 * LANES) {
        int8x16_t bytes[BLOCK];
        #pragma GCC unroll 16
        for (int r = 0; r < rows; r++) bytes[r] = vld1q_s8(q + r * stride + k);
#define STEP(lane) /* a constant for the instruction */                                        \
    {                                                                                         \
        const int8x16_t left = vld1q_s8(at + 32 * lane), right = vld1q_s8(at + 32 * lane + 16); \
        _Pragma("GCC unroll 16") for (int r = 0; r < rows; r++) {                             \
            sum[r][0] = vdotq_laneq_s32(sum[r][0], left, bytes[r], lane);                     \
            sum[r][1] = vdotq_laneq_s32(sum[r][1], right, bytes[r], lane);                    \
        }                                                                                     \
    }
        STEP(0)
        STEP(1)
        STEP(2)
        STEP(3)
#undef STEP
    }
    #pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sums[r][0] = sum[r][0], sums[r][1] = sum[r][1];
}

#endif
