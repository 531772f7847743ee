/* The one unit that is never compiled for newer instructions: which tiers of the kernels this CPU and its operating
 * system offer, and the threads that kernels run on.
 *
 * rows.c is compiled once for each tier, with the tier's flags. TIERS, as in `TIER(baseline) TIER(avx2)`, lists those
 * that are in this library, the lowest first.
 */

#include "team.h"

#include <stddef.h>
#include <string.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(__x86_64__)

#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { EAX, EBX, ECX, EDX };

/* Whether CPUID's answer has these bits. Leaf 7 has parts, and says in part 0 which is the last. */
static int has(unsigned leaf, unsigned part, int answer, unsigned bits) {
    unsigned found[4] = {0};
    if (part && (!__get_cpuid_count(leaf, 0, found, found + 1, found + 2, found + 3) || found[EAX] < part)) return 0;
    if (!__get_cpuid_count(leaf, part, found, found + 1, found + 2, found + 3)) return 0;
    return (found[answer] & bits) == bits;
}

/* Whether the operating system saves these registers when it switches threads: the bits of XCR0. */
static int saves(uint32_t bits) {
    uint32_t low, high;
    if (!has(1, 0, ECX, 1u << 27)) return 0; /* OSXSAVE */
    __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0)); /* XGETBV */
    return (low & bits) == bits;
}

/* SSSE3, SSE4, POPCNT */
static int offers_baseline(void) { return has(1, 0, ECX, 1u << 9 | 1u << 19 | 1u << 20 | 1u << 23); }
static int offers_avx2(void) {
    return offers_baseline() && saves(0x6) && has(1, 0, ECX, 1u << 12 | 1u << 28) && has(7, 0, EBX, 1u << 5); /* FMA */
}
static int offers_avxvnni(void) { return offers_avx2() && has(7, 1, EAX, 1u << 4); }
static int offers_avx512vnni(void) { /* F, DQ, BW, VL; VNNI */
    return offers_avx2() && saves(0xe6) && has(7, 0, EBX, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) &&
           has(7, 0, ECX, 1u << 11);
}
static int offers_avx512(void) { return offers_avx512vnni() && has(7, 1, EAX, 1u << 5); } /* BF16 */
static int offers_amx(void) { /* BF16, TILE, INT8, and the system's permission, for which it has to be asked */
#ifdef __linux__
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* arch_prctl(2) */
    return offers_avx512() && saves(3u << 17) && has(7, 0, EDX, 1u << 22 | 1u << 24 | 1u << 25) &&
           !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
#else
    return 0;
#endif
}

#elif defined(__aarch64__)

#if defined(__linux__)
#include <sys/auxv.h>
static int has(int word, unsigned long bits) { return (getauxval(word) & bits) == bits; }
static int offers_dotprod(void) { return has(16, 1ul << 20); }                   /* AT_HWCAP: ASIMDDP */
static int offers_i8mm(void) { return offers_dotprod() && has(26, 1ul << 13); } /* AT_HWCAP2: I8MM */
#elif defined(__APPLE__)
#include <sys/sysctl.h>
static int has(const char *feature) {
    int found = 0;
    size_t bytes = sizeof found;
    return !sysctlbyname(feature, &found, &bytes, NULL, 0) && found;
}
static int offers_dotprod(void) { return has("hw.optional.arm.FEAT_DotProd"); }
static int offers_i8mm(void) { return offers_dotprod() && has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(_WIN32)
__declspec(dllimport) int __stdcall IsProcessorFeaturePresent(unsigned); /* windows.h has macros of our names */
static int offers_dotprod(void) { return IsProcessorFeaturePresent(43); }
static int offers_i8mm(void) { return offers_dotprod() && IsProcessorFeaturePresent(66); }
#else
static int offers_dotprod(void) { return 0; }
static int offers_i8mm(void) { return 0; }
#endif
static int offers_neon(void) { return 1; }

#else
static int offers_baseline(void) { return 1; }
#endif

#define TIER(tier) extern const entry celora_##tier[];
TIERS
#undef TIER

static const struct tier {
    const char *name;
    const entry *kernels;
    int (*offered)(void);
} tiers[] = {
#define TIER(tier) {#tier, celora_##tier, offers_##tier},
    TIERS
#undef TIER
};

/* The tier's name and whether it is offered here; NULL past the last one. */
EXPORT const char *celora_tier(int number, int *offered) {
    if (number < 0 || (size_t)number >= sizeof tiers / sizeof *tiers) return NULL;
    *offered = tiers[number].offered();
    return tiers[number].name;
}

/* A kernel of a tier; NULL where there is none of this name. */
EXPORT kernel *celora_kernel(int tier, const char *name) {
    for (const entry *at = tiers[tier].kernels; at->name; at++)
        if (!strcmp(at->name, name)) return at->run;
    return NULL;
}

/* The OpenMP runtime that torch has loaded: GNU's interface, which LLVM's and Intel's have, too, except on Windows, where
 * it is Intel's own. All NULL: threads that Python brings. */
typedef void microtask(int32_t *, int32_t *, void *);
static struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    void (*barrier)(void);
    void (*fork)(void *, int32_t, microtask *, ...);
    void (*push_threads)(void *, int32_t, int32_t);
    int32_t (*number)(void *);
    void (*meet)(void *, int32_t);
    int (*thread)(void), (*threads)(void);
} runtime;

