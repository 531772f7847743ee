/* Compares the kernels of another CPU with formulas in double precision, in an emulator: other_cpu LIBRARY TIER ...
 *
 * For each tier that the library offers, it tries odd sizes and both dtypes: 8-bit products for `G W` and `x W^T`, with
 * all rows and with some, the passes over rows, and attention. Products of two tiers must have the same bits
 * where they quantise rows alike. The library must offer every TIER that is named.
 */

#include <dlfcn.h>
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

/* round(x[k] / scale) of a row times fold, and the scale */
static double quantise(const void *x, int64_t row, int64_t columns, const float *fold, double *q) {
    const int paired = (int)ASK("paired", N(0)); /* then the scale is that of two neighbours' magnitudes together */
    double most = 0;
    for (int64_t i = 0; i < columns; i++) {
        q[i] = (float)get(x, row * columns + i) * (fold ? fold[i] : 1.0f);
        most = fmax(most, fabs(q[i]) + (paired && i % 2 ? fabs(q[i - 1]) : 0));
    }
    for (int64_t i = 0; i < columns; i++) q[i] = nearbyint(q[i] * 127 / most);
    return most / 127;
}

enum { TOKENS = 25 };

/* How far `out`, (tokens, columns), is from q w, where w[i, j] is already a whole number times its scale. */
static void compare(const char *what, const void *x, int64_t depth, const double *w, int64_t columns, const float *fold,
                    const int64_t *index, int64_t kept, const void *out) {
    double error = 0, size = 0, *q = malloc(sizeof *q * (size_t)depth);
    for (int64_t k = 0; k < kept; k++) {
        const int64_t t = index ? index[k] : k;
        const double scale = quantise(x, t, depth, fold, q);
        for (int64_t j = 0; j < columns; j++) {
            double sum = 0;
            for (int64_t i = 0; i < depth; i++) sum += q[i] * w[i * columns + j];
            error += pow(get(out, t * columns + j) - scale * sum, 2), size += pow(scale * sum, 2);
        }
    }
    check(what, sqrt(error), sqrt(size), bf16 ? 6e-3 : 3e-3);
    free(q);
}

/* Returns a sum over the bits of all products. */
static uint64_t products(int64_t rows, int64_t columns, int64_t kept) {
    int64_t index[TOKENS];
    int32_t position[TOKENS], starts[TOKENS];
    float scales[TOKENS], *scale = calloc((size_t)(rows + columns), 4), *inverse = calloc((size_t)(rows + columns), 4);
    void *g = drawn(TOKENS * rows), *x = drawn(TOKENS * columns), *w = drawn(rows * columns);
    void *out = calloc((size_t)(TOKENS * (rows + columns)), 4), *y = calloc((size_t)(TOKENS * rows), 4);
    void *packed = malloc((size_t)((rows + 128) * (columns + 128)));
    double *dense = malloc(sizeof *dense * (size_t)(rows * columns)), *turned = malloc(sizeof *dense * (size_t)(rows * columns));
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
    CALL("gathered_product", P(g), N(TOKENS), N(rows), N(rows), P(index), P(position), N(kept), P(NULL), P(NULL),
         P(packed), N(0), P(scale), N(columns), P(scratch), P(scales), P(starts), P(out), N(1));
    compare("G W", g, rows, dense, columns, NULL, index, kept, out);
    for (int64_t i = 0; i < TOKENS * columns * (bf16 ? 2 : 4); i++) bits = bits * 31 + ((uint8_t *)out)[i];
    free(scratch);

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
    compare("x W^T", x, columns, turned, rows, NULL, NULL, TOKENS, y);
    for (int64_t i = 0; i < TOKENS * rows * (bf16 ? 2 : 4); i++) bits = bits * 31 + ((uint8_t *)y)[i];
    free(scratch);
    scratch = malloc((size_t)ASK("scratch_bytes", N(TOKENS), N(rows), N(1), N(1)));
    for (int64_t j = 0; j < columns; j++) inverse[j] = 1;
    CALL("gathered_product", P(g), N(TOKENS), N(rows), N(rows), P(index), P(position), N(kept), P(NULL), P(scale),
         P(packed), N(columns), P(inverse), N(columns), P(scratch), P(scales), P(starts), P(out), N(1));
    compare("G W, turned", g, rows, dense, columns, scale, index, kept, out);
    for (int64_t i = 0; i < TOKENS * columns * (bf16 ? 2 : 4); i++) bits = bits * 31 + ((uint8_t *)out)[i];
    free(scratch), free(scale), free(inverse), free(g), free(x), free(w), free(out), free(y), free(packed), free(dense);
    free(turned);
    return bits;
}

