// The phases of a call on coded matrices: rotate and pack x, first product, rotate and pack what lies between, second
// product and sum. A block of 16 outputs is expanded to 8-bit codes once for all rows of its expert, and multiplied
// like a matrix of 8 bits; the rotations come before and after. As in run.c, the number of threads changes nothing.
#include "trellis_run.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "parallel.h"
#include "trellis_expand.h"

enum { SPAN = 128, BLOCKS = SPAN / ROWS };  // outputs that are rotated together

typedef struct {
    const CodedCall *call;
    const Tier *tier;
    Expand *expand;
    Direct *direct;
    int64_t used, active;
    int64_t *slot_of, *assignment, *expert, *start;  // start [active + 1]: first slot of each active expert
    void *in[2], *between;                           // packed rows
    float *sums[2], *mid_sums;                       // of rotated rows, by slot
    float *mid;                                      // [used, n]
    _Atomic int failed;
} Job;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static size_t width_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }
static int64_t packed_bytes(int64_t slots, const Coded *m) { return slots * (m->wide_k / STEP) * (STEP + 8); }

// The Hadamard matrix of 128, over its root.
static void rotate(float *v) {
    for (int h = 1; h < SPAN; h *= 2)
        for (int i = 0; i < SPAN; i += 2 * h)
            for (int j = i; j < i + h; j++) {
                float a = v[j], b = v[j + h];
                v[j] = a + b;
                v[j + h] = a - b;
            }
    for (int i = 0; i < SPAN; i++) v[i] *= 0.08838834764831845f;
}

// Rows [first, first + rows) of an expert, at most TILE of them, inside the packed rows of all slots.
static Rows rows_at(const Job *job, void *packed, const Coded *m, int64_t slot, int64_t rows) {
    int64_t steps = m->wide_k / STEP, all = job->used * steps, at = slot * steps;
    return (Rows){.codes = (int8_t *)packed + STEP * at, .scales = (float *)((char *)packed + STEP * all) + at,
                  .sums = (int32_t *)((char *)packed + (STEP + 4) * all) + at, .rows = rows, .ready = 1};
}

// The tile of rows that a slot belongs to: tiles of an expert begin at its first slot, TILE apart.
static int64_t tile_of(const Job *job, int64_t slot, int64_t *rows) {
    int64_t low = 0, high = job->active;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (job->start[middle] <= slot) low = middle;
        else high = middle;
    }
    int64_t first = slot - (slot - job->start[low]) % TILE;
    *rows = least(TILE, job->start[low + 1] - first);
    return first;
}

// A row of k values of a type, times suh, rotated and packed for a slot.
static void pack_row(const Job *job, const void *x, int64_t type, int64_t slot, const Coded *m, void *packed, float *sums) {
    float row[SPAN], scale[SPAN];
    const uint16_t *suh = m->suh + job->expert[slot] * m->wide_k;
    int64_t rows, first = tile_of(job, slot, &rows);
    Rows to = rows_at(job, packed, m, first, rows);
    float sum = 0;
    for (int64_t at = 0; at < m->wide_k; at += SPAN) {
        int64_t n = m->k - at < SPAN ? m->k - at : SPAN;
        memset(row, 0, sizeof row);
        job->tier->load(x, type, at, n, row);
        job->tier->load(suh, FLOAT16, at, SPAN, scale);
        for (int i = 0; i < SPAN; i++) row[i] *= scale[i];
        rotate(row);
        for (int i = 0; i < SPAN; i++) sum += row[i];
        Rows part = to;
        part.codes += STEP * rows * (at / STEP);
        part.scales += rows * (at / STEP);
        part.sums += rows * (at / STEP);
        job->tier->pack(row, FLOAT32, SPAN, SPAN, 128, &part, slot - first);
    }
    sums[slot] = sum;
}

static void pack_in(void *argument, int64_t slot) {
    const Job *job = argument;
    const CodedCall *call = job->call;
    int64_t token = job->assignment[slot] / call->choices;
    const Coded *m = call->first;
    const char *x = (const char *)call->x + (size_t)(token * m->k) * width_of(call->type);
    for (int64_t p = 0; p < call->parts; p++) pack_row(job, x, call->type, slot, m + p, job->in[p], job->sums[p]);
}

