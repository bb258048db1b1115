// Norms and attentions: their items, and the sums of an attention whose keys are shared out.
#include <stdlib.h>

#include "exponential.h"
#include "job.h"

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

typedef struct {
    const Norm *norm;
    const Tier *tier;
    int64_t rows;  // of an item
} Norms;

static void some_rows(void *argument, int64_t item) {
    const Norms *job = argument;
    for (int64_t r = item * job->rows; r < least(job->norm->rows, (item + 1) * job->rows); r++) job->tier->norm(job->norm, r);
}

void qmoe_norm(int tier, const Norm *norm) {
    // A part large enough to be worth another thread.
    Norms job = {norm, qmoe_tiers[tier], 1 + 65536 / (norm->width + 1)};
    Phase phase = {some_rows, &job, .items = ceiling(norm->rows, job.rows)};
    qmoe_run_phases(&phase, 1, norm->threads);
}

typedef struct {
    const Turn *turns;
    const Tier *tier;
    int count;
    int64_t tokens;  // of an item
} Turns;

static void some_tokens(void *argument, int64_t item) {
    const Turns *job = argument;
    for (const Turn *turn = job->turns; turn < job->turns + job->count; turn++)
        for (int64_t t = item * job->tokens; t < least(turn->tokens, (item + 1) * job->tokens); t++) job->tier->turn(turn, t);
}

void qmoe_turn(int tier, const Turn *turns, int count, int64_t threads) {
    // A part large enough to be worth another thread.
    Turns job = {turns, qmoe_tiers[tier], count, 1 + 16384 / (turns->heads * turns->width + 1)};
    Phase phase = {some_tokens, &job, .items = ceiling(turns->tokens, job.tokens)};
    qmoe_run_phases(&phase, 1, threads);
}

// Few queries share their keys out, so that one sequence that is decoded keeps many threads busy. It
// depends on the sizes alone: the number of threads changes no sum.
enum { SHARE = 256 };

static void store_rows(const Attend *job, const Part *part, const float *sum, const float *total) {
    const Attention *a = job->a;
    int64_t width = padded(a->value_width), size = a->type == FLOAT32 ? 4 : 2;
    for (int64_t r = 0; r < part->rows; r++, sum += width) {
        int64_t row = part->row + r, head = part->key_head * job->group + row % job->group;
        float by = total[r] == 0.0f ? 0.0f : 1.0f / total[r], y[WIDEST];
        for (int64_t i = 0; i < width; i++) y[i] = sum[i] * by;
        char *to = (char *)a->out + size * a->value_width * ((part->batch * a->queries + row / job->group) * a->heads + head);
        job->tier->store(y, to, a->type, a->value_width);
    }
}

static Part part_of(const Attend *job, int64_t item) {
    const Attention *a = job->a;
    int64_t share = item % job->shares, rest = item / job->shares, part = rest % job->parts;
    int64_t each = job->shares > 1 ? SHARE : a->keys;
    rest /= job->parts;
    return (Part){rest / a->key_heads, rest % a->key_heads, job->group, QUERIES * part,
                  least(QUERIES, job->rows - QUERIES * part), share * each, least(each, a->keys - share * each)};
}

static void attend(void *argument, int64_t item) {
    const Attend *job = argument;
    const Part part = part_of(job, item);
    int64_t width = padded(job->a->value_width);
    if (job->shares > 1) {
        job->tier->attend(job->a, &part, job->sum + QUERIES * width * item, job->top + QUERIES * item, job->total + QUERIES * item);
        return;
    }
    float sum[QUERIES * WIDEST], top[QUERIES], total[QUERIES];
    job->tier->attend(job->a, &part, sum, top, total);
    store_rows(job, &part, sum, total);
}

// The shares of an item's keys as one, in their order.
static void combine(void *argument, int64_t item) {
    const Attend *job = argument;
    int64_t width = padded(job->a->value_width), first = item * job->shares;
    const Part part = part_of(job, first);
    float sum[QUERIES * WIDEST], total[QUERIES];
    for (int64_t r = 0; r < part.rows; r++) {
        const float *tops = job->top + QUERIES * first + r, *totals = job->total + QUERIES * first + r;
        float top = -INFINITY, *to = sum + width * r;
        for (int64_t s = 0; s < job->shares; s++) top = tops[QUERIES * s] > top ? tops[QUERIES * s] : top;
        memset(to, 0, 4 * (size_t)width);
        total[r] = 0.0f;
        for (int64_t s = 0; s < job->shares; s++) {
            if (tops[QUERIES * s] == -INFINITY) continue;
            float worth = exponential(tops[QUERIES * s] - top);
            const float *from = job->sum + QUERIES * width * (first + s) + width * r;
            for (int64_t i = 0; i < width; i++) to[i] = to[i] + worth * from[i];
            total[r] = total[r] + worth * totals[QUERIES * s];
        }
    }
    store_rows(job, &part, sum, total);
}

int qmoe_begin_attend(Attend *job, int tier, const Attention *a) {
    *job = (Attend){.a = a, .tier = qmoe_tiers[tier], .group = a->heads / a->key_heads};
    job->rows = a->queries * job->group;
    job->parts = ceiling(job->rows, QUERIES);
    job->shares = a->queries <= FEW && a->keys > SHARE ? ceiling(a->keys, SHARE) : 1;
    if (job->shares == 1) return 0;
    int64_t each = QUERIES * job->shares * a->batch * a->key_heads * job->parts, width = padded(a->value_width);
    if (!(job->sum = malloc(4 * (size_t)(each * (width + 2))))) return 1;
    job->top = job->sum + each * width;
    job->total = job->top + each;
    return 0;
}

void qmoe_attend_phases(Attend *job, Phase *to) {
    int64_t items = job->a->batch * job->a->key_heads * job->parts;
    to[0] = (Phase){attend, job, .items = items * job->shares};
    to[1] = (Phase){combine, job, .items = job->shares > 1 ? items : 0};
}

void qmoe_end_attend(Attend *job) { free(job->sum); }

int qmoe_attend(int tier, const Attention *a) {
    Attend job;
    Phase phases[ATTEND_PHASES];
    if (qmoe_begin_attend(&job, tier, a)) return 1;
    qmoe_attend_phases(&job, phases);
    qmoe_run_phases(phases, ATTEND_PHASES, a->threads);
    qmoe_end_attend(&job);
    return 0;
}
