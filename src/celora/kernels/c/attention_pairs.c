/* The attention of attention.c in bfloat16, for CPUs that multiply bfloat16. Sums are in float32; P and dS are rounded
 * to bfloat16 where they are multiplied, as in FlashAttention (arXiv 2205.14135).
 *
 * The instructions multiply rows of pairs of numbers (A) with columns of pairs (B): AMX 16 rows of 32 numbers with 32
 * rows of 16, two of which lie interleaved; AVX-512 one pair with 16. So a matrix is needed as it is, for A; in
 * `pairs`, (rows / 2) x columns of two numbers from successive rows, for B; `turned`, two numbers from successive
 * columns, (columns / 2) x rows of each square, for B of its transpose; and its transpose, the pairs turned, for A.
 */

#define LOG2E 1.44269504f

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

/* c: (SIDE, SIDE) = (first ? 0 : c) + sum of `steps` products of 32 columns of A with 16 rows of B's pairs. Strides and
 * steps in bytes. */
#ifdef TILE
static void begin_products(void) { configure_tiles(); }
static void end_products(void) { _tile_release(); }
static inline void multiply(const void *a, int64_t a_stride, int64_t a_step, const void *b, int64_t b_stride,
                            int64_t b_step, int64_t steps, float *c, int64_t c_stride, int first) {
    const char *rows = a, *columns = b;
    begin_sums(c, c_stride, first);
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
    end_sums(c, c_stride);
}
#else
#define ROWS_AT_ONCE 8 /* with 32 columns: 16 registers of sums */
static void begin_products(void) {}
static void end_products(void) {}
static inline __m512bh two_everywhere(const char *from) {
    int32_t two;
    memcpy(&two, from, sizeof two);
    return (__m512bh)_mm512_set1_epi32(two);
}
static void multiply(const void *a, int64_t a_stride, int64_t a_step, const void *b, int64_t b_stride, int64_t b_step,
                     int64_t steps, float *c, int64_t c_stride, int first) {
    for (int row = 0; row < SIDE; row += ROWS_AT_ONCE) {
        const char *rows = (const char *)a + row * a_stride, *columns = b;
        char *to = (char *)c + row * c_stride;
        __m512 sum[ROWS_AT_ONCE][2];
        for (int i = 0; i < ROWS_AT_ONCE; i++)
            for (int e = 0; e < 2; e++)
                sum[i][e] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(to + i * c_stride + 64 * e);
        for (int64_t k = 0; k < steps; k++, rows += a_step, columns += b_step)
            for (int pair = 0; pair < 16; pair++) {
                const __m512bh left = (__m512bh)_mm512_loadu_si512(columns + pair * b_stride);
                const __m512bh right = (__m512bh)_mm512_loadu_si512(columns + pair * b_stride + 64);
                for (int i = 0; i < ROWS_AT_ONCE; i++) {
                    const __m512bh two = two_everywhere(rows + i * a_stride + 4 * pair);
                    sum[i][0] = _mm512_dpbf16_ps(sum[i][0], two, left);
                    sum[i][1] = _mm512_dpbf16_ps(sum[i][1], two, right);
                }
            }
        for (int i = 0; i < ROWS_AT_ONCE; i++)
            for (int e = 0; e < 2; e++) _mm512_storeu_ps(to + i * c_stride + 64 * e, sum[i][e]);
    }
}
#endif

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
            const __m512 y = _mm512_castsi512_ps(of_query[t]), times = _mm512_set1_ps(factor ? factor[t] : 1.0f);
            _mm256_storeu_si256((__m256i *)(to + t * step + c), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(y, times)));
        }
    }
}

/* What one thread is at: a sequence, and where it works. */
typedef struct {
    int64_t batch, first, length, padded, squares; /* of the sequence: its row, first token, tokens, up to SIDE */
    int64_t tokens, heads, size;                   /* in a row of the batch; of queries; numbers in a head */
    float scale;
    bf16 *keys, *values, *plain;           /* (padded, size) */
    uint32_t *transposed, *turned, *pairs; /* as many bytes: of the keys or values; of the queries */
    uint32_t *grad_turned, *grad_pairs;    /* of the gradient */
    float *sum_q, *sum_k, *sum_v;          /* (padded, size), the first as (squares, size, SIDE) */
    float *scores, *logs, *inner;          /* (padded, SIDE); (padded): L in base 2, D */
    uint32_t *p_pairs;                     /* (padded / 2, SIDE) */
    bf16 *p, *ds;                          /* (squares, SIDE, SIDE), of one column of squares */
} task;

/* The next `bytes` of the work space, of which `used` are taken; nothing but counted where there is none. */
static void *take(char *work, int64_t *used, int64_t bytes) {
    char *taken = work ? work + *used : NULL;
    *used += bytes;
    return taken;
}