static void pack_between(void *argument, int64_t slot) {
    const Job *job = argument;
    const Coded *m = &job->call->second;
    pack_row(job, job->mid + slot * m->k, FLOAT32, slot, m, job->between, job->mid_sums);
}

// Blocks [block, block + count) of 16 outputs of an expert to 8-bit codes.
static void expand(const Job *job, const Coded *m, int64_t expert, int64_t block, int64_t count, uint8_t *codes) {
    int64_t deep = m->wide_k / ROWS, size = 8 * m->twice;
    const uint16_t *tiles = m->trellis + (expert * (m->wide_n / ROWS) + block) * deep * size;
    (m->fast ? job->expand : qmoe_expand_scalar)(tiles, size, count * deep, m->twice, m->table, codes);
}

// y [8, rows, 16]: outputs [at, at + 128) of the rows of an expert, from slot `first` on: rotated back, with scales
// and bias. codes: the blocks of these outputs, expanded, or room for two of them if all rows of the expert are here
// (alone). row_bias: where the biases of the matrix begin.
static void multiply(const Job *job, const Coded *m, uint8_t *codes, int alone, int64_t expert, int64_t at, int64_t first,
                     int64_t rows, void *packed, const float *sums, int64_t row_bias, float *y) {
    static const float ones[ROWS] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const uint16_t *svh = m->svh + expert * m->wide_n + at;
    const Rows x = rows_at(job, packed, m, first, rows);
    float scale[SPAN], step = m->step, offset = m->offset;
    const int direct = alone && rows <= SOME_ROWS && m->fast;
    job->tier->load(svh, FLOAT16, 0, SPAN, scale);
    for (int b = 0; direct && b < BLOCKS; b++) {
        int64_t deep = m->wide_k / ROWS, size = 8 * m->twice, block = expert * (m->wide_n / ROWS) + at / ROWS + b;
        job->direct(m->trellis + block * deep * size, size, m->twice, m->wide_k / STEP, &x, y + ROWS * rows * b);
    }
    // A code is a quarter of a byte sum, rounded: an eighth of a step less on average.
    if (direct) step = m->step / 4, offset = m->offset + m->step / 8;
    for (int b = 0; !direct && b < BLOCKS; b += 2) {
        Block block[2];
        // For one tile of rows the codes are used as soon as they are there, from the nearest cache.
        uint8_t *here = codes + (alone ? 0 : ROWS * m->wide_k * b);
        if (alone) expand(job, m, expert, at / ROWS + b, 2, here);
        for (int i = 0; i < 2; i++)
            block[i] = (Block){(const uint8_t *)ones, 0, here + ROWS * m->wide_k * i, 1, m->wide_k / STEP, FLOAT32, 8, 128};
        job->tier->product(block, 2, &x, y + ROWS * rows * b);
    }
    for (int64_t r = 0; r < rows; r++) {
        float v[SPAN];
        for (int b = 0; b < BLOCKS; b++) memcpy(v + ROWS * b, y + ROWS * (rows * b + r), 4 * ROWS);
        float more = offset * sums[first + r];
        for (int i = 0; i < SPAN; i++) v[i] = v[i] * step + more;
        rotate(v);
        for (int i = 0; i < SPAN; i++) v[i] *= scale[i];
        if (m->bias)
            for (int64_t i = 0; i < SPAN && at + i < m->n; i++) v[i] += m->bias[row_bias + at + i];
        for (int b = 0; b < BLOCKS; b++) memcpy(y + ROWS * (rows * b + r), v + ROWS * b, 4 * ROWS);
    }
}

// Memory that a thread keeps from item to item and from call to call: new pages cost more than what they serve.
typedef struct {
    size_t bytes;
    char data[] __attribute__((aligned(64)));
} Kept;

static pthread_key_t kept;
static pthread_once_t keeping = PTHREAD_ONCE_INIT;

static void keep(void) { pthread_key_create(&kept, free); }

