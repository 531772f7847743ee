/* How a kernel is called, and how threads share its work.
 *
 * Every thread of a team runs the whole kernel, on its own share of each loop. Arguments are slots of eight bytes, which
 * Python packs (library.py). The threads are those of the OpenMP runtime that torch has loaded, or Python's (tiers.c).
 */

#ifndef TEAM_H
#define TEAM_H

#include <stdint.h>

typedef union {
    void *p;
    int64_t n;
    double d;
} slot;

/* Of all threads together: how many pieces of a loop have been taken, and how often a thread came to a meeting. Of those
 * that Python brings: whether the first has begun (1), or never will (-1), and how many others have ended. */
typedef struct {
    int64_t taken, met, begun, ended;
} shared;

typedef struct {
    int64_t thread, threads;
    shared *shared;
} team;

typedef int64_t kernel(const slot *from, const team *team);

/* A kernel's name as Python calls it; a table of them ends with NULL. */
typedef struct {
    const char *name;
    kernel *run;
} entry;

/* Wait until all threads have come here (tiers.c). */
void celora_meet(const team *team);

/* Where the share of a thread begins; that of the next one ends it. */
static inline int64_t share_of(int64_t count, int64_t thread, int64_t threads) {
    const int64_t left = count % threads;
    return count / threads * thread + (thread < left ? thread : left);
}

/* for (i of this thread's share of 0, ..., count - 1) */
#define FOR_SHARE(i, count)                                                                              \
    for (int64_t i = share_of(count, team->thread, team->threads),                                       \
                 i##_end = share_of(count, team->thread + 1, team->threads);                             \
         i < i##_end; i++)

/* The next piece that no thread has taken. */
static inline int64_t take_piece(const team *team) { return __atomic_fetch_add(&team->shared->taken, 1, __ATOMIC_RELAXED); }

#endif
