/* The attention of attention.c in float32 arithmetic. The file includes itself once for each dtype, as rows.c does.
 *
 * A matrix is needed as it is and, for B of its transpose, `turned`: columns x rows of each square. The first matrix of
 * a product may lie transposed, as its numbers are taken one by one.
 */

#ifndef TYPE

#if defined(__AVX512F__)
#define FLOATS 16
#elif defined(__AVX__)
#define FLOATS 8
#else
#define FLOATS 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define AT_ONCE 8 /* rows: with two vectors of columns, half of the 32 registers */
#else
#define AT_ONCE 4
#endif

typedef float vector __attribute__((vector_size(4 * FLOATS), aligned(4), may_alias));

/* c: (SIDE, columns) = (first ? 0 : c) + A B. A: (SIDE, depth), its rows and columns a_row and a_column apart. */
static void product(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t depth, int64_t columns,
                    float *c, int64_t c_row, int first) {
    for (int64_t column = 0; column < columns; column += 2 * FLOATS)
        for (int64_t row = 0; row < SIDE; row += AT_ONCE) {
            const float *at = a + row * a_row, *with = b + column;
            float *to = c + row * c_row + column;
            vector sum[AT_ONCE][2] = {{{0}}};
            if (!first)
                for (int i = 0; i < AT_ONCE; i++)
                    for (int e = 0; e < 2; e++) sum[i][e] = *(const vector *)(to + i * c_row + e * FLOATS);
            for (int64_t k = 0; k < depth; k++, at += a_column, with += columns) {
                const vector left = *(const vector *)with, right = *(const vector *)(with + FLOATS);
                for (int i = 0; i < AT_ONCE; i++) {
                    sum[i][0] += at[i * a_row] * left;
                    sum[i][1] += at[i * a_row] * right;
                }
            }
            for (int i = 0; i < AT_ONCE; i++)
                for (int e = 0; e < 2; e++) *(vector *)(to + i * c_row + e * FLOATS) = sum[i][e];
        }
}

/* What one thread is at: a sequence, and where it works. */
typedef struct {
    int64_t batch, first, length, padded, squares; /* of the sequence: its row, first token, tokens, up to SIDE */
    int64_t tokens, heads, size;                   /* in a row of the batch; of queries; numbers in a head */
    float scale;
    float *keys, *values, *queries, *grads; /* (padded, size) */
    float *turned, *grads_turned;           /* (squares, size, SIDE), of the queries and their gradients */
    float *sum_q, *sum_k, *sum_v;           /* (padded, size); the first also the outputs of one square */
    float *p, *ds;                          /* (padded, SIDE), keys by queries; in backward (SIDE, padded) */
    float *logs, *inner;                    /* (padded): L, D */
} float_task;

static float *take_floats(float *work, int64_t *used, int64_t numbers) {
    float *taken = work ? work + *used : NULL;
    *used += numbers;
    return taken;
}

/* Lay out the work space of a task. Returns its bytes. */
static int64_t lay_out_floats(float_task *t, float *work, int backward) {
    const int64_t numbers = t->padded * t->size, strip = t->padded * SIDE;
    int64_t used = 0;
    float **all[] = {&t->keys, &t->values, &t->queries, &t->turned, &t->sum_q, &t->grads, &t->grads_turned, &t->sum_k,
                     &t->sum_v};
    for (int n = 0; n < (backward ? 9 : 5); n++) *all[n] = take_floats(work, &used, numbers);
    t->p = take_floats(work, &used, strip);
    t->ds = take_floats(work, &used, backward ? strip : 0);
    t->logs = take_floats(work, &used, t->padded);
    t->inner = take_floats(work, &used, t->padded);
    return used * (int64_t)sizeof(float);
}

/* Bytes that each thread needs to work in, for sequences of at most so many tokens. */
static int64_t attention_work(int64_t longest, int64_t size, int backward) {
    float_task t = {.padded = (longest + SIDE - 1) / SIDE * SIDE, .size = size};
    int64_t bytes = lay_out_floats(&t, NULL, backward);
    #ifdef IN_PAIRS
    const int64_t in_pairs = pairs_work(longest, size, backward);
    bytes = in_pairs > bytes ? in_pairs : bytes;
    #endif
    return bytes;
}

static void begin_floats(float_task *t, const int64_t sequence[3], char *work, int backward) {
    t->batch = sequence[0], t->first = sequence[1], t->length = sequence[2];
    t->squares = (t->length + SIDE - 1) / SIDE, t->padded = t->squares * SIDE;
    lay_out_floats(t, (float *)work, backward);
}

/* Where the sequence's token has its numbers in a tensor of (tokens, heads, size) */
static inline int64_t place_of(const float_task *t, int64_t token, int64_t heads, int64_t head) {
    return ((t->batch * t->tokens + t->first + token) * heads + head) * t->size;
}

