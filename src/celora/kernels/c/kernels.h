/* What Python calls, at the end of a tier's unit: a line a kernel, with its slots in the order of its own arguments, as
 * library.py packs them.
 */

#define P(i) (from[i].p)
#define N(i) (from[i].n)
#define I(i) ((int)from[i].n)
#define D(i) (from[i].d)
#define F(i) ((float)from[i].d)

#define ROWS(KERNEL)                                                                         \
    KERNEL(squared_row_norms, P(0), N(1), N(2), N(3), P(4))                                  \
    KERNEL(quantise_rows, P(0), P(1), N(2), N(3), N(4), F(5), P(6), P(7))                    \
    KERNEL(scatter_rows, P(0), P(1), N(2), N(3), P(4), P(5), I(6))                           \
    KERNEL(scatter_sums, P(0), P(1), N(2), N(3), P(4), P(5), P(6), I(7))                     \
    KERNEL(softmax_rows, P(0), N(1), N(2), P(3), F(4), F(5), P(6), P(7), P(8), I(9))         \
    KERNEL(column_maxima, P(0), N(1), N(2), N(3), P(4))                                      \
    KERNEL(quantise_columns, P(0), N(1), N(2), N(3), P(4), P(5))                             \
    KERNEL(rms_norm, P(0), N(1), N(2), P(3), F(4), F(5), I(6), P(7), P(8))                   \
    KERNEL(rms_norm_backward, P(0), P(1), N(2), N(3), P(4), F(5), P(6), P(7))                \
    KERNEL(gated, P(0), P(1), N(2), N(3), P(4))                                              \
    KERNEL(gated_backward, P(0), P(1), P(2), N(3), N(4), P(5), P(6))                         \
    KERNEL(rotate, P(0), N(1), N(2), N(3), P(4), P(5), N(6), I(7), P(8))

#ifdef LANES
#define DOT(KERNEL)                                                                                                \
    KERNEL(pack_columns, P(0), N(1), N(2), N(3), P(4), P(5))                                                       \
    KERNEL(pack_rows, P(0), N(1), N(2), N(3), P(4), P(5))                                                          \
    KERNEL(gathered_product, P(0), N(1), N(2), N(3), P(4), P(5), N(6), P(7), P(8), N(9), P(10), N(11), P(12), P(13), \
           P(14), P(15), I(16))                                                                                    \
    KERNEL(critical_product, P(0), N(1), N(2), N(3), N(4), D(5), P(6), P(7), N(8), P(9), N(10), P(11), P(12))      \
    KERNEL(quantise_input, P(0), N(1), N(2), N(3), P(4), P(5), P(6), P(7))                                         \
    KERNEL(quantised_product, P(0), P(1), P(2), N(3), N(4), P(5), P(6), P(7), N(8), P(9))
#else
#define DOT(KERNEL)
#endif

#define ATTENTION(KERNEL)                                                                                         \
    KERNEL(attention, P(0), P(1), P(2), P(3), P(4), N(5), N(6), N(7), N(8), N(9), F(10), P(11), N(12), P(13), P(14)) \
    KERNEL(attention_backward, P(0), P(1), P(2), P(3), P(4), P(5), N(6), N(7), N(8), N(9), N(10), F(11), P(12),   \
           N(13), P(14), P(15), P(16), P(17), P(18))

#ifdef LOW_RANK_PRODUCTS
#define LOW_RANK(KERNEL)                                                                                          \
    KERNEL(skinny_product, P(0), N(1), N(2), N(3), P(4), N(5), N(6), N(7), F(8), I(9), P(10), N(11), P(12))       \
    KERNEL(transposed_product, P(0), N(1), N(2), N(3), P(4), I(5), N(6), N(7), P(8), P(9))
#else
#define LOW_RANK(KERNEL)
#endif

/* Numbers that Python asks for; they need no team. */
#ifdef LANES
#define NUMBERS(NUMBER)                                                \
    NUMBER(panel_columns, PANEL)                                       \
    NUMBER(depth_step, DEEP)                                           \
    NUMBER(together, TOGETHER)                                         \
    NUMBER(offset, OFFSET)                                             \
    NUMBER(paired, PAIRED)                                             \
    NUMBER(row_stride, row_stride(N(0)))                               \
    NUMBER(quantised_bytes, quantised_bytes(N(0), N(1)))               \
    NUMBER(scratch_bytes, scratch_bytes(N(0), N(1), N(2), I(3)))
#else
#define NUMBERS(NUMBER) NUMBER(panel_columns, 0)
#endif

#define CALL(name, does)                                              \
    static int64_t call_##name(const slot *from, const team *team) { \
        (void)from, (void)team;                                       \
        does;                                                         \
    }
#define NUMBER(name, value) CALL(name, return value)
#define KERNEL_BF16(name, ...) CALL(name##_bf16, name##_bf16(__VA_ARGS__, team); return 0)
#define KERNEL(name, ...)                                         \
    CALL(name##_f32, name##_f32(__VA_ARGS__, team); return 0)    \
    KERNEL_BF16(name, __VA_ARGS__)

NUMBER(choose_rows, choose_rows(P(0), N(1), N(2), D(3), N(4), P(5), P(6)))
NUMBER(attention_work, attention_work(N(0), N(1), I(2)))
NUMBERS(NUMBER)
ROWS(KERNEL)
DOT(KERNEL)
ATTENTION(KERNEL)
LOW_RANK(KERNEL_BF16)

#define NAMED(name, ...) {#name, call_##name},
#define NAMED_BF16(name, ...) {#name "_bf16", call_##name##_bf16},
#define NAMED_BOTH(name, ...) {#name "_f32", call_##name##_f32}, NAMED_BF16(name)
#define TABLE_OF(tier) celora_##tier
#define TABLE(tier) TABLE_OF(tier)

const entry TABLE(TIER)[] = {
    {"choose_rows", call_choose_rows},
    {"attention_work", call_attention_work},
    NUMBERS(NAMED) ROWS(NAMED_BOTH) DOT(NAMED_BOTH) ATTENTION(NAMED_BOTH)
    LOW_RANK(NAMED_BF16){NULL, NULL},
};
