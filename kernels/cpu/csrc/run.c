// The phases of a call: pack x, first product, pack what lies between, second product and sum.
// Outputs belong to one item each and are summed in the order of the experts, so that the number of
// threads changes nothing.
#include <string.h>

#include "job.h"

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The rows of a tile inside the packed rows of all `used` slots.
static Rows rows_of(const Job *job, void *packed, const Stack *stack, const Tile *tile) {
    int64_t steps = steps_of(stack), all = job->used * steps, at = tile->slot * steps;
    Rows rows = {.rows = tile->rows, .ready = stack->offset != 0};
    if (job->call->exact) {
        rows.values = (float *)packed + STEP * at;
    } else {
        rows.codes = (int8_t *)packed + STEP * at;
        rows.scales = (float *)((char *)packed + STEP * all) + at;
        rows.sums = (int32_t *)((char *)packed + (STEP + 4) * all) + at;
    }
    return rows;
}

static const Tile *tile_of(const Job *job, int64_t slot) {
    int64_t low = 0, high = job->tiles;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (job->tile[middle].slot <= slot) low = middle;
        else high = middle;
    }
    return job->tile + low;
}

static void copy_row(const Rows *from, int64_t a, const Rows *to, int64_t b, int64_t steps) {
    for (int64_t j = 0; j < steps; j++, a += from->rows, b += to->rows) {
        if (from->values) {
            memcpy(to->values + STEP * b, from->values + STEP * a, 4 * STEP);
        } else {
            memcpy(to->codes + STEP * b, from->codes + STEP * a, STEP);
            to->scales[b] = from->scales[a];
            to->sums[b] = from->sums[a];
        }
    }
}

// Packs a row once, for the slot of its first choice, and copies it to the slots of the others.
static void pack_row(const Job *job, const void *x, int64_t type, const int64_t *slots, int64_t choices, void *packed,
                     const Stack *stack) {
    Rows first;
    int64_t at = -1;
    for (int64_t a = 0; a < choices; a++) {
        if (slots[a] < 0) continue;
        const Tile *tile = tile_of(job, slots[a]);
        Rows rows = rows_of(job, packed, stack, tile);
        int64_t r = slots[a] - tile->slot;
        if (at < 0) {
            job->tier->pack(x, type, stack->k, stack->piece, stack->offset ? stack->offset : 1, &rows, r);
            first = rows;
            at = r;
        } else {
            copy_row(&first, at, &rows, r, steps_of(stack));
        }
    }
}

static const char *row_of_x(const Call *call, int64_t row, int64_t k) {
    return (const char *)call->x + row * k * (call->type == FLOAT32 ? 4 : 2);
}

static char *row_of_out(const Call *call, int64_t row, int64_t n) {
    return (char *)call->out + row * n * (call->type == FLOAT32 ? 4 : 2);
}

static void pack_tokens(void *argument, int64_t item) {
    const Job *job = argument;
    const Call *call = job->call;
    for (int64_t t = item * job->grain_in; t < least(call->tokens, (item + 1) * job->grain_in); t++)
        pack_row(job, row_of_x(call, t, call->first.k), call->type, job->slot + t * call->choices, call->choices, job->in,
                 &call->first);
}

// Block b of an expert: [gate, up] pairs when they take turns.
static Block block_of(const Stack *stack, int64_t expert, int64_t b) {
    const Matrix *m = stack->matrices + expert;
    const uint8_t *at = stack->buffer + m->data + b * m->block;
    return (Block){at, m->zeros ? at + m->zeros : 0, at + m->codes, m->groups, steps_of(stack) / m->groups,
                   stack->scale_type, m->bits, (int64_t)1 << (m->bits - 1)};
}

// y [count, rows, 16] = rows times blocks [b, b + count) of an expert, one or two.
static void multiply(const Job *job, const Stack *stack, int64_t expert, int64_t b, int64_t count, const Rows *rows, float *y) {
    const Block block[] = {block_of(stack, expert, b), block_of(stack, expert, b + count - 1)};
    (job->call->exact ? job->tier->exact : job->tier->product)(block, count, rows, y);
}

