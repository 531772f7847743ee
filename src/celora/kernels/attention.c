/* Causal attention of sequences in bfloat16 with matrix instructions (AMX), forward and backward.
 *
 *     S = scale Q K^T,  P = exp(S - L),  O = P V,  L = log sum exp S,
 *     dV = P^T dO,  dS = scale P (dO V^T - D),  D = sum_j dO_j O_j,  dQ = dS K,  dK = dS^T Q.
 *
 * Everything goes by squares of SIDE keys times SIDE queries that lie on or below the diagonal, with keys as rows, so
 * that what belongs to a query (L, D, a sum) is a vector. Sums are in float32; P and dS are rounded to bfloat16 where they
 * are multiplied, as in FlashAttention (arXiv 2205.14135). A thread has one sequence and one head of keys at a time.
 *
 * A tile multiplies 16 rows of 32 numbers (A) with 32 rows of 16, two of which lie interleaved (B). So a matrix is
 * needed as it is, for A; in `pairs`, (rows / 2) x columns of two numbers from successive rows, for B; `turned`, two
 * numbers from successive columns, (columns / 2) x rows of each square, for B of its transpose; and its transpose, the
 * pairs turned, for A.
 */

#ifdef TILE

#include <omp.h>

#define SIDE 32
#define LOG2E 1.44269504f

/* Where a tensor's numbers are: that of a batch, head and token is this far apart from the next one's. */
typedef struct {
    int64_t batch, head, token;
} strides;

