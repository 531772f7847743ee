/* Compares the kernels of another CPU with formulas in double precision, in an emulator: other_cpu LIBRARY TIER ...
 *
 * For each tier that the library offers, it tries odd sizes and both dtypes: 8-bit products for `G W` and `x W^T`, with
 * all rows and with some, the passes over rows, and attention. Products have the same bits on every CPU and in
 * every tier that quantises rows alike. The library must offer every TIER that is named.
 */

#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef union {
    const void *p;
    int64_t n;
    double d;
} slot;
static const char *(*tier_of)(int, int *);
static void *(*find)(int, const char *);
static int64_t (*run)(void *, const slot *, int);
static int number, bf16, failed;

#define P(x) ((slot){.p = (x)})
#define N(x) ((slot){.n = (x)})
#define D(x) ((slot){.d = (x)})
#define CALL(name, ...) call(name, (const slot[]){__VA_ARGS__})
#define ASK(name, ...) run(find(number, name), (const slot[]){__VA_ARGS__}, 1)

static void call(const char *name, const slot *slots) {
    char full[64];
    snprintf(full, sizeof full, "%s_%s", name, bf16 ? "bf16" : "f32");
    run(find(number, full), slots, 1);
}

/* An array in the dtype that is tested. */
static void put(void *array, int64_t i, double value) {
    float x = (float)value;
    uint32_t bits;
    if (!bf16) {
        ((float *)array)[i] = x;
        return;
    }
    memcpy(&bits, &x, 4);
    ((uint16_t *)array)[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static double get(const void *array, int64_t i) {
    if (!bf16) return ((const float *)array)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)array)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static uint64_t state = 1;
static double draw(void) { /* about normal */
    double sum = -6;
    for (int i = 0; i < 12; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        sum += (double)(state >> 11) / 9007199254740992.0;
    }
    return sum;
}
static void *drawn(int64_t count) {
    void *array = calloc((size_t)count + 1, 4);
    for (int64_t i = 0; i < count; i++) put(array, i, draw());
    return array;
}

static void check(const char *what, double error, double size, double most) {
    if (error <= most * size) return;
    printf("%s: error %g of %g, tier %s, %s\n", what, error, size, tier_of(number, &(int){0}), bf16 ? "bf16" : "f32");
    failed = 1;
}

/* round(x[k] / scale) of a row times fold, and the scale. The kernels round once, after an exact product. */
static double quantise(const void *x, int64_t row, int64_t columns, const float *fold, double *q) {
    const int paired = (int)ASK("paired", N(0)); /* then the scale is that of two neighbours' magnitudes together */
    double most = 0;
    for (int64_t i = 0; i < columns; i++) {
        q[i] = (float)get(x, row * columns + i) * (fold ? fold[i] : 1.0f);
        most = fmax(most, fabs(q[i]) + (paired && i % 2 ? fabs(q[i - 1]) : 0));
    }
    const float inverse = 127.0f / (float)most;
    for (int64_t i = 0; i < columns; i++) q[i] = nearbyint(q[i] * inverse);
    return most / 127;
}

enum { TOKENS = 25 };

/* How far `out`, (tokens, columns), is from q w + bias, where w[i, j] is already a whole number times its scale. */
static void compare(const char *what, const void *x, int64_t depth, const double *w, int64_t columns, const float *fold,
                    const float *bias, const int64_t *index, int64_t kept, const void *out) {
    double error = 0, size = 0, *q = malloc(sizeof *q * (size_t)depth);
    for (int64_t k = 0; k < kept; k++) {
        const int64_t t = index ? index[k] : k;
        const double scale = quantise(x, t, depth, fold, q);
        for (int64_t j = 0; j < columns; j++) {
            double sum = 0;
            for (int64_t i = 0; i < depth; i++) sum += q[i] * w[i * columns + j];
            sum = scale * sum + (bias ? bias[j] : 0);
            error += pow(get(out, t * columns + j) - sum, 2), size += sum * sum;
        }
    }
    check(what, sqrt(error), sqrt(size), bf16 ? 4e-3 : 1e-6); /* half a bfloat16's step is 2^-8 */
    free(q);
}

/* The `kept` rows with the largest norms, chosen and multiplied in one call: as gathered_product multiplies them. */
static void critical(const void *g, int64_t rows, const void *packed, const float *scale, int64_t columns, int64_t kept,
                     void *out) {
    const int64_t scratch = ASK("scratch_bytes", N(TOKENS), N(rows), N(1), N(0));
    const size_t bytes = (size_t)(TOKENS * columns) * (bf16 ? 2 : 4);
    int64_t *work = malloc(8 + TOKENS * (8 + 4 * 4) + (size_t)scratch), *index = work + 1;
    float *squared = (float *)(index + TOKENS), *scales = squared + TOKENS;
    int32_t *starts = (int32_t *)(scales + TOKENS), *position = starts + TOKENS;
    void *gathered = calloc(1, bytes);
    CALL("critical_product", P(g), N(TOKENS), N(rows), N(rows), N(kept), D(1), P(NULL), P(packed), N(0), P(scale),
         N(columns), P(work), P(out));
    double least = INFINITY, most = 0;
    for (int t = 0; t < TOKENS; t++) {
        double sum = 0;
        for (int64_t i = 0; i < rows; i++) sum += pow(get(g, t * rows + i), 2);
        if (position[t] < 0) most = fmax(most, sum);
        else least = fmin(least, sum);
    }
    check("rows of critical_product", most - least, most, 1e-5);
    check("their number", fabs((double)(*work - kept)), 1, 0);
    CALL("gathered_product", P(g), N(TOKENS), N(rows), N(rows), P(index), P(position), N(*work), P(NULL),
         P(packed), N(0), P(scale), N(columns), P(position + TOKENS), P(scales), P(starts), P(gathered), N(1));
    check("bits of critical_product", memcmp(out, gathered, bytes) != 0, 1, 0);
    free(work), free(gathered);
}

/* Returns a sum over the bits of all products. */
static uint64_t products(int64_t rows, int64_t columns, int64_t kept) {
    int64_t index[TOKENS];
    int32_t position[TOKENS], starts[TOKENS];
    float scales[TOKENS], *scale = calloc((size_t)(rows + columns), 4), *inverse = calloc((size_t)(rows + columns), 4);
    void *g = drawn(TOKENS * rows), *x = drawn(TOKENS * columns), *w = drawn(rows * columns);
    void *out = calloc((size_t)(TOKENS * (rows + columns)), 4), *y = calloc((size_t)(TOKENS * rows), 4);
    void *packed = malloc((size_t)((rows + 128) * (columns + 128)));
    const size_t doubles = sizeof(double) * (size_t)(rows * columns);
    double *dense = malloc(doubles), *turned = malloc(doubles);
    uint64_t bits = 0;
    for (int t = 0; t < TOKENS; t++) position[t] = -1;
    for (int k = 0; k < kept; k++) index[k] = k * TOKENS / kept, position[index[k]] = k;

    /* G W with a scale for each column */
    for (int64_t j = 0; j < columns; j++) {
        float most = 1e-20f;
        for (int64_t i = 0; i < rows; i++) most = fmaxf(most, fabsf((float)get(w, i * columns + j)));
        scale[j] = most / 127, inverse[j] = 1 / scale[j];
        for (int64_t i = 0; i < rows; i++)
            dense[i * columns + j] = nearbyint(get(w, i * columns + j) * inverse[j]) * scale[j];
    }
    CALL("pack_columns", P(w), N(rows), N(columns), N(columns), P(inverse), P(packed));
    void *scratch = malloc((size_t)ASK("scratch_bytes", N(TOKENS), N(rows), N(1), N(0)));
    CALL("gathered_product", P(g), N(TOKENS), N(rows), N(rows), P(index), P(position), N(kept), P(NULL),
         P(packed), N(0), P(scale), N(columns), P(scratch), P(scales), P(starts), P(out), N(1));
    compare("G W", g, rows, dense, columns, NULL, NULL, index, kept, out);
    for (int64_t i = 0; i < TOKENS * columns * (bf16 ? 2 : 4); i++) bits = bits * 31 + ((uint8_t *)out)[i];
    free(scratch);
    critical(g, rows, packed, scale, columns, kept, out);

    /* x W^T and G W from one copy, with a scale for each row */
    for (int64_t i = 0; i < rows; i++) {
        float most = 1e-20f;
        for (int64_t j = 0; j < columns; j++) most = fmaxf(most, fabsf((float)get(w, i * columns + j)));
        scale[i] = most / 127, inverse[i] = 1 / scale[i];
        for (int64_t j = 0; j < columns; j++) {
            dense[i * columns + j] = nearbyint(get(w, i * columns + j) * inverse[i]);
            turned[j * rows + i] = dense[i * columns + j] * scale[i];
        }
    }
    CALL("pack_rows", P(w), N(rows), N(columns), N(columns), P(inverse), P(packed));
    scratch = malloc((size_t)ASK("quantised_bytes", N(TOKENS), N(columns)));
    CALL("quantise_input", P(x), N(TOKENS), N(columns), N(columns), P(NULL), P(scratch), P(scales), P(starts));
    CALL("quantised_product", P(scratch), P(scales), P(starts), N(TOKENS), N(columns), P(packed), P(scale), P(NULL),
         N(rows), P(y));
    compare("x W^T", x, columns, turned, rows, NULL, NULL, NULL, TOKENS, y);
    for (int64_t i = 0; i < TOKENS * rows * (bf16 ? 2 : 4); i++) bits = bits * 31 + ((uint8_t *)y)[i];
    CALL("quantised_product", P(scratch), P(scales), P(starts), N(TOKENS), N(columns), P(packed), P(scale), P(scale),
         N(rows), P(y));
    compare("x W^T + bias", x, columns, turned, rows, NULL, scale, NULL, TOKENS, y);
    free(scratch);
    scratch = malloc((size_t)ASK("scratch_bytes", N(TOKENS), N(rows), N(1), N(1)));
    for (int64_t j = 0; j < columns; j++) inverse[j] = 1;
    CALL("gathered_product", P(g), N(TOKENS), N(rows), N(rows), P(index), P(position), N(kept), P(scale),
         P(packed), N(columns), P(inverse), N(columns), P(scratch), P(scales), P(starts), P(out), N(1));
    compare("G W, turned", g, rows, dense, columns, scale, NULL, index, kept, out);
    for (int64_t i = 0; i < TOKENS * columns * (bf16 ? 2 : 4); i++) bits = bits * 31 + ((uint8_t *)out)[i];
    free(scratch), free(scale), free(inverse), free(g), free(x), free(w), free(out), free(y), free(packed), free(dense);
    free(turned);
    return bits;
}

/* One pass of a kernel over rows: how far it is from its formula, in parts of the largest number. */
typedef struct {
    double error, size;
} distance;
static void meet(distance *so_far, double found, double true_one) {
    so_far->error = fmax(so_far->error, fabs(found - true_one)), so_far->size = fmax(so_far->size, fabs(true_one));
}

static void norms(const void *x, const void *g, const void *w, int64_t columns, void *out) {
    float squared[TOKENS], inverse[TOKENS];
    void *of_x = drawn(TOKENS * columns);
    distance square = {0}, norm = {0}, backward = {0};
    CALL("squared_row_norms", P(x), N(TOKENS), N(columns), N(columns), P(squared));
    CALL("rms_norm", P(x), N(TOKENS), N(columns), P(w), D(1), D(1e-6), N(0), P(out), P(inverse));
    CALL("rms_norm_backward", P(g), P(x), N(TOKENS), N(columns), P(w), D(1), P(inverse), P(of_x));
    for (int64_t t = 0; t < TOKENS; t++) {
        double sum = 0, along = 0;
        for (int64_t i = t * columns; i < (t + 1) * columns; i++) {
            sum += pow(get(x, i), 2), along += (1 + get(w, i % columns)) * get(g, i) * get(x, i);
        }
        const double r = 1 / sqrt(sum / (double)columns + 1e-6);
        meet(&square, squared[t], sum);
        for (int64_t i = t * columns; i < (t + 1) * columns; i++) {
            const double h = 1 + get(w, i % columns);
            meet(&norm, get(out, i), h * get(x, i) * r);
            meet(&backward, get(of_x, i), r * h * get(g, i) - r * r * r * along / (double)columns * get(x, i));
        }
    }
    check("squared_row_norms", square.error, square.size, 1e-5);
    check("rms_norm", norm.error, norm.size, bf16 ? 1e-2 : 1e-5);
    check("rms_norm_backward", backward.error, backward.size, bf16 ? 1e-2 : 1e-5);
    free(of_x);
}

static void gates(const void *x, const void *g, int64_t columns, void *out) {
    void *of_gate = drawn(TOKENS * columns), *of_up = drawn(TOKENS * columns), *grad = drawn(TOKENS * columns);
    distance forward = {0}, gate = {0}, up = {0};
    CALL("gated", P(x), P(g), N(TOKENS), N(columns), P(out));
    CALL("gated_backward", P(grad), P(x), P(g), N(TOKENS), N(columns), P(of_gate), P(of_up));
    for (int64_t i = 0; i < TOKENS * columns; i++) {
        const double a = get(x, i), sigmoid = 1 / (1 + exp(-a)), change = get(grad, i);
        meet(&forward, get(out, i), a * sigmoid * get(g, i));
        meet(&up, get(of_up, i), change * a * sigmoid);
        meet(&gate, get(of_gate, i), change * get(g, i) * sigmoid * (1 + a * (1 - sigmoid)));
    }
    check("gated", forward.error, forward.size, bf16 ? 1e-2 : 1e-5);
    check("gated_backward, gate", gate.error, gate.size, bf16 ? 1e-2 : 1e-5);
    check("gated_backward, up", up.error, up.size, bf16 ? 1e-2 : 1e-5);
    free(of_gate), free(of_up), free(grad);
}

/* Two heads a token; the angles of five tokens come again. */
static void rotations(const void *x, const void *angles, int64_t columns, void *out) {
    enum { HEADS = 2, ANGLES = 5, ROWS = TOKENS / HEADS * HEADS };
    const int64_t half = columns / 2, width = 2 * half;
    const char *sines = (const char *)angles + ANGLES * width * (bf16 ? 2 : 4);
    for (int transposed = 0; transposed < 2; transposed++) {
        distance found = {0};
        CALL("rotate", P(x), N(ROWS / HEADS), N(HEADS), N(width), P(angles), P(sines), N(ANGLES), N(transposed),
             P(out));
        for (int64_t row = 0; row < ROWS; row++)
            for (int64_t i = 0; i < width; i++) {
                const int64_t other = (i + half) % width, at = row / HEADS % ANGLES * width;
                const int64_t of_sine = ANGLES * width + at + (transposed ? other : i);
                const double sine = get(angles, of_sine) * ((i < half) == !transposed ? -1 : 1);
                meet(&found, get(out, row * width + i),
                     get(x, row * width + i) * get(angles, at + i) + get(x, row * width + other) * sine);
            }
        check(transposed ? "rotate back" : "rotate", found.error, found.size, bf16 ? 1e-2 : 1e-5);
    }
}

static void softmax(const void *x, int64_t columns, void *out) {
    float logs[TOKENS];
    int64_t target[TOKENS];
    distance found = {0, 1};
    for (int64_t t = 0; t < TOKENS; t++) target[t] = t % columns;
    memcpy(out, x, (size_t)(TOKENS * columns) * (bf16 ? 2 : 4));
    CALL("softmax_rows", P(out), N(TOKENS), N(columns), P(target), D(1.3), D(0), P(logs), P(NULL), P(NULL), N(1));
    for (int64_t t = 0; t < TOKENS; t++) {
        double sum = 0;
        for (int64_t i = 0; i < columns; i++) sum += exp(1.3 * get(x, t * columns + i));
        found.error = fmax(found.error, fabs(logs[t] - 1.3 * get(x, t * columns + target[t]) + log(sum)));
        for (int64_t i = 0; i < columns; i++) {
            const double y = 1.3 * ((i == target[t]) - exp(1.3 * get(x, t * columns + i)) / sum);
            found.error = fmax(found.error, fabs(get(out, t * columns + i) - y));
        }
    }
    check("softmax_rows", found.error, found.size, bf16 ? 1e-2 : 1e-5);
}

/* The products of an adapter of rank `rank`, in the tiers that have them: 2 x M, x + p M^T and p^T x. */
static void adapters(const void *x, int64_t columns, int64_t rank, void *out) {
    if (!bf16 || !find(number, "skinny_product_bf16")) return;
    void *m = drawn(columns * rank), *p = drawn(TOKENS * rank), *low = drawn(TOKENS * rank);
    float *turned = calloc((size_t)(rank * columns), 4);
    void *scratch = malloc((size_t)(64 * 2 * (columns + rank + 64)));
    distance down = {0}, up = {0}, across = {0};
    memcpy(out, x, (size_t)(TOKENS * columns) * 2);
    CALL("skinny_product", P(x), N(TOKENS), N(columns), N(columns), P(m), N(rank), N(1), N(rank), D(2), N(0), P(low),
         N(rank), P(scratch));
    CALL("skinny_product", P(p), N(TOKENS), N(rank), N(rank), P(m), N(1), N(rank), N(columns), D(1), N(1), P(out),
         N(columns), P(scratch));
    CALL("transposed_product", P(p), N(TOKENS), N(rank), N(rank), P(x), N(0), N(columns), N(columns), P(turned),
         P(scratch));
    for (int64_t r = 0; r < rank; r++)
        for (int64_t t = 0; t < TOKENS; t++) {
            double sum = 0;
            for (int64_t i = 0; i < columns; i++) sum += get(x, t * columns + i) * get(m, i * rank + r);
            meet(&down, get(low, t * rank + r), 2 * sum);
        }
    for (int64_t i = 0; i < columns; i++) {
        for (int64_t t = 0; t < TOKENS; t++) {
            double sum = get(x, t * columns + i);
            for (int64_t r = 0; r < rank; r++) sum += get(p, t * rank + r) * get(m, i * rank + r);
            meet(&up, get(out, t * columns + i), sum);
        }
        for (int64_t r = 0; r < rank; r++) {
            double sum = 0;
            for (int64_t t = 0; t < TOKENS; t++) sum += get(p, t * rank + r) * get(x, t * columns + i);
            meet(&across, turned[r * columns + i], sum);
        }
    }
    check("skinny_product", down.error, down.size, 1e-2);
    check("skinny_product, added", up.error, up.size, 1e-2);
    check("transposed_product", across.error, across.size, 1e-5);
    free(m), free(p), free(low), free(turned), free(scratch);
}

/* Rounding to 8 bits by rows and by columns, and the scales of what is scattered. Every third row gets nothing. */
static void rounding(const void *x, int64_t columns, void *out) {
    float *largest = calloc((size_t)columns, 4), *inverse = calloc((size_t)columns, 4), scale[TOKENS];
    int8_t *of_columns = malloc((size_t)(TOKENS * columns)), *of_rows = malloc((size_t)(TOKENS * columns));
    int32_t position[TOKENS], *sums = calloc((size_t)(TOKENS * columns), 4);
    double off = 0, wrong = 0;
    distance rows = {0}, scattered = {0};
    CALL("column_maxima", P(x), N(TOKENS), N(columns), N(columns), P(largest));
    for (int64_t j = 0; j < columns; j++) {
        double most = 0;
        for (int64_t t = 0; t < TOKENS; t++) most = fmax(most, fabs(get(x, t * columns + j)));
        wrong = fmax(wrong, fabs(most - largest[j])), inverse[j] = 127 / largest[j];
    }
    CALL("quantise_columns", P(x), N(TOKENS), N(columns), N(columns), P(inverse), P(of_columns));
    CALL("quantise_rows", P(x), P(NULL), N(TOKENS), N(columns), N(columns), D(0), P(of_rows), P(scale));
    for (int64_t i = 0; i < TOKENS * columns; i++) {
        off = fmax(off, fabs(of_columns[i] - get(x, i) * inverse[i % columns]));
        off = fmax(off, fabs(of_rows[i] - get(x, i) / scale[i / columns]));
        sums[i] = of_rows[i] * 1000;
    }
    for (int t = 0; t < TOKENS; t++) position[t] = t % 3 ? t / 2 : -1;
    CALL("scatter_rows", P(x), P(position), N(TOKENS), N(columns), P(scale), P(out), N(1));
    for (int64_t i = 0; i < TOKENS * columns; i++) {
        const int64_t k = position[i / columns];
        meet(&rows, get(out, i), k < 0 ? 0 : scale[k] * get(x, k * columns + i % columns));
    }
    CALL("scatter_sums", P(sums), P(position), N(TOKENS), N(columns), P(scale), P(inverse), P(out), N(1));
    for (int64_t i = 0; i < TOKENS * columns; i++) {
        const int64_t k = position[i / columns], j = i % columns;
        meet(&scattered, get(out, i), k < 0 ? 0 : (double)scale[k] * inverse[j] * sums[k * columns + j]);
    }
    check("column_maxima", wrong, 1, 0);
    check("quantise_columns or quantise_rows", off, 0.5, 1.001);
    check("scatter_rows", rows.error, rows.size, bf16 ? 1e-2 : 1e-5);
    check("scatter_sums", scattered.error, scattered.size, bf16 ? 1e-2 : 1e-5);
    free(largest), free(inverse), free(of_columns), free(of_rows), free(sums);
}

static void passes(int64_t columns) {
    void *x = drawn(TOKENS * columns), *g = drawn(TOKENS * columns), *out = drawn(TOKENS * columns);
    void *w = drawn(columns);
    norms(x, g, w, columns, out);
    gates(x, g, columns, out);
    rotations(x, g, columns, out);
    softmax(x, columns, out);
    rounding(x, columns, out);
    adapters(x, columns, 16, out), adapters(x, columns, 5, out);
    free(x), free(g), free(w), free(out);
}

/* Attention of two sequences and two heads, which share their keys, and its gradients. */
static void attends(int64_t longer, int64_t size) {
    enum { HEADS = 2, SEQUENCES = 2, SHORTER = 3 };
    const int64_t tokens = longer + SHORTER, of_head = tokens * size;
    const int64_t strides[] = {0, of_head, size, 0, of_head, size, 0, of_head, size, 0, size, HEADS * size};
    const int64_t sequences[SEQUENCES][3] = {{0, 0, longer}, {0, longer, SHORTER}};
    void *q = drawn(HEADS * of_head), *k = drawn(of_head), *v = drawn(of_head), *grad = drawn(HEADS * of_head);
    void *out = drawn(HEADS * of_head), *dq = drawn(HEADS * of_head), *dk = drawn(of_head), *dv = drawn(of_head);
    float *logs = drawn(HEADS * tokens);
    const int64_t bytes = ASK("attention_work", N(longer), N(size), N(1));
    void *work = malloc((size_t)bytes);
    const double scale = 1 / sqrt((double)size);
    CALL("attention", P(q), P(k), P(v), P(strides), P(sequences), N(SEQUENCES), N(tokens), N(HEADS), N(HEADS), N(size),
         D(scale), P(work), N(bytes), P(out), P(logs));
    CALL("attention_backward", P(q), P(k), P(v), P(grad), P(strides), P(sequences), N(SEQUENCES), N(tokens), N(HEADS),
         N(HEADS), N(size), D(scale), P(work), N(bytes), P(out), P(logs), P(dq), P(dk), P(dv));
    double *p = malloc(sizeof *p * (size_t)tokens), *ds = malloc(sizeof *ds * (size_t)tokens);
    double *keys = calloc((size_t)of_head, sizeof *keys), *values = calloc((size_t)of_head, sizeof *values);
    double error[4] = {0}, sizes[4] = {0};
    for (int64_t head = 0; head < HEADS; head++)
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t from = t < longer ? 0 : longer, row = head * of_head + t * size;
            const int64_t place = (t * HEADS + head) * size; /* in `out` and its gradient */
            double sum = 0, inner = 0;
            for (int64_t j = from; j <= t; j++) {
                double s = ds[j] = 0;
                for (int64_t c = 0; c < size; c++) {
                    s += scale * get(q, row + c) * get(k, j * size + c);
                    ds[j] += get(grad, place + c) * get(v, j * size + c);
                }
                sum += p[j] = exp(s);
            }
            for (int64_t j = from; j <= t; j++) inner += (p[j] /= sum) * ds[j];
            for (int64_t c = 0; c < size; c++) {
                double y = 0, of_q = 0;
                for (int64_t j = from; j <= t; j++) {
                    const double score = scale * p[j] * (ds[j] - inner);
                    y += p[j] * get(v, j * size + c), of_q += score * get(k, j * size + c);
                    keys[j * size + c] += score * get(q, row + c), values[j * size + c] += p[j] * get(grad, place + c);
                }
                error[0] += pow(get(out, place + c) - y, 2), sizes[0] += y * y;
                error[1] += pow(get(dq, place + c) - of_q, 2), sizes[1] += of_q * of_q;
            }
        }
    for (int64_t i = 0; i < of_head; i++) {
        error[2] += pow(get(dk, i) - keys[i], 2), sizes[2] += keys[i] * keys[i];
        error[3] += pow(get(dv, i) - values[i], 2), sizes[3] += values[i] * values[i];
    }
    const char *const names[] = {"attention", "its query's gradient", "its key's gradient", "its value's gradient"};
    for (int i = 0; i < 4; i++) /* D is computed from outputs that are rounded to bfloat16 */
        check(names[i], sqrt(error[i]), sqrt(sizes[i]), bf16 ? 2e-2 : 1e-5);
    free(q), free(k), free(v), free(grad), free(out), free(dq), free(dk), free(dv), free(logs), free(work);
    free(p), free(ds), free(keys), free(values);
}