static void passes(int64_t columns) {
    void *x = drawn(TOKENS * columns), *g = drawn(TOKENS * columns), *w = drawn(columns), *out = drawn(TOKENS * columns);
    float squared[TOKENS], inverse[TOKENS], logs[TOKENS];
    int64_t target[TOKENS];
    double error[4] = {0}, size[4] = {0};
    for (int64_t t = 0; t < TOKENS; t++) target[t] = t % columns;
    CALL("squared_row_norms", P(x), N(TOKENS), N(columns), N(columns), P(squared));
    CALL("rms_norm", P(x), N(TOKENS), N(columns), P(w), D(1), D(1e-6), N(0), P(out), P(inverse));
    for (int64_t t = 0; t < TOKENS; t++) {
        double sum = 0;
        for (int64_t i = 0; i < columns; i++) sum += pow(get(x, t * columns + i), 2);
        error[0] = fmax(error[0], fabs(squared[t] - sum)), size[0] = fmax(size[0], sum);
        for (int64_t i = 0; i < columns; i++) {
            const double y = (1 + get(w, i)) * get(x, t * columns + i) / sqrt(sum / (double)columns + 1e-6);
            error[1] = fmax(error[1], fabs(get(out, t * columns + i) - y)), size[1] = fmax(size[1], fabs(y));
        }
    }
    CALL("gated", P(x), P(g), N(TOKENS), N(columns), P(out));
    for (int64_t i = 0; i < TOKENS * columns; i++) {
        const double y = get(x, i) / (1 + exp(-get(x, i))) * get(g, i);
        error[2] = fmax(error[2], fabs(get(out, i) - y)), size[2] = fmax(size[2], fabs(y));
    }
    memcpy(out, x, (size_t)(TOKENS * columns) * (bf16 ? 2 : 4));
    CALL("softmax_rows", P(out), N(TOKENS), N(columns), P(target), D(1.3), D(0), P(logs), P(NULL), P(NULL), N(1));
    for (int64_t t = 0; t < TOKENS; t++) {
        double sum = 0;
        for (int64_t i = 0; i < columns; i++) sum += exp(1.3 * get(x, t * columns + i));
        error[3] = fmax(error[3], fabs(logs[t] - 1.3 * get(x, t * columns + target[t]) + log(sum))), size[3] = 1;
        for (int64_t i = 0; i < columns; i++) {
            const double y = 1.3 * ((i == target[t]) - exp(1.3 * get(x, t * columns + i)) / sum);
            error[3] = fmax(error[3], fabs(get(out, t * columns + i) - y));
        }
    }
    const char *const names[] = {"squared_row_norms", "rms_norm", "gated", "softmax_rows"};
    for (int i = 0; i < 4; i++) check(names[i], error[i], size[i], bf16 && i ? 1e-2 : 1e-5);
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

int main(int count, char **given) {
    void *library = dlopen(count > 1 ? given[1] : "", RTLD_NOW);
    if (!library) return printf("%s\n", dlerror()), 2;
    *(void **)&tier_of = dlsym(library, "celora_tier");
    *(void **)&find = dlsym(library, "celora_kernel");
    *(void **)&run = dlsym(library, "celora_run");
    static const int64_t sizes[][2] = {{1, 1}, {5, 31}, {16, 32}, {67, 100}, {33, 64}, {128, 57}};
    static const int64_t some[] = {1, 5, 9, 11, 12, 25};
    int offered, wanted = 2;
    uint64_t first[2] = {0}; /* of tiers that quantise rows by themselves, and by pairs */
    for (number = 0; tier_of(number, &offered); number++) {
        if (!offered) continue;
        const char *name = tier_of(number, &offered);
        const int dots = ASK("panel_columns", N(0)) > 0;
        uint64_t bits = 0;
        state = 1;
        for (bf16 = 0; bf16 < 2; bf16++) {
            for (int i = 0; i < 6; i++) passes(sizes[i][1] + 1);
            for (int64_t size = 32; size <= 96; size += 32) attends(1 + size % 64, size), attends(70, size);
            for (int i = 0; dots && i < 6; i++)
                for (int k = 0; k < 6; k++) bits = bits * 31 + products(sizes[i][0], sizes[i][1], some[k]);
        }
        if (dots) {
            uint64_t *others = first + ASK("paired", N(0));
            if (*others && bits != *others) failed = 1, printf("tier %s has other bits\n", name);
            *others = bits;
        }
        printf("%s%s: tried\n", name, dots ? ", with 8-bit products" : "");
        if (wanted < count && !strcmp(given[wanted], name)) wanted++;
    }
    if (wanted < count) failed = 1, printf("tier %s is not offered\n", given[wanted]);
    return failed;
}
