#include "job.h"

#include <stdlib.h>
#include <string.h>

static int64_t expert_of(const Call *call, const Stack *stack, int64_t assignment) {
    int64_t e = call->ids ? call->ids[assignment] : call->only;
    return e >= 0 && e < stack->experts ? e : -1;
}

// Tiles of an expert's rows, as even as they can be.
static void cut(Job *job, int64_t expert, int64_t slot, int64_t rows) {
    int64_t count = (rows + TILE - 1) / TILE;
    job->first_tile[job->active++] = job->tiles;
    for (int64_t i = 0; i < count; i++) {
        int64_t start = rows * i / count, stop = rows * (i + 1) / count;
        job->tile[job->tiles++] = (Tile){expert, slot + start, stop - start};
    }
}

// A counting sort: stable, so a token's contributions are always added in the same order.
static void sort(Job *job, const Stack *stack, int64_t *ends) {
    const Call *call = job->call;
    for (int64_t s = 0; s < job->assignments; s++) {
        int64_t e = expert_of(call, stack, s);
        if (e >= 0) ends[e]++;
    }
    for (int64_t e = 0; e < stack->experts; e++) {
        int64_t rows = ends[e];
        if (rows) cut(job, e, job->used, rows);
        ends[e] = job->used;
        job->used += rows;
    }
    job->first_tile[job->active] = job->tiles;
    for (int64_t s = 0; s < job->assignments; s++) {
        int64_t e = expert_of(call, stack, s);
        job->slot[s] = e < 0 ? -1 : ends[e]++;
        if (e < 0) continue;
        job->assignment[job->slot[s]] = s;
        job->token[job->slot[s]] = s / call->choices;
        if (call->gates) job->gate[job->slot[s]] = call->gates[s];
    }
}

// Rounded up so that every buffer starts at a cache line.
static void *allocate(int64_t bytes) { return aligned_alloc(64, (size_t)(bytes + 64) & ~(size_t)63); }

// Codes, scales and sums, or in exact mode values, of `used` rows.
static int64_t packed_bytes(const Job *job, const Stack *stack) {
    return job->used * steps_of(stack) * (job->call->exact ? 4 * STEP : STEP + 8);
}

static int64_t chunk(int64_t blocks, int64_t experts, int64_t threads) {
    // Few enough to balance, long enough to stream.
    int64_t size = blocks * experts / (8 * threads);
    return size < 1 ? 1 : size > 8 ? 8 : size;
}

int qmoe_begin(Job *job, int tier, const Call *call) {
    const Stack *any = call->first.buffer ? &call->first : &call->second;
    int64_t S = call->tokens * call->choices, most = S < any->experts ? S : any->experts;
    int64_t threads = call->threads < 1 ? 1 : call->threads;
    *job = (Job){.call = call, .tier = qmoe_tiers[tier], .assignments = S};
    int64_t *ends = calloc((size_t)any->experts + 1, sizeof *ends);
    job->slot = allocate(8 * S);
    job->assignment = allocate(8 * S);
    job->token = allocate(8 * S);
    job->gate = allocate(4 * S);
    job->tile = allocate((S / TILE + most + 1) * (int64_t)sizeof(Tile));
    job->first_tile = allocate(8 * (most + 1));
    int failed = !ends || !job->slot || !job->assignment || !job->token || !job->gate || !job->tile ||
                 !job->first_tile;
    if (!failed) sort(job, any, ends);
    free(ends);
    if (failed) return 1;
    const Stack *first = &call->first, *second = &call->second;
    if (first->buffer) {
        failed |= !(job->in = allocate(packed_bytes(job, first)));
        job->first_chunk = chunk(blocks_of(first), job->active, threads);
    }
    if (second->buffer) {
        failed |= !(job->between = allocate(packed_bytes(job, second)));
        failed |= !(job->sum = allocate(4 * call->tokens * ROWS * blocks_of(second)));
        job->second_chunk = chunk(blocks_of(second), 1, threads);
    }
    if (first->buffer && second->buffer) failed |= !(job->mid = allocate(4 * job->used * second->k));
    job->grain_in = 1 + call->tokens / (16 * threads);
    job->grain_mid = 1 + job->used / (16 * threads);
    return failed;
}

void qmoe_end(Job *job) {
    void *all[] = {job->slot, job->assignment, job->token, job->gate, job->tile, job->first_tile, job->in, job->between, job->mid, job->sum};
    for (unsigned i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}