// y [rows, 16] += values [at, at + n) of the bias, if there is one.
static void add_bias(const Job *job, const Stack *stack, float *y, int64_t rows, int64_t at, int64_t n) {
    float bias[ROWS];
    if (!stack->bias) return;
    job->tier->load(stack->bias, job->call->type, at, n, bias);
    for (int64_t r = 0; r < rows; r++, y += ROWS)
        for (int64_t i = 0; i < n; i++) y[i] += bias[i];
}

// Columns [at, at + n) of a product, as they are, to the rows of `out`.
static void keep(const Job *job, const Tile *tile, const float *y, int64_t at, int64_t n) {
    const Call *call = job->call;
    for (int64_t r = 0; r < tile->rows; r++, y += ROWS) {
        char *row = row_of_out(call, job->assignment[tile->slot + r], call->first.n);
        job->tier->store(y, row + at * (call->type == FLOAT32 ? 4 : 2), call->type, n);
    }
}

static void first_product(void *argument, int64_t item) {
    const Job *job = argument;
    const Call *call = job->call;
    const Stack *stack = &call->first;
    int64_t blocks = blocks_of(stack), chunks = ceiling(blocks, job->first_chunk), width = stack->n / parts_of(stack);
    int64_t active = item / chunks, start = item % chunks * job->first_chunk;
    int fused = call->second.buffer != 0;  // which takes paired rows
    int64_t stop = least(blocks, start + job->first_chunk), parts = parts_of(stack), last = parts * stop, count;
    float y[2 * TILE * ROWS];
    for (int64_t i = job->first_tile[active]; i < job->first_tile[active + 1]; i++) {
        const Tile *tile = job->tile + i;
        const Rows rows = rows_of(job, job->in, stack, tile);
        float *up = y + ROWS * tile->rows;
        for (int64_t b = parts * start; b < last; b += count) {
            count = least(2, last - b);
            multiply(job, stack, tile->expert, b, count, &rows, y);
            for (int64_t c = b; c < b + count; c++) {
                // Block c holds rows of its part of the matrix from `at` on.
                int64_t at = ROWS * (c / parts), n = least(ROWS, width - at), column = c % parts * width + at;
                float *part = c == b ? y : up;
                add_bias(job, stack, part, tile->rows, tile->expert * stack->n + column, n);
                if (!fused) keep(job, tile, part, column, n);
            }
            int64_t at = ROWS * (b / parts);
            if (fused)
                job->tier->activate(call->activation, call->alpha, call->limit, y, up, tile->rows,
                                    job->mid + tile->slot * width + at, width, least(ROWS, width - at));
        }
    }
}

static void pack_between(void *argument, int64_t item) {
    const Job *job = argument;
    const Call *call = job->call;
    const Stack *stack = &call->second;
    for (int64_t s = item * job->grain_mid; s < least(job->used, (item + 1) * job->grain_mid); s++) {
        if (job->mid) pack_row(job, job->mid + s * stack->k, FLOAT32, &s, 1, job->between, stack);
        else pack_row(job, row_of_x(call, job->assignment[s], stack->k), call->type, &s, 1, job->between, stack);
    }
}

static void second_product(void *argument, int64_t item) {
    const Job *job = argument;
    const Call *call = job->call;
    const Stack *stack = &call->second;
    int64_t blocks = blocks_of(stack), start = item * job->second_chunk, stop = least(blocks, start + job->second_chunk);
    size_t size = call->type == FLOAT32 ? 4 : 2;
    // The sums of an item lie together: in rows of the whole output they would share few sets of a cache.
    float y[2 * TILE * ROWS], *sum = job->sum + ROWS * call->tokens * start;
    int64_t width = ROWS * (stop - start);
    memset(sum, 0, 4 * (size_t)(call->tokens * width));
    for (int64_t i = 0; i < job->tiles; i++) {
        const Tile *tile = job->tile + i;
        const Rows rows = rows_of(job, job->between, stack, tile);
        for (int64_t b = start; b < stop; b += 2) {
            int64_t count = least(2, stop - b);
            multiply(job, stack, tile->expert, b, count, &rows, y);
            for (int64_t c = b; c < b + count; c++) {
                float *part = y + (c - b) * ROWS * tile->rows;
                add_bias(job, stack, part, tile->rows, tile->expert * stack->n + ROWS * c, least(ROWS, stack->n - ROWS * c));
                job->tier->add(sum + ROWS * (c - start), width, job->token + tile->slot, job->gate + tile->slot, part, tile->rows);
            }
        }
    }
    for (int64_t t = 0; t < call->tokens; t++)
        job->tier->store(sum + t * width, row_of_out(call, t, stack->n) + size * ROWS * (size_t)start, call->type,
                         least(stack->n, ROWS * stop) - ROWS * start);
}