static char *room(size_t bytes) {
    pthread_once(&keeping, keep);
    Kept *memory = pthread_getspecific(kept);
    if (memory && memory->bytes >= bytes) return memory->data;
    free(memory);
    memory = aligned_alloc(64, (sizeof *memory + bytes + 63) & ~(size_t)63);
    if (memory) memory->bytes = bytes;
    pthread_setspecific(kept, memory);
    return memory ? memory->data : 0;
}

static void first_product(void *argument, int64_t item) {
    Job *job = argument;
    const CodedCall *call = job->call;
    const Coded *m = call->first;
    int64_t spans = m->wide_n / SPAN, all = 0, active = item / spans, at = item % spans * SPAN;
    int64_t stop = job->start[active + 1], expert = job->expert[job->start[active]];
    int alone = stop - job->start[active] <= TILE;
    size_t deep = alone ? 0 : (size_t)(SPAN * m->wide_k);
    float *y = (float *)room(2 * sizeof(float) * SPAN * TILE + 2 * (size_t)(SPAN * m->wide_k));
    uint8_t *codes = (uint8_t *)(y + 2 * SPAN * TILE);
    if (!y) {
        job->failed = 1;
        return;
    }
    for (int64_t p = 0; p < call->parts; p++) all += m[p].n;
    for (int64_t p = 0; p < call->parts && !alone; p++) expand(job, m + p, expert, at / ROWS, BLOCKS, codes + (size_t)p * deep);
    for (int64_t first = job->start[active]; first < stop; first += TILE) {
        int64_t rows = least(TILE, stop - first), row_bias = expert * all;
        for (int64_t p = 0; p < call->parts; p++, row_bias += m->n)
            multiply(job, m + p, codes + (size_t)p * deep, alone, expert, at, first, rows, job->in[p], job->sums[p], row_bias,
                     y + SPAN * TILE * p);
        for (int b = 0; b < BLOCKS; b++) {
            int64_t column = at + ROWS * b, n = least(ROWS, m->n - column);
            float *gate = y + ROWS * rows * b, *up = gate + SPAN * TILE;
            if (n <= 0) break;
            if (call->has_second) {
                job->tier->activate(call->activation, call->alpha, call->limit, gate, up, rows, job->mid + first * m->n + column,
                                    m->n, n);
                continue;
            }
            for (int64_t p = 0; p < call->parts; p++)
                for (int64_t r = 0; r < rows; r++) {
                    size_t to = (size_t)(job->assignment[first + r] * all + p * m->n + column) * width_of(call->type);
                    job->tier->store(gate + SPAN * TILE * p + ROWS * r, (char *)call->out + to, call->type, n);
                }
        }
    }
}

static void second_product(void *argument, int64_t item) {
    Job *job = argument;
    const CodedCall *call = job->call;
    const Coded *m = &call->second;
    int64_t at = item * SPAN, width = least(SPAN, m->n - at);
    size_t sums = sizeof(float) * (size_t)(call->tokens * SPAN);
    float *y = (float *)room(sizeof(float) * SPAN * TILE + (size_t)(SPAN * m->wide_k) + sums), *sum = y + SPAN * TILE;
    if (!y) {
        job->failed = 1;
        return;
    }
    uint8_t *codes = (uint8_t *)sum + sums;
    memset(sum, 0, sums);
    for (int64_t active = 0; active < job->active; active++) {
        int64_t stop = job->start[active + 1], expert = job->expert[job->start[active]];
        int alone = stop - job->start[active] <= TILE;
        if (!alone) expand(job, m, expert, at / ROWS, BLOCKS, codes);
        for (int64_t first = job->start[active]; first < stop; first += TILE) {
            int64_t rows = least(TILE, stop - first), token[TILE];
            float gate[TILE];
            for (int64_t r = 0; r < rows; r++) {
                token[r] = job->assignment[first + r] / call->choices;
                gate[r] = call->gates[job->assignment[first + r]];
            }
            multiply(job, m, codes, alone, expert, at, first, rows, job->between, job->mid_sums, expert * m->n, y);
            for (int b = 0; b < BLOCKS; b++) job->tier->add(sum + ROWS * b, SPAN, token, gate, y + ROWS * rows * b, rows);
        }
    }
    for (int64_t t = 0; t < call->tokens; t++)
        job->tier->store(sum + t * SPAN, (char *)call->out + (size_t)(t * m->n + at) * width_of(call->type), call->type, width);
}

