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

// The memory of one call is kept for the next one, up to a size: new pages take a twentieth of a call.
typedef struct Memory {
    int64_t bytes;
    char data[] __attribute__((aligned(64)));
} Memory;

enum { KEPT = 1 << 27 };
static _Atomic(Memory *) kept;

static Memory *borrow(int64_t bytes) {
    Memory *memory = atomic_exchange(&kept, (Memory *)0);
    if (memory && memory->bytes >= bytes) return memory;
    free(memory);
    memory = aligned_alloc(64, sizeof *memory + (size_t)bytes);
    if (memory) memory->bytes = bytes;
    return memory;
}

static void give_back(Memory *memory) {
    if (memory && memory->bytes <= KEPT) memory = atomic_exchange(&kept, memory);
    free(memory);
}

// Codes, scales and sums, or in exact mode values, of all assignments; 0 without the product.
static int64_t packed_bytes(const Job *job, const Stack *stack) {
    if (!stack->buffer) return 0;
    return job->assignments * steps_of(stack) * (job->call->exact ? 4 * STEP : STEP + 8);
}

static int64_t chunk(int64_t blocks, int64_t experts, int64_t threads) {
    // Few enough to balance, long enough to stream.
    int64_t size = blocks * experts / (8 * threads);
    return size < 1 ? 1 : size > 8 ? 8 : size;
}

int qmoe_begin(Job *job, int tier, const Call *call) {
    const Stack *first = &call->first, *second = &call->second, *any = first->buffer ? first : second;
    int64_t S = call->tokens * call->choices, most = S < any->experts ? S : any->experts, bytes = 0;
    int64_t threads = call->threads < 1 ? 1 : call->threads, both = first->buffer && second->buffer, *ends;
    *job = (Job){.call = call, .tier = qmoe_tiers[tier], .assignments = S};
    const struct {
        void *to;
        int64_t bytes;
    } parts[] = {
        {&ends, 8 * (any->experts + 1)},
        {&job->slot, 8 * S},
        {&job->assignment, 8 * S},
        {&job->token, 8 * S},
        {&job->gate, 4 * S},
        {&job->tile, (S / TILE + most + 1) * (int64_t)sizeof(Tile)},
        {&job->first_tile, 8 * (most + 1)},
        {&job->in, packed_bytes(job, first)},
        {&job->between, packed_bytes(job, second)},
        {&job->mid, both ? 4 * S * second->k : 0},
        {&job->sum, second->buffer ? 4 * call->tokens * ROWS * blocks_of(second) : 0},
    };
    const size_t count = sizeof parts / sizeof *parts;
    // Rounded up so that every part starts at a cache line.
    for (size_t i = 0; i < count; i++) bytes += (parts[i].bytes + 63) & ~(int64_t)63;
    if (!(job->memory = borrow(bytes))) return 1;
    char *at = job->memory->data;
    for (size_t i = 0; i < count; i++) {
        if (parts[i].bytes) memcpy(parts[i].to, &at, sizeof at);
        at += (parts[i].bytes + 63) & ~(int64_t)63;
    }
    memset(ends, 0, 8 * (size_t)(any->experts + 1));
    sort(job, any, ends);
    if (first->buffer) job->first_chunk = chunk(blocks_of(first), job->active, threads);
    if (second->buffer) job->second_chunk = chunk(blocks_of(second), 1, threads);
    job->grain_in = 1 + call->tokens / (16 * threads);
    job->grain_mid = 1 + job->used / (16 * threads);
    return 0;
}

void qmoe_end(Job *job) { give_back(job->memory); }