/* Lay out the work space of a task. Returns its bytes. */
static int64_t lay_out(task *t, char *work, int backward) {
    const int64_t numbers = t->padded * t->size, halves = numbers * 2, strip = t->padded * SIDE;
    int64_t used = 0;
    t->keys = take(work, &used, halves);
    t->plain = take(work, &used, halves);
    t->transposed = take(work, &used, halves);
    t->turned = take(work, &used, halves);
    t->pairs = take(work, &used, halves);
    if (!backward) {
        t->scores = take(work, &used, strip * 4);
        t->p_pairs = take(work, &used, strip * 2);
        return used;
    }
    t->values = take(work, &used, halves);
    t->grad_turned = take(work, &used, halves);
    t->grad_pairs = take(work, &used, halves);
    t->sum_q = take(work, &used, numbers * 4);
    t->sum_k = take(work, &used, numbers * 4);
    t->sum_v = take(work, &used, numbers * 4);
    t->p = take(work, &used, strip * 2);
    t->ds = take(work, &used, strip * 2);
    t->logs = take(work, &used, t->padded * 4);
    t->inner = take(work, &used, t->padded * 4);
    return used;
}

/* Bytes that each thread needs to work in, for sequences of at most so many tokens. */
static int64_t pairs_work(int64_t longest, int64_t size, int backward) {
    task t = {.padded = up_to(longest, SIDE), .size = size};
    return lay_out(&t, NULL, backward);
}

static void begin(task *t, const int64_t sequence[3], char *work, int backward) {
    t->batch = sequence[0], t->first = sequence[1], t->length = sequence[2];
    t->padded = up_to(t->length, SIDE), t->squares = t->padded / SIDE;
    lay_out(t, work, backward);
}

/* One head's rows of the sequence, and zeros up to `padded` */
static void copy_rows(const task *t, const bf16 *x, strides of, int64_t head, bf16 *to) {
    x += t->batch * of.batch + head * of.head + t->first * of.token;
    for (int64_t row = 0; row < t->length; row++)
        memcpy(to + row * t->size, x + row * of.token, (size_t)t->size * sizeof(bf16));
    memset(to + t->length * t->size, 0, (size_t)((t->padded - t->length) * t->size) * sizeof(bf16));
}

/* The keys or values, transposed */
static void transpose_rows(const task *t, const bf16 *rows) {
    pair_rows(rows, t->padded, t->size, t->pairs);
    turn(t->pairs, t->squares, SIDE / 2, t->size, t->transposed);
}

/* Where the sequence's token has its numbers in a tensor of (tokens, heads, size) */
static inline int64_t place(const task *t, int64_t token, int64_t heads, int64_t head) {
    return ((t->batch * t->tokens + t->first + token) * heads + head) * t->size;
}

/* square: (SIDE, SIDE) = rows of square j by the queries, or their gradients, of square i */
static inline void dots(const task *t, const bf16 *rows, int64_t j, const uint32_t *turned, int64_t i, float *square) {
    multiply(rows + j * SIDE * t->size, 2 * t->size, 64, turned + i * SIDE * t->size / 2, 4 * SIDE, 64 * SIDE,
             t->size / 32, square, 4 * SIDE, 1);
}

/* p_pairs = exp(S - largest) of the queries of square i and all keys up to it; the largest, in base 2, and the sums */
static void soft_maximum(const task *t, int64_t i, float largest[SIDE], float total[SIDE]) {
    const __m512 factor = _mm512_set1_ps(t->scale * LOG2E);
    __m512 most[2], sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    most[0] = most[1] = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j <= i; j++) {
        float *square = t->scores + j * SIDE * SIDE;
        dots(t, t->keys, j, t->turned, i, square);
        for (int key = 0; key < SIDE; key++)
            for (int e = 0; e < 2; e++)
                most[e] = _mm512_mask_max_ps(most[e], seen(i == j, key, 16 * e), most[e],
                                             _mm512_loadu_ps(square + key * SIDE + 16 * e));
    }
    for (int e = 0; e < 2; e++) most[e] = _mm512_mul_ps(most[e], factor);
    for (int64_t key = 0; key < (i + 1) * SIDE; key += 2)
        for (int e = 0; e < 2; e++) {
            __m512 p[2];
            for (int n = 0; n < 2; n++) {
                const __m512 x = _mm512_loadu_ps(t->scores + (key + n) * SIDE + 16 * e);
                const __mmask16 counts = seen(key >= i * SIDE, (int)(key + n - i * SIDE), 16 * e);
                p[n] = _mm512_maskz_mov_ps(counts, power_of_2(_mm512_fmsub_ps(x, factor, most[e])));
                sum[e] = _mm512_add_ps(sum[e], p[n]);
            }
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]);
            _mm512_storeu_si512(t->p_pairs + key / 2 * SIDE + 16 * e, interleave(both));
        }
    for (int e = 0; e < 2; e++) {
        _mm512_storeu_ps(largest + 16 * e, most[e]);
        _mm512_storeu_ps(total + 16 * e, sum[e]);
    }
}

