// Threads: those of the OpenMP runtime that torch has loaded, so that there is one set of threads and
// not two; threads of our own, started for the call, where there is none; none in a forked child,
// whose OpenMP threads stayed in the parent.
#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include "qmoe_cpu.h"

enum { SPINS = 2000, MOST = 256 };

typedef struct {
    Phase *phases;
    int count;
} Work;

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);
static _Atomic(Parallel *) openmp;
static atomic_int forked;
static pthread_once_t watching = PTHREAD_ONCE_INIT;

static void in_child(void) { atomic_store(&forked, 1); }
static void watch_forks(void) { pthread_atfork(0, 0, in_child); }

void qmoe_use_openmp(void *gomp_parallel) {
    pthread_once(&watching, watch_forks);
    atomic_store(&openmp, (Parallel *)gomp_parallel);
}

static void wait_for(Phase *phase) {
    for (int spins = 0; atomic_load_explicit(&phase->done, memory_order_acquire) < phase->items; spins++) {
        if (spins > SPINS) sched_yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
}

static void run(void *argument) {
    Work *work = argument;
    for (Phase *phase = work->phases; phase < work->phases + work->count; phase++) {
        int64_t item;
        while ((item = atomic_fetch_add_explicit(&phase->next, 1, memory_order_relaxed)) < phase->items) {
            phase->work(phase->job, item);
            atomic_fetch_add_explicit(&phase->done, 1, memory_order_release);
        }
        wait_for(phase);
    }
}

static void *run_thread(void *argument) {
    run(argument);
    return 0;
}

void qmoe_run_phases(Phase *phases, int count, int64_t threads) {
    Work work = {phases, count};
    Parallel *parallel = atomic_load(&openmp);
    int64_t most = 1;
    for (int p = 0; p < count; p++) most = phases[p].items > most ? phases[p].items : most;
    // All threads or one: a team of another size would end threads that the next call starts again.
    threads = most == 1 ? 1 : threads < MOST ? threads : MOST;
    if (threads <= 1 || (parallel && atomic_load(&forked))) {
        run(&work);
    } else if (parallel) {
        parallel(run, &work, (unsigned)threads, 0);
    } else {
        pthread_t started[MOST];
        int64_t n = 0;
        while (n < threads - 1 && !pthread_create(&started[n], 0, run_thread, &work)) n++;
        run(&work);
        for (int64_t i = 0; i < n; i++) pthread_join(started[i], 0);
    }
}
