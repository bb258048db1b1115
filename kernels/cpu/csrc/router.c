// Routers of layers that decode: logits in parts of the experts, then the choice of every token.
#include <stdlib.h>

#include "job.h"

enum { SOME_EXPERTS = 16 };  // of an item

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t size_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }

static void some_logits(void *argument, int64_t item) {
    const Route *job = argument;
    const Router *r = job->router;
    int64_t first = item * SOME_EXPERTS, n = least(SOME_EXPERTS, r->experts - first), size = size_of(r->type);
    float y[FEW * SOME_EXPERTS], bias[SOME_EXPERTS] = {0};
    job->tier->dense(job->x, r->tokens, r->width, (const char *)r->weight + size * r->width * first, r->type, n, y);
    if (r->bias) job->tier->load(r->bias, r->type, first, n, bias);
    for (int64_t t = 0; t < r->tokens; t++) {
        char *to = (char *)r->logits + size * (r->experts * t + first);
        for (int64_t i = 0; i < n; i++) y[n * t + i] = y[n * t + i] + bias[i];
        job->tier->store(y + n * t, to, r->type, n);
        job->tier->load(to, r->type, 0, n, job->logits + r->experts * t + first);
    }
}

static void choose(void *argument, int64_t token) {
    const Route *job = argument;
    job->tier->choose(job->router, token, job->logits + job->router->experts * token);
}

static void widen(void *argument, int64_t token) {
    const Route *job = argument;
    const Router *r = job->router;
    job->tier->load(r->x, r->type, r->width * token, r->width, job->x + padded(r->width) * token);
}

int qmoe_begin_route(Route *job, int tier, const Router *r) {
    int64_t wide = padded(r->width);
    *job = (Route){r, qmoe_tiers[tier], calloc((size_t)(r->tokens * (wide + r->experts)), 4), 0};
    if (!job->x) return 1;
    job->logits = job->x + r->tokens * wide;
    return 0;
}

void qmoe_route_phases(Route *job, Phase *to) {
    const Router *r = job->router;
    to[0] = (Phase){widen, job, .items = r->tokens};
    to[1] = (Phase){some_logits, job, .items = (r->experts + SOME_EXPERTS - 1) / SOME_EXPERTS};
    to[2] = (Phase){choose, job, .items = r->tokens};
}

void qmoe_end_route(Route *job) { free(job->x); }

int qmoe_route(int tier, const Router *r) {
    Route job;
    Phase phases[ROUTE_PHASES];
    if (qmoe_begin_route(&job, tier, r)) return 1;
    qmoe_route_phases(&job, phases);
    qmoe_run_phases(phases, ROUTE_PHASES, r->threads);
    qmoe_end_route(&job);
    return 0;
}