/* O and L of one head of queries */
static void attend(const task *t, int64_t head, bf16 *out, float *logs) {
    for (int64_t i = 0; i < t->squares; i++) {
        float largest[SIDE], total[SIDE], inverse[SIDE], sums[SIDE * SIDE];
        soft_maximum(t, i, largest, total);
        const int64_t queries = t->length - i * SIDE < SIDE ? t->length - i * SIDE : SIDE;
        float *to = logs + (t->batch * t->heads + head) * t->tokens + t->first + i * SIDE;
        for (int64_t q = 0; q < SIDE; q++) inverse[q] = 1.0f / total[q];
        for (int64_t q = 0; q < queries; q++) to[q] = largest[q] / LOG2E + logf(total[q]);
        for (int64_t c = 0; c < t->size; c += SIDE) {
            multiply(t->transposed + c * SIDE / 2, 2 * SIDE, 2 * SIDE * t->size, t->p_pairs, 4 * SIDE, 64 * SIDE, i + 1,
                     sums, 4 * SIDE, 1);
            for (int e = 0; e < SIDE; e += 16)
                write_queries(sums + e, SIDE, SIDE, inverse + e, queries - e,
                              out + place(t, i * SIDE + e, t->heads, head) + c, t->heads * t->size);
        }
    }
}

/* out: (tokens, heads, size) and logs: (heads, tokens) = L, of each sequence (batch, first token, length). of: the
 * strides of q, k and v. work: work_bytes for each thread. */
static void attention_bf16(const bf16 *q, const bf16 *k, const bf16 *v, const strides *of, const int64_t *sequences,
                           int64_t count, int64_t tokens, int64_t heads, int64_t groups, int64_t size, float scale,
                           char *work, int64_t work_bytes, bf16 *out, float *logs, const team *team) {
    task t = {.tokens = tokens, .heads = heads, .size = size, .scale = scale};
    begin_products();
    const int64_t key_heads = heads / groups;
    for (int64_t piece; (piece = take_piece(team)) < count * key_heads;) {
        const int64_t s = piece / key_heads, g = piece % key_heads;
        begin(&t, sequences + 3 * s, work + team->thread * work_bytes, 0);
        copy_rows(&t, v, of[2], g, t.plain);
        transpose_rows(&t, t.plain);
        copy_rows(&t, k, of[1], g, t.keys);
        for (int64_t head = g * groups; head < (g + 1) * groups; head++) {
            copy_rows(&t, q, of[0], head, t.plain);
            turn(t.plain, t.squares, SIDE, size / 2, t.turned);
            attend(&t, head, out, logs);
        }
    }
    end_products();
}

/* P and dS of keys j and queries i, for A, and the latter in pairs of keys, for B */
static void score_gradients(const task *t, int64_t j, int64_t i, uint32_t ds_pairs[SIDE / 2 * SIDE]) {
    const __m512 factor = _mm512_set1_ps(t->scale * LOG2E), scale = _mm512_set1_ps(t->scale);
    float scores[SIDE * SIDE], of_p[SIDE * SIDE];
    dots(t, t->keys, j, t->turned, i, scores);
    dots(t, t->values, j, t->grad_turned, i, of_p);
    for (int key = 0; key < SIDE; key += 2) {
        __m512 p[2][2], ds[2][2];
        for (int n = 0; n < 2; n++)
            for (int e = 0; e < 2; e++) {
                const int64_t at = (key + n) * SIDE + 16 * e, query = i * SIDE + 16 * e;
                const __m512 logs = _mm512_loadu_ps(t->logs + query), inner = _mm512_loadu_ps(t->inner + query);
                const __m512 y = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + at), factor, logs));
                p[n][e] = _mm512_maskz_mov_ps(seen(i == j, key + n, 16 * e), y);
                ds[n][e] = _mm512_mul_ps(p[n][e], _mm512_sub_ps(_mm512_loadu_ps(of_p + at), inner));
                ds[n][e] = _mm512_mul_ps(ds[n][e], scale);
            }
        for (int n = 0; n < 2; n++) {
            const int64_t at = (i * SIDE + key + n) * SIDE;
            _mm512_storeu_si512(t->p + at, (__m512i)_mm512_cvtne2ps_pbh(p[n][1], p[n][0]));
            _mm512_storeu_si512(t->ds + at, (__m512i)_mm512_cvtne2ps_pbh(ds[n][1], ds[n][0]));
        }
        for (int e = 0; e < 2; e++) {
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(ds[1][e], ds[0][e]);
            _mm512_storeu_si512(ds_pairs + key / 2 * SIDE + 16 * e, interleave(both));
        }
    }
}