static struct {
    int32_t reserved, flags, more[2];
    const char *source;
} place = {0, 2, {0, 0}, ";kernels;kernels;0;0;;"}; /* what Intel's interface wants to know of its caller */

/* functions: as they stand in `runtime`, NULL for those that it lacks. */
EXPORT void celora_use_runtime(void *const functions[8]) { memcpy(&runtime, functions, sizeof runtime); }

#ifdef _WIN32
__declspec(dllimport) int __stdcall SwitchToThread(void);
#define let_others_run SwitchToThread
#else
#include <sched.h>
#define let_others_run sched_yield
#endif

void celora_meet(const team *team) {
    if (team->threads == 1) return;
    if (runtime.parallel) runtime.barrier();
    else if (runtime.fork) runtime.meet(&place, runtime.number(&place));
    else {
        const int64_t come = __atomic_add_fetch(&team->shared->met, 1, __ATOMIC_ACQ_REL);
        const int64_t all = (come + team->threads - 1) / team->threads * team->threads; /* at the end of this meeting */
        while (__atomic_load_n(&team->shared->met, __ATOMIC_ACQUIRE) < all) let_others_run();
    }
}

typedef struct {
    kernel *run;
    const slot *from;
    shared shared;
    int64_t result;
} call;

static void run_part(void *data) {
    call *call = data;
    const team team = {runtime.thread(), runtime.threads(), &call->shared};
    const int64_t result = call->run(call->from, &team);
    if (!team.thread) call->result = result;
}

static void run_task(int32_t *number, int32_t *bound, void *data) {
    (void)number, (void)bound;
    run_part(data);
}

/* Run a kernel on so many threads, or fewer where the runtime gives fewer. Returns what its first thread returns. */
EXPORT int64_t celora_run(kernel *run, const slot *from, int threads) {
    call call = {run, from, {0}, 0};
    if (threads > 1 && runtime.parallel) runtime.parallel(run_part, &call, (unsigned)threads, 0);
    else if (threads > 1 && runtime.fork) {
        runtime.push_threads(&place, runtime.number(&place), threads);
        runtime.fork(&place, 1, run_task, &call);
    } else {
        const team alone = {0, 1, &call.shared};
        call.result = run(from, &alone);
    }
    return call.result;
}

/* Run the part of one thread, of `threads` that are called at the same time with the same `shared`, zero at first. The
 * call of the first thread lets the others begin, and returns after them. */
EXPORT int64_t celora_run_part(kernel *run, const slot *from, shared *shared, int thread, int threads) {
    const team team = {thread, threads, shared};
    int64_t begun = 1, result;
    if (!thread) __atomic_store_n(&shared->begun, begun, __ATOMIC_RELEASE);
    while (!(begun = __atomic_load_n(&shared->begun, __ATOMIC_ACQUIRE))) let_others_run();
    if (begun < 0) return 0;
    result = run(from, &team);
    if (thread) __atomic_fetch_add(&shared->ended, 1, __ATOMIC_RELEASE);
    else
        while (__atomic_load_n(&shared->ended, __ATOMIC_ACQUIRE) < threads - 1) let_others_run();
    return result;
}