static void turn_floats(const float_task *t, const float *rows, float *to) {
    for (int64_t i = 0; i < t->padded; i++)
        for (int64_t c = 0; c < t->size; c++) to[(i / SIDE * t->size + c) * SIDE + i % SIDE] = rows[i * t->size + c];
}

/* square: (SIDE, SIDE) = rows of square j by the queries, or their gradients, of square i */
static inline void float_dots(const float_task *t, const float *rows, int64_t j, const float *turned, int64_t i,
                              float *square, int64_t step) {
    product(rows + j * SIDE * t->size, t->size, 1, turned + i * SIDE * t->size, t->size, SIDE, square, step, 1);
}

/* p = exp(S - largest) of the queries of square i and all keys up to it; the largest, and the sums */
static void float_maximum(const float_task *t, int64_t i, float largest[SIDE], float total[SIDE]) {
    const float scale = t->scale;
    for (int q = 0; q < SIDE; q++) largest[q] = -INFINITY, total[q] = 0;
    for (int64_t j = 0; j <= i; j++) float_dots(t, t->keys, j, t->turned, i, t->p + j * SIDE * SIDE, SIDE);
    for (int64_t key = 0; key < (i + 1) * SIDE; key++) {
        const float *s = t->p + key * SIDE;
        const int from = key < i * SIDE ? 0 : (int)(key - i * SIDE); /* queries before this one do not see the key */
        #pragma omp simd
        for (int q = 0; q < SIDE; q++) largest[q] = q >= from && s[q] > largest[q] ? s[q] : largest[q];
    }
    for (int q = 0; q < SIDE; q++) largest[q] *= scale;
    for (int64_t key = 0; key < (i + 1) * SIDE; key++) {
        float *s = t->p + key * SIDE;
        const int from = key < i * SIDE ? 0 : (int)(key - i * SIDE);
        #pragma omp simd
        for (int q = 0; q < SIDE; q++) {
            const float p = exp_negative(s[q] * scale - largest[q]);
            s[q] = q < from ? 0.0f : p;
            total[q] += s[q];
        }
    }
}

/* P and dS of keys j and queries i */
static void float_score_gradients(const float_task *t, int64_t j, int64_t i) {
    const float scale = t->scale;
    float of_p[SIDE * SIDE];
    float_dots(t, t->keys, j, t->turned, i, t->p + i * SIDE, t->padded);
    float_dots(t, t->values, j, t->grads_turned, i, of_p, SIDE);
    const float *logs = t->logs + i * SIDE, *inner = t->inner + i * SIDE;
    for (int key = 0; key < SIDE; key++) {
        float *p = t->p + key * t->padded + i * SIDE, *ds = t->ds + key * t->padded + i * SIDE;
        const float *of = of_p + key * SIDE;
        const int from = i == j ? key : 0;
        #pragma omp simd
        for (int q = 0; q < SIDE; q++) {
            const float y = exp_negative(p[q] * scale - logs[q]);
            p[q] = q < from ? 0.0f : y;
            ds[q] = q < from ? 0.0f : y * (of[q] - inner[q]) * scale;
        }
    }
}

/* What one head of queries adds to sum_k and sum_v, or begins them with; its sum_q */
static void float_differentiate(const float_task *t, int first) {
    const int64_t size = t->size;
    for (int64_t j = 0; j < t->squares; j++) {
        const int64_t at = j * SIDE * size, left = t->padded - j * SIDE;
        for (int64_t i = j; i < t->squares; i++) {
            float_score_gradients(t, j, i);
            product(t->ds + i * SIDE, 1, t->padded, t->keys + at, SIDE, size, t->sum_q + i * SIDE * size, size, !j);
        }
        product(t->p + j * SIDE, t->padded, 1, t->grads + at, left, size, t->sum_v + at, size, first);
        product(t->ds + j * SIDE, t->padded, 1, t->queries + at, left, size, t->sum_k + at, size, first);
    }
}

#define TYPE float
#define EACH(name) name##_f32
#include "attention_floats.c"
#undef TYPE
#undef EACH

#ifndef IN_PAIRS
#define TYPE bf16
#define EACH(name) name##_bf16
#include "attention_floats.c"
#undef TYPE
#undef EACH
#endif

#else

/* One head's rows of the sequence, and zeros up to `padded` */
static void EACH(float_rows)(const float_task *t, const TYPE *x, strides of, int64_t head, float *to) {
    x += t->batch * of.batch + head * of.head + t->first * of.token;
    for (int64_t row = 0; row < t->length; row++) {
        #pragma omp simd
        for (int64_t c = 0; c < t->size; c++) to[row * t->size + c] = EACH(from)(x[row * of.token + c]);
    }
    memset(to + t->length * t->size, 0, (size_t)((t->padded - t->length) * t->size) * sizeof(float));
}

