// Work in phases, each a number of items that threads take from a counter. A phase is over when its
// items are done, not when its threads arrive: any number of threads, however late, gives the result.
#pragma once
#include <stdatomic.h>
#include <stdint.h>

// An item may set how many items a later phase has.
typedef struct {
    void (*work)(void *job, int64_t item);
    void *job;
    int64_t items;
    _Atomic int64_t next, done;
} Phase;

void qmoe_run_phases(Phase *phases, int count, int64_t threads);