#ifdef _WIN32
static void *function(const char *library, const char *name) {
    return (void *)GetProcAddress(LoadLibraryA(library), name);
}
#else
static void *function(const char *library, const char *name) {
    void *loaded = dlopen(library, RTLD_NOW);
    return loaded ? dlsym(loaded, name) : NULL;
}
#endif

int main(int count, char **given) {
    setvbuf(stdout, NULL, _IONBF, 0); /* what was found is said before a crash */
    const char *library = count > 1 ? given[1] : "";
    *(void **)&tier_of = function(library, "celora_tier");
    *(void **)&find = function(library, "celora_kernel");
    *(void **)&run = function(library, "celora_run");
    if (!tier_of || !find || !run) return printf("%s is not the kernels' library\n", library), 2;
    static const int64_t sizes[][2] = {{1, 1}, {5, 31}, {16, 32}, {67, 100}, {33, 64}, {128, 57}};
    static const int64_t some[] = {1, 5, 9, 11, 12, 25};
    int offered, wanted = 2;
    /* The bits of all products, on every CPU: where rows are quantised by themselves, and by pairs. */
    static const uint64_t same[] = {0xdb0ccbbe43b7d472, 0x93c36ac55b10babd};
    for (number = 0; tier_of(number, &offered); number++) {
        if (!offered) continue;
        const char *name = tier_of(number, &offered);
        const int dots = ASK("panel_columns", N(0)) > 0;
        uint64_t bits = 0;
        state = 1;
        for (bf16 = 0; bf16 < 2; bf16++)
            for (int i = 0; dots && i < 6; i++)
                for (int k = 0; k < 6; k++) bits = bits * 31 + products(sizes[i][0], sizes[i][1], some[k]);
        for (bf16 = 0; bf16 < 2; bf16++) {
            for (int i = 0; i < 6; i++) passes(sizes[i][1] + 1);
            for (int64_t size = 32; size <= 96; size += 32) attends(1 + size % 64, size), attends(70, size);
        }
        if (dots && bits != same[ASK("paired", N(0))])
            failed = 1, printf("tier %s has other bits, %016llx\n", name, (unsigned long long)bits);
        printf("%s%s: tried\n", name, dots ? ", with 8-bit products" : "");
        if (wanted < count && !strcmp(given[wanted], name)) wanted++;
    }
    if (wanted < count) failed = 1, printf("tier %s is not offered\n", given[wanted]);
    return failed;
}