/* 2^x for x at most about 0; 0 from far below; a NaN stays one */
static inline __m512 power_of_2(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    const __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

/* 16 x 16 numbers of 32 bits, rows `step` apart, transposed in registers */
static inline void transpose(const void *from, int64_t step, __m512i column[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512((const uint32_t *)from + i * step);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        column[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        column[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
        column[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
        column[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
    }
}

/* to: (squares, columns, rows) from (squares, rows, columns), multiples of 16, of 32 bits */
static void turn(const void *from, int64_t squares, int64_t rows, int64_t columns, uint32_t *to) {
    const uint32_t *at = from;
    for (int64_t i = 0; i < squares; i++, at += rows * columns, to += rows * columns)
        for (int64_t r = 0; r < rows; r += 16)
            for (int64_t c = 0; c < columns; c += 16) {
                __m512i column[16];
                transpose(at + r * columns + c, columns, column);
                for (int e = 0; e < 16; e++) _mm512_storeu_si512(to + (c + e) * rows + r, column[e]);
            }
}

/* `length` rows of `size` numbers, and zeros up to `padded` rows */
static void copy_rows(const bf16 *from, int64_t step, int64_t length, int64_t padded, int64_t size, bf16 *to) {
    for (int64_t t = 0; t < length; t++) memcpy(to + t * size, from + t * step, (size_t)size * sizeof(bf16));
    memset(to + length * size, 0, (size_t)((padded - length) * size) * sizeof(bf16));
}

static const uint16_t even_odd[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

/* 16 pairs of numbers of 16 bits: of the lower and of the upper half */
static inline __m512i interleave(__m512i halves) {
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(even_odd), halves);
}

static void pair_rows(const bf16 *from, int64_t rows, int64_t size, uint32_t *to) {
    for (int64_t r = 0; r < rows; r += 2, from += 2 * size)
        for (int64_t c = 0; c < size; c += 16, to += 16) {
            const __m256i one = _mm256_loadu_si256((const __m256i *)(from + c));
            const __m256i next = _mm256_loadu_si256((const __m256i *)(from + size + c));
            _mm512_storeu_si512(to, interleave(_mm512_inserti64x4(_mm512_castsi256_si512(one), next, 1)));
        }
}

/* c: (SIDE, SIDE) = (first ? 0 : c) + sum of `steps` products of A's tiles with B's. Strides and steps in bytes. */
static inline void multiply(const void *a, int64_t a_stride, int64_t a_step, const void *b, int64_t b_stride,
                            int64_t b_step, int64_t steps, float *c, int64_t c_stride, int first) {
    const char *rows = a, *columns = b;
    char *sums = (char *)c, *below = sums + 16 * c_stride;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, c_stride);
        _tile_loadd(1, sums + 64, c_stride);
        _tile_loadd(2, below, c_stride);
        _tile_loadd(3, below + 64, c_stride);
    }
    for (int64_t k = 0; k < steps; k++, rows += a_step, columns += b_step) {
        _tile_loadd(4, columns, b_stride);
        _tile_loadd(6, rows, a_stride);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(5, columns + 64, b_stride);
        _tile_dpbf16ps(1, 6, 5);
        _tile_loadd(7, rows + 16 * a_stride, a_stride);
        _tile_dpbf16ps(2, 7, 4);
        _tile_dpbf16ps(3, 7, 5);
    }
    _tile_stored(0, sums, c_stride);
    _tile_stored(1, sums + 64, c_stride);
    _tile_stored(2, below, c_stride);
    _tile_stored(3, below + 64, c_stride);
}

/* Which of 16 queries, of which the first is `query` of its square, see key `key` of the square. */
static inline __mmask16 seen(int diagonal, int key, int query) {
    const int hidden = diagonal ? key - query : 0;
    return hidden <= 0 ? 0xffff : hidden >= 16 ? 0 : (__mmask16)(0xffff << hidden);
}

/* Rows of (size, 16 queries) sums, each times the query's factor, to rows of the queries that there are */
static inline void write_queries(const float *sums, int64_t stride, int64_t size, const float *factor, int64_t queries,
                                 bf16 *to, int64_t step) {
    for (int64_t c = 0; c < size; c += 16) {
        __m512i of_query[16];
        transpose(sums + c * stride, stride, of_query);
        for (int64_t t = 0; t < 16 && t < queries; t++) {
            const __m512 y = _mm512_mul_ps(_mm512_castsi512_ps(of_query[t]), _mm512_set1_ps(factor ? factor[t] : 1.0f));
            _mm256_storeu_si256((__m256i *)(to + t * step + c), (__m256i)_mm512_cvtneps_pbh(y));
        }
    }
}

/* Bytes of `work` that each thread needs, for sequences of at most so many tokens. */
int64_t attention_work(int64_t longest, int64_t size) {
    const int64_t padded = up_to(longest, SIDE);
    /* matrices of bfloat16: 9; of float32: 3; a row of squares: 2 of bfloat16, or 1 of float32; L, D */
    return padded * size * (9 * 2 + 3 * 4) + padded * SIDE * 6 + padded * 8 + 64;
}

/* out: (tokens, heads, size) and sums: (heads, tokens) = L for each sequence (batch, first token, length). */
void attention_bf16(const bf16 *q, const bf16 *k, const bf16 *v, const strides *of, const int64_t *sequences,
                    int64_t count, int64_t tokens, int64_t heads, int64_t groups, int64_t size, float scale, char *work,
                    int64_t work_bytes, bf16 *out, float *logs, int threads) {
    const int64_t kv_heads = heads / groups;
    #pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        #pragma omp for collapse(2) schedule(dynamic) nowait
        for (int64_t s = 0; s < count; s++)
            for (int64_t g = 0; g < kv_heads; g++) {
                const int64_t batch = sequences[3 * s], first = sequences[3 * s + 1], length = sequences[3 * s + 2];
                const int64_t padded = up_to(length, SIDE), squares = padded / SIDE, matrix = padded * size;
                bf16 *keys = (bf16 *)(work + omp_get_thread_num() * work_bytes), *plain = keys + matrix;
                uint32_t *v_transposed = (uint32_t *)(plain + matrix), *turned = v_transposed + matrix / 2;
                uint32_t *pairs = turned + matrix / 2, *p_pairs = pairs + matrix / 2;
                float *scores = (float *)(p_pairs + padded * SIDE / 2);
                copy_rows(v + batch * of[2].batch + g * of[2].head + first * of[2].token, of[2].token, length, padded, size, plain);
                pair_rows(plain, padded, size, pairs);
                turn(pairs, squares, SIDE / 2, size, v_transposed);
                copy_rows(k + batch * of[1].batch + g * of[1].head + first * of[1].token, of[1].token, length, padded, size, keys);
                for (int64_t h = g * groups; h < (g + 1) * groups; h++) {
                    copy_rows(q + batch * of[0].batch + h * of[0].head + first * of[0].token, of[0].token, length, padded, size, plain);
                    turn(plain, squares, SIDE, size / 2, turned);
                    for (int64_t i = 0; i < squares; i++) {
                        __m512 most[2], sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
                        most[0] = most[1] = _mm512_set1_ps(-INFINITY);
                        for (int64_t j = 0; j <= i; j++) {
                            float *square = scores + j * SIDE * SIDE;
                            multiply(keys + j * SIDE * size, 2 * size, 64, turned + i * SIDE * size / 2,
                                     4 * SIDE, 64 * SIDE, size / 32, square, 4 * SIDE, 1);
                            for (int r = 0; r < SIDE; r++)
                                for (int e = 0; e < 2; e++)
                                    most[e] = _mm512_mask_max_ps(most[e], seen(i == j, r, 16 * e), most[e],
                                                                 _mm512_loadu_ps(square + r * SIDE + 16 * e));
                        }
                        const __m512 factor = _mm512_set1_ps(scale * LOG2E);
                        for (int e = 0; e < 2; e++) most[e] = _mm512_mul_ps(most[e], factor);
                        for (int64_t key = 0; key < (i + 1) * SIDE; key += 2)
                            for (int e = 0; e < 2; e++) {
                                __m512 p[2];
                                for (int n = 0; n < 2; n++) {
                                    const __m512 x = _mm512_loadu_ps(scores + (key + n) * SIDE + 16 * e);
                                    p[n] = power_of_2(_mm512_fmsub_ps(x, factor, most[e]));
                                    p[n] = _mm512_maskz_mov_ps(seen(key >= i * SIDE, (int)(key + n - i * SIDE), 16 * e), p[n]);
                                    sum[e] = _mm512_add_ps(sum[e], p[n]);
                                }
                                _mm512_storeu_si512(p_pairs + key / 2 * SIDE + 16 * e,
                                                    interleave((__m512i)_mm512_cvtne2ps_pbh(p[1], p[0])));
                            }
                        float inverse[SIDE], highest[SIDE], total[SIDE], sums[SIDE * SIDE];
                        for (int e = 0; e < 2; e++) {
                            _mm512_storeu_ps(inverse + 16 * e, _mm512_div_ps(_mm512_set1_ps(1.0f), sum[e]));
                            _mm512_storeu_ps(highest + 16 * e, most[e]);
                            _mm512_storeu_ps(total + 16 * e, sum[e]);
                        }
                        const int64_t queries = length - i * SIDE < SIDE ? length - i * SIDE : SIDE;
                        const int64_t at = first + i * SIDE;
                        float *log_sums = logs + (batch * heads + h) * tokens + at;
                        for (int64_t t = 0; t < queries; t++) log_sums[t] = highest[t] / LOG2E + logf(total[t]);
                        bf16 *to = out + ((batch * tokens + at) * heads + h) * size;
                        for (int64_t c = 0; c < size; c += SIDE) {
                            multiply(v_transposed + c * SIDE / 2, 2 * SIDE, 2 * SIDE * size, p_pairs, 4 * SIDE, 64 * SIDE, i + 1,
                                     sums, 4 * SIDE, 1);
                            for (int e = 0; e < 2; e++)
                                write_queries(sums + 16 * e, SIDE, SIDE, inverse + 16 * e, queries - 16 * e,
                                              to + 16 * e * heads * size + c, heads * size);
                        }
                    }
                }
            }
        _tile_release();
    }
}

/* The gradients, all (tokens, heads, size), from that of out. of: the strides of q, k, v and of the gradient. */
void attention_backward_bf16(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *grad, const strides *of,
                             const int64_t *sequences, int64_t count, int64_t tokens, int64_t heads, int64_t groups,
                             int64_t size, float scale, char *work, int64_t work_bytes, const bf16 *out,
                             const float *logs, bf16 *grad_q, bf16 *grad_k, bf16 *grad_v, int threads) {
    const int64_t kv_heads = heads / groups;
    #pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        #pragma omp for collapse(2) schedule(dynamic) nowait
        for (int64_t s = 0; s < count; s++)
            for (int64_t g = 0; g < kv_heads; g++) {
                const int64_t batch = sequences[3 * s], first = sequences[3 * s + 1], length = sequences[3 * s + 2];
                const int64_t padded = up_to(length, SIDE), squares = padded / SIDE, matrix = padded * size;
                bf16 *keys = (bf16 *)(work + omp_get_thread_num() * work_bytes), *values = keys + matrix, *plain = values + matrix;
                uint32_t *k_transposed = (uint32_t *)(plain + matrix), *q_turned = k_transposed + matrix / 2;
                uint32_t *q_pairs = q_turned + matrix / 2, *grad_turned = q_pairs + matrix / 2;
                uint32_t *grad_pairs = grad_turned + matrix / 2;
                float *sum_q = (float *)(grad_pairs + matrix / 2), *sum_k = sum_q + matrix, *sum_v = sum_k + matrix;
                bf16 *p = (bf16 *)(sum_v + matrix), *ds = p + padded * SIDE;
                float *log_sums = (float *)(ds + padded * SIDE), *inner = log_sums + padded;
                copy_rows(v + batch * of[2].batch + g * of[2].head + first * of[2].token, of[2].token, length, padded, size, values);
                copy_rows(k + batch * of[1].batch + g * of[1].head + first * of[1].token, of[1].token, length, padded, size, keys);
                pair_rows(keys, padded, size, q_pairs);
                turn(q_pairs, squares, SIDE / 2, size, k_transposed);
                for (int64_t h = g * groups; h < (g + 1) * groups; h++) {
                    copy_rows(q + batch * of[0].batch + h * of[0].head + first * of[0].token, of[0].token, length, padded, size, plain);
                    turn(plain, squares, SIDE, size / 2, q_turned);
                    pair_rows(plain, padded, size, q_pairs);
                    copy_rows(grad + batch * of[3].batch + h * of[3].head + first * of[3].token, of[3].token, length, padded, size, plain);
                    turn(plain, squares, SIDE, size / 2, grad_turned);
                    pair_rows(plain, padded, size, grad_pairs);
                    for (int64_t t = 0; t < padded; t++) {
                        const bf16 *from = out + ((batch * tokens + first + t) * heads + h) * size;
                        float total = 0;
                        if (t < length) {
                            #pragma omp simd reduction(+ : total)
                            for (int64_t c = 0; c < size; c++) total += from_bf16(from[c]) * from_bf16(plain[t * size + c]);
                        }
                        inner[t] = total;
                        log_sums[t] = t < length ? LOG2E * logs[(batch * heads + h) * tokens + first + t] : INFINITY;
                    }
                    for (int64_t j = 0; j < squares; j++) {
                        for (int64_t i = j; i < squares; i++) {
                            float score[SIDE * SIDE], dp[SIDE * SIDE];
                            uint32_t ds_pairs[SIDE / 2 * SIDE];
                            bf16 *p_square = p + i * SIDE * SIDE, *ds_square = ds + i * SIDE * SIDE;
                            multiply(keys + j * SIDE * size, 2 * size, 64, q_turned + i * SIDE * size / 2,
                                     4 * SIDE, 64 * SIDE, size / 32, score, 4 * SIDE, 1);
                            multiply(values + j * SIDE * size, 2 * size, 64, grad_turned + i * SIDE * size / 2,
                                     4 * SIDE, 64 * SIDE, size / 32, dp, 4 * SIDE, 1);
                            const __m512 factor = _mm512_set1_ps(scale * LOG2E), times = _mm512_set1_ps(scale);
                            for (int r = 0; r < SIDE; r += 2) {
                                __m512 of_p[2][2], of_ds[2][2];
                                for (int n = 0; n < 2; n++)
                                    for (int e = 0; e < 2; e++) {
                                        const int64_t at = (r + n) * SIDE + 16 * e, query = i * SIDE + 16 * e;
                                        __m512 y = _mm512_fmsub_ps(_mm512_loadu_ps(score + at), factor, _mm512_loadu_ps(log_sums + query));
                                        y = _mm512_maskz_mov_ps(seen(i == j, r + n, 16 * e), power_of_2(y));
                                        of_p[n][e] = y;
                                        y = _mm512_mul_ps(y, _mm512_sub_ps(_mm512_loadu_ps(dp + at), _mm512_loadu_ps(inner + query)));
                                        of_ds[n][e] = _mm512_mul_ps(y, times);
                                    }
                                for (int n = 0; n < 2; n++) {
                                    _mm512_storeu_si512(p_square + (r + n) * SIDE, (__m512i)_mm512_cvtne2ps_pbh(of_p[n][1], of_p[n][0]));
                                    _mm512_storeu_si512(ds_square + (r + n) * SIDE, (__m512i)_mm512_cvtne2ps_pbh(of_ds[n][1], of_ds[n][0]));
                                }
                                for (int e = 0; e < 2; e++)
                                    _mm512_storeu_si512(ds_pairs + r / 2 * SIDE + 16 * e, interleave((__m512i)_mm512_cvtne2ps_pbh(of_ds[1][e], of_ds[0][e])));
                            }
                            for (int64_t c = 0; c < size; c += SIDE) /* transposed, too */
                                multiply(k_transposed + (j * size + c) * SIDE / 2, 2 * SIDE, 0, ds_pairs, 4 * SIDE, 0, 1,
                                         sum_q + (i * size + c) * SIDE, 4 * SIDE, j == 0);
                        }
                        for (int64_t c = 0; c < size; c += SIDE) {
                            multiply(p + j * SIDE * SIDE, 64, 64 * SIDE, grad_pairs + j * SIDE / 2 * size + c, 4 * size,
                                     64 * size, squares - j, sum_v + j * SIDE * size + c, 4 * size, h == g * groups);
                            multiply(ds + j * SIDE * SIDE, 64, 64 * SIDE, q_pairs + j * SIDE / 2 * size + c, 4 * size,
                                     64 * size, squares - j, sum_k + j * SIDE * size + c, 4 * size, h == g * groups);
                        }
                    }
                    for (int64_t t = 0; t < length; t += 16)
                        write_queries(sum_q + t / SIDE * SIDE * size + t % SIDE, SIDE, size, NULL, length - t,
                                      grad_q + ((batch * tokens + first + t) * heads + h) * size, heads * size);
                }
                for (int64_t t = 0; t < length; t++) {
                    const int64_t to = ((batch * tokens + first + t) * kv_heads + g) * size;
                    for (int64_t c = 0; c < size; c++) {
                        grad_k[to + c] = to_bf16(sum_k[t * size + c]);
                        grad_v[to + c] = to_bf16(sum_v[t * size + c]);
                    }
                }
            }
        _tile_release();
    }
}

#endif