static void no_expert(void *argument, int64_t item) {
    const Job *job = argument;
    int64_t n = job->call->first.n;
    for (int64_t s = item; s < job->assignments; s++)
        if (job->slot[s] < 0) memset(row_of_out(job->call, s, n), 0, (size_t)n * (job->call->type == FLOAT32 ? 4 : 2));
}

void qmoe_call_phases(Job *job, Phase *to) {
    const Stack *first = &job->call->first, *second = &job->call->second;
    for (int i = 0; i < CALL_PHASES; i++) to[i] = (Phase){.job = job};
    if (first->buffer) {
        to[0] = (Phase){pack_tokens, job, .items = ceiling(job->call->tokens, job->grain_in)};
        to[1] = (Phase){first_product, job, .items = job->active * ceiling(blocks_of(first), job->first_chunk)};
    }
    if (second->buffer) {
        to[2] = (Phase){pack_between, job, .items = ceiling(job->used, job->grain_mid)};
        to[3] = (Phase){second_product, job, .items = ceiling(blocks_of(second), job->second_chunk)};
    } else if (job->used < job->assignments) {
        to[2] = (Phase){no_expert, job, .items = 1};
    }
}

int qmoe_run(int tier, const Call *call) {
    Job job;
    Phase phases[CALL_PHASES];
    int failed = qmoe_begin(&job, tier, call);
    if (!failed) {
        qmoe_call_phases(&job, phases);
        qmoe_run_phases(phases, CALL_PHASES, call->threads);
    }
    qmoe_end(&job);
    return failed;
}

// Whether two sides take the same packed rows.
static int shares_rows(const Call *a, const Call *b) {
    const Stack *s = &a->first, *t = &b->first;
    return a->exact == b->exact && s->k == t->k && s->piece == t->piece && s->offset == t->offset;
}

static void pack_sides(void *argument, int64_t item) {
    Sides *sides = argument;
    for (int i = 0; i < sides->count; i++)
        if (!sides->packed[i]) pack_tokens(sides->job + i, item);
}

static void products_of_sides(void *argument, int64_t item) {
    Sides *sides = argument;
    int i = 0;
    while (item >= sides->end[i]) i++;
    first_product(sides->job + i, item - (i ? sides->end[i - 1] : 0));
}

int qmoe_begin_sides(Sides *sides, int tier, const Call *calls, int count) {
    int failed = 0;
    int64_t items = 0;
    sides->count = count;
    for (int i = 0; i < count; i++) {
        Job *job = sides->job + i;
        failed |= qmoe_begin(job, tier, calls + i);
        if (failed) continue;
        sides->packed[i] = i && shares_rows(calls, calls + i);
        if (sides->packed[i]) job->in = sides->job->in;
        sides->end[i] = items += job->active * ceiling(blocks_of(&calls[i].first), job->first_chunk);
    }
    return failed;
}

void qmoe_sides_phases(Sides *sides, Phase *to) {
    const Job *first = sides->job;
    to[0] = (Phase){pack_sides, sides, .items = ceiling(first->call->tokens, first->grain_in)};
    to[1] = (Phase){products_of_sides, sides, .items = sides->end[sides->count - 1]};
}

void qmoe_end_sides(Sides *sides) {
    for (int i = 0; i < sides->count; i++) qmoe_end(sides->job + i);
}

int qmoe_run_side_by_side(int tier, const Call *calls, int count) {
    Sides sides;
    Phase phases[SIDES_PHASES];
    int failed = qmoe_begin_sides(&sides, tier, calls, count);
    if (!failed) {
        qmoe_sides_phases(&sides, phases);
        qmoe_run_phases(phases, SIDES_PHASES, calls->threads);
    }
    qmoe_end_sides(&sides);
    return failed;
}