// Slots: assignments sorted by expert, in their order. Ids outside of [0, E) have none.
static void sort(Job *job) {
    const CodedCall *call = job->call;
    int64_t all = call->tokens * call->choices;
    for (int64_t e = 0; e < call->experts; e++) {
        int64_t before = job->used;
        if (call->ids) {
            for (int64_t s = job->slot_of[e]; s >= 0; s = job->slot_of[call->experts + s]) {
                job->assignment[job->used] = s;
                job->expert[job->used++] = e;
            }
        } else if (e == call->only) {
            for (int64_t s = 0; s < all; s++) {
                job->assignment[job->used] = s;
                job->expert[job->used++] = e;
            }
        }
        if (job->used > before) job->start[job->active++] = before;
    }
    job->start[job->active] = job->used;
}

// Of every expert the first of its assignments, and of every assignment the next one of its expert; -1 behind the last.
static void link_up(Job *job) {
    const CodedCall *call = job->call;
    for (int64_t e = 0; e < call->experts; e++) job->slot_of[e] = -1;
    if (!call->ids) return;
    for (int64_t s = call->tokens * call->choices - 1; s >= 0; s--) {
        int64_t e = call->ids[s];
        if (e < 0 || e >= call->experts) continue;
        job->slot_of[call->experts + s] = job->slot_of[e];
        job->slot_of[e] = s;
    }
}

// What the tier has for mul1.
static void choose(int tier, Expand **expand, Direct **direct) {
    *expand = qmoe_expand_scalar, *direct = qmoe_direct_scalar;
#if defined(__x86_64__)
    const char *name = qmoe_tiers[tier]->name;
    if (!strcmp(name, "avx512vnni") && __builtin_cpu_supports("avx512vbmi")) *expand = qmoe_expand_avx512, *direct = qmoe_direct_avx512;
    else if (!strncmp(name, "avx", 3)) *expand = qmoe_expand_avx2, *direct = qmoe_direct_avx2;
#else
    (void)tier;
#endif
}

int qmoe_run_coded(int tier, const CodedCall *call) {
    int64_t S = call->tokens * call->choices, E = call->experts;
    Job job = {.call = call, .tier = qmoe_tiers[tier]};
    choose(tier, &job.expand, &job.direct);
    const struct {
        void *to;
        int64_t bytes;
    } parts[] = {
        {&job.slot_of, 8 * (E + S)},
        {&job.assignment, 8 * S},
        {&job.expert, 8 * S},
        {&job.start, 8 * (least(S, E) + 1)},
        {&job.in[0], packed_bytes(S, call->first)},
        {&job.in[1], call->parts > 1 ? packed_bytes(S, call->first + 1) : 0},
        {&job.between, call->has_second ? packed_bytes(S, &call->second) : 0},
        {&job.sums[0], 4 * S},
        {&job.sums[1], 4 * S},
        {&job.mid_sums, 4 * S},
        {&job.mid, call->has_second ? 4 * S * call->first->n : 0},
    };
    int64_t bytes = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) bytes += (parts[i].bytes + 63) & ~(int64_t)63;
    char *memory = aligned_alloc(64, (size_t)bytes + 64), *at = memory;
    if (!memory) return 1;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        memcpy(parts[i].to, &at, sizeof at);
        at += (parts[i].bytes + 63) & ~(int64_t)63;
    }
    link_up(&job);
    sort(&job);
    if (!call->has_second && job.used < S) {
        int64_t n = 0;
        for (int64_t p = 0; p < call->parts; p++) n += call->first[p].n;
        memset(call->out, 0, (size_t)(S * n) * width_of(call->type));
    }
    Phase phases[4] = {{pack_in, &job, .items = job.used},
                       {first_product, &job, .items = job.active * (call->first->wide_n / SPAN)},
                       {pack_between, &job, .items = job.used},
                       {second_product, &job, .items = call->second.wide_n / SPAN}};
    qmoe_run_phases(phases, call->has_second ? 4 : 2, call->threads);
    free(memory);
    return job.failed;
}