/* Rows of float32, each times `factor`, to those of one head in a tensor of (tokens, heads, size) */
static inline void EACH(write_row)(const float *from, float factor, int64_t size, TYPE *to) {
    #pragma omp simd
    for (int64_t c = 0; c < size; c++) to[c] = EACH(to)(factor * from[c]);
}

/* O and L of one head of queries */
static void EACH(float_attend)(const float_task *t, int64_t head, TYPE *out, float *logs) {
    for (int64_t i = 0; i < t->squares; i++) {
        float largest[SIDE], total[SIDE];
        float_maximum(t, i, largest, total);
        product(t->p, 1, SIDE, t->values, (i + 1) * SIDE, t->size, t->sum_q, t->size, 1);
        for (int64_t q = 0; q < SIDE && i * SIDE + q < t->length; q++) {
            const int64_t token = i * SIDE + q;
            logs[(t->batch * t->heads + head) * t->tokens + t->first + token] = largest[q] + logf(total[q]);
            EACH(write_row)(t->sum_q + q * t->size, 1 / total[q], t->size, out + place_of(t, token, t->heads, head));
        }
    }
}

/* out: (tokens, heads, size) and logs: (heads, tokens) = L, of each sequence (batch, first token, length). of: the
 * strides of q, k and v. work: work_bytes for each thread. */
static void EACH(attention)(const TYPE *q, const TYPE *k, const TYPE *v, const strides *of, const int64_t *sequences,
                            int64_t count, int64_t tokens, int64_t heads, int64_t groups, int64_t size, float scale,
                            char *work, int64_t work_bytes, TYPE *out, float *logs, const team *team) {
    float_task t = {.tokens = tokens, .heads = heads, .size = size, .scale = scale};
    const int64_t key_heads = heads / groups;
    for (int64_t piece; (piece = take_piece(team)) < count * key_heads;) {
        const int64_t s = piece / key_heads, g = piece % key_heads;
        begin_floats(&t, sequences + 3 * s, work + team->thread * work_bytes, 0);
        EACH(float_rows)(&t, k, of[1], g, t.keys);
        EACH(float_rows)(&t, v, of[2], g, t.values);
        for (int64_t head = g * groups; head < (g + 1) * groups; head++) {
            EACH(float_rows)(&t, q, of[0], head, t.queries);
            turn_floats(&t, t.queries, t.turned);
            EACH(float_attend)(&t, head, out, logs);
        }
    }
}

/* The gradients of q, k and v, all (tokens, heads, size), from that of `out`, which `attention` made with `logs`. of:
 * the strides of q, k, v and of the gradient. */
static void EACH(attention_backward)(const TYPE *q, const TYPE *k, const TYPE *v, const TYPE *grad, const strides *of,
                                     const int64_t *sequences, int64_t count, int64_t tokens, int64_t heads,
                                     int64_t groups, int64_t size, float scale, char *work, int64_t work_bytes,
                                     const TYPE *out, const float *logs, TYPE *grad_q, TYPE *grad_k, TYPE *grad_v,
                                     const team *team) {
    float_task t = {.tokens = tokens, .heads = heads, .size = size, .scale = scale};
    const int64_t key_heads = heads / groups;
    for (int64_t piece; (piece = take_piece(team)) < count * key_heads;) {
        const int64_t s = piece / key_heads, g = piece % key_heads;
        begin_floats(&t, sequences + 3 * s, work + team->thread * work_bytes, 1);
        EACH(float_rows)(&t, k, of[1], g, t.keys);
        EACH(float_rows)(&t, v, of[2], g, t.values);
        for (int64_t head = g * groups; head < (g + 1) * groups; head++) {
            EACH(float_rows)(&t, q, of[0], head, t.queries);
            turn_floats(&t, t.queries, t.turned);
            EACH(float_rows)(&t, grad, of[3], head, t.grads);
            turn_floats(&t, t.grads, t.grads_turned);
            for (int64_t row = t.length; row < t.padded; row++) t.inner[row] = 0, t.logs[row] = INFINITY; /* P = 0 */
            for (int64_t row = 0; row < t.length; row++) {
                const TYPE *y = out + place_of(&t, row, heads, head);
                const float *dy = t.grads + row * size;
                float sum = 0;
                #pragma omp simd reduction(+ : sum)
                for (int64_t c = 0; c < size; c++) sum += EACH(from)(y[c]) * dy[c];
                t.inner[row] = sum;
                t.logs[row] = logs[(t.batch * heads + head) * tokens + t.first + row];
            }
            float_differentiate(&t, head == g * groups);
            for (int64_t row = 0; row < t.length; row++)
                EACH(write_row)(t.sum_q + row * size, 1, size, grad_q + place_of(&t, row, heads, head));
        }
        for (int64_t row = 0; row < t.length; row++) {
            const int64_t to = place_of(&t, row, key_heads, g);
            EACH(write_row)(t.sum_k + row * size, 1, size, grad_k + to);
            EACH(write_row)(t.sum_v + row * size, 1, size, grad_v + to);
        }
    }
}

#endif
