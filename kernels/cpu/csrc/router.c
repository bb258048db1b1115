// Routers of layers that decode: logits in parts of the experts, then the choice of every token.
#include <stdlib.h>

#include "parallel.h"
#include "qmoe_cpu.h"

enum { SOME_EXPERTS = 16 };  // of an item

typedef struct {
    const Router *router;
    const Tier *tier;
    float *x, *logits;  // [T, padded K], [T, E]
} Route;

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

int qmoe_route(int tier, const Router *r) {
    int64_t wide = padded(r->width);
    Route job = {r, qmoe_tiers[tier], calloc((size_t)(r->tokens * (wide + r->experts)), 4), 0};
    if (!job.x) return 1;
    job.logits = job.x + r->tokens * wide;
    for (int64_t t = 0; t < r->tokens; t++) job.tier->load(r->x, r->type, r->width * t, r->width, job.x + wide * t);
    Phase phases[] = {{.work = some_logits, .items = (r->experts + SOME_EXPERTS - 1) / SOME_EXPERTS},
                      {.work = choose, .items = r->tokens}};
    qmoe_run_phases(phases, 2, &job, r->threads);
    free(job.x);
    return 0;
}