/* What one head of queries adds to sum_k and sum_v, or begins them with; its sum_q */
static void differentiate(const task *t, int first) {
    const int64_t size = t->size;
    for (int64_t j = 0; j < t->squares; j++) {
        for (int64_t i = j; i < t->squares; i++) {
            uint32_t ds_pairs[SIDE / 2 * SIDE];
            score_gradients(t, j, i, ds_pairs);
            for (int64_t c = 0; c < size; c += SIDE)
                multiply(t->transposed + (j * size + c) * SIDE / 2, 2 * SIDE, 0, ds_pairs, 4 * SIDE, 0, 1,
                         t->sum_q + (i * size + c) * SIDE, 4 * SIDE, j == 0);
        }
        const int64_t from = j * SIDE * SIDE, left = t->squares - j;
        for (int64_t c = 0; c < size; c += SIDE) {
            const int64_t of_pairs = j * SIDE / 2 * size + c, to = j * SIDE * size + c;
            multiply(t->p + from, 2 * SIDE, 2 * SIDE * SIDE, t->grad_pairs + of_pairs, 4 * size, 64 * size, left,
                     t->sum_v + to, 4 * size, first);
            multiply(t->ds + from, 2 * SIDE, 2 * SIDE * SIDE, t->pairs + of_pairs, 4 * size, 64 * size, left,
                     t->sum_k + to, 4 * size, first);
        }
    }
}

/* The gradients of q, k and v, all (tokens, heads, size), from that of `out`, which `attention` made with `logs`. of:
 * the strides of q, k, v and of the gradient. */
static void attention_backward_bf16(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *grad, const strides *of,
                                    const int64_t *sequences, int64_t count, int64_t tokens, int64_t heads,
                                    int64_t groups, int64_t size, float scale, char *work, int64_t work_bytes,
                                    const bf16 *out, const float *logs, bf16 *grad_q, bf16 *grad_k, bf16 *grad_v,
                                    const team *team) {
    task t = {.tokens = tokens, .heads = heads, .size = size, .scale = scale};
    begin_products();
    const int64_t key_heads = heads / groups;
    for (int64_t piece; (piece = take_piece(team)) < count * key_heads;) {
        const int64_t s = piece / key_heads, g = piece % key_heads;
        begin(&t, sequences + 3 * s, work + team->thread * work_bytes, 1);
        copy_rows(&t, v, of[2], g, t.values);
        copy_rows(&t, k, of[1], g, t.keys);
        transpose_rows(&t, t.keys);
        for (int64_t head = g * groups; head < (g + 1) * groups; head++) {
            copy_rows(&t, q, of[0], head, t.plain);
            turn(t.plain, t.squares, SIDE, size / 2, t.turned);
            pair_rows(t.plain, t.padded, size, t.pairs);
            copy_rows(&t, grad, of[3], head, t.plain);
            turn(t.plain, t.squares, SIDE, size / 2, t.grad_turned);
            pair_rows(t.plain, t.padded, size, t.grad_pairs);
            for (int64_t row = 0; row < t.padded; row++) t.inner[row] = 0, t.logs[row] = INFINITY; /* P = 0 */
            for (int64_t row = 0; row < t.length; row++) {
                const bf16 *y = out + place(&t, row, heads, head), *dy = t.plain + row * size;
                float sum = 0;
                #pragma omp simd reduction(+ : sum)
                for (int64_t c = 0; c < size; c++) sum += from_bf16(y[c]) * from_bf16(dy[c]);
                t.inner[row] = sum;
                t.logs[row] = LOG2E * logs[(t.batch * heads + head) * tokens + t.first + row];
            }
            differentiate(&t, head == g * groups);
            for (int64_t row = 0; row < t.length; row += 16)
                write_queries(t.sum_q + row / SIDE * SIDE * size + row % SIDE, SIDE, size, NULL, t.length - row,
                              grad_q + place(&t, row, heads, head), heads * size);
        }
        for (int64_t row = 0; row < t.length; row++) {
            const int64_t to = place(&t, row, key_heads, g);
            for (int64_t c = 0; c < size; c++) {
                grad_k[to + c] = to_bf16(t.sum_k[row * size + c]);
                grad_v[to + c] = to_bf16(t.sum_v[row * size + c]);
            }
        }
    }
    end_products();
}
