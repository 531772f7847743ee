/* Causal attention of sequences, forward and backward.
 *
 *     S = scale Q K^T,  P = exp(S - L),  O = P V,  L = log sum exp S,
 *     dV = P^T dO,  dS = scale P (dO V^T - D),  D = sum_j dO_j O_j,  dQ = dS K,  dK = dS^T Q.
 *
 * Everything goes by squares of SIDE keys times SIDE queries that lie on or below the diagonal, with keys as rows, so
 * that what belongs to a query (L, D, a sum) is a vector. A thread has one sequence and head of keys at a time.
 */

#define SIDE 32

/* Where a tensor's numbers are: that of a batch, head and token is this far apart from the next one's. */
typedef struct {
    int64_t batch, head, token;
} strides;

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define IN_PAIRS
#include "attention_pairs.c"
#endif
#include "attention_floats.c"
