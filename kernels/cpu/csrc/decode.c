// A decoder layer for one new token of each sequence, in phases that threads go through without coming
// back to Python in between. Every value is computed and rounded as by the separate calls.
#include <stdlib.h>
#include <string.h>

#include "job.h"

enum { BEFORE, QKV, HEADS = QKV + SIDES_PHASES, ATTEND, OUT = ATTEND + ATTEND_PHASES, MIDDLE = OUT + CALL_PHASES,
       CHOICE, BEGIN = CHOICE + ROUTE_PHASES, EXPERTS, AFTER = EXPERTS + CALL_PHASES, COUNT };
enum { SOME = 512 };  // values at once

typedef struct {
    const Layer *layer;
    const Step *step;
    const Tier *tier;
    int number, failed;  // of the tier
    char *normed, *qkv[3], *attended, *product, *sum, *mixed;  // rows of the layer's type
    void *logits, *scores;
    float *gates;
    int64_t *ids;
    Call calls[4], routed;  // q, k, v, o; experts
    Attention attention;
    Router router;
    Sides sides;
    Attend attend;
    Job out, experts;
    Route route;
    Phase phases[COUNT];
} Decode;

static int64_t size_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }
static int64_t heads_of(const Layer *l, int i) { return i == 0 ? l->heads : l->key_heads; }

// to [n] = a + b, rounded to the layer's type.
static void add(const Decode *d, const void *a, const void *b, void *to, int64_t n) {
    int64_t type = d->layer->type;
    float v[SOME], w[SOME];
    for (int64_t at = 0; at < n; at += SOME) {
        int64_t some = n - at < SOME ? n - at : SOME;
        d->tier->load(a, type, at, some, v);
        d->tier->load(b, type, at, some, w);
        for (int64_t i = 0; i < some; i++) v[i] = v[i] + w[i];
        d->tier->store(v, (char *)to + size_of(type) * at, type, some);
    }
}

// Row t of x to out; which: 0 before, 1 after, 2 and 3 of q and k.
static void norm_row(const Decode *d, int which, const void *weight, const void *x, void *out, int64_t width, int64_t t) {
    const Layer *l = d->layer;
    const Norm norm = {x, weight, out, d->step->tokens, width, l->type, l->norm_type[which], l->early[which], 1,
                       l->epsilon[which], l->shift[which]};
    d->tier->norm(&norm, t);
}

static void before(void *argument, int64_t token) {
    const Decode *d = argument;
    norm_row(d, 0, d->layer->before, d->step->x, d->normed, d->layer->width, token);
}

static void heads(void *argument, int64_t token) {
    const Decode *d = argument;
    const Layer *l = d->layer;
    const Step *s = d->step;
    int64_t size = size_of(l->type), D = l->head_width;
    for (int i = 0; i < 3; i++) {
        int64_t n = D * heads_of(l, i);
        char *row = d->qkv[i] + size * n * token;
        if (l->bias[i]) add(d, row, l->bias[i], row, n);
        if (i == 2) break;
        if (l->row_norm[i]) norm_row(d, 2 + i, l->row_norm[i], d->qkv[i], d->qkv[i], n, token);
        const Turn turn = {d->qkv[i], s->cos, s->sin, l->head_norm[i], s->tokens, s->positions, heads_of(l, i), D, s->turned,
                           l->type, l->norm_type[2 + i], l->early[2 + i], l->epsilon[2 + i], l->shift[2 + i]};
        d->tier->turn(&turn, token);
    }
    for (int64_t g = 0; g < l->key_heads; g++) {
        int64_t from = size * D * (l->key_heads * token + g);
        int64_t k = s->key_stride[0] * token + s->key_stride[1] * g + s->key_stride[2] * s->past;
        int64_t v = s->value_stride[0] * token + s->value_stride[1] * g + s->value_stride[2] * s->past;
        memcpy((char *)s->keys + size * k, d->qkv[1] + from, (size_t)(size * D));
        memcpy((char *)s->values + size * v, d->qkv[2] + from, (size_t)(size * D));
    }
}

static void middle(void *argument, int64_t token) {
    const Decode *d = argument;
    const Layer *l = d->layer;
    int64_t at = size_of(l->type) * l->width * token;
    if (l->bias[3]) add(d, d->product + at, l->bias[3], d->product + at, l->width);
    add(d, (const char *)d->step->x + at, d->product + at, d->sum + at, l->width);
    norm_row(d, 1, l->after, d->sum, d->normed, l->width, token);
}

// The experts are known: their phases follow.
static void begin_experts(void *argument, int64_t item) {
    Decode *d = argument;
    const Layer *l = d->layer;
    (void)item;
    d->tier->load(d->scores, l->score_type, 0, d->step->tokens * l->choices, d->gates);
    d->failed = qmoe_begin(&d->experts, d->number, &d->routed);
    if (!d->failed) qmoe_call_phases(&d->experts, d->phases + EXPERTS);
}

static void after(void *argument, int64_t token) {
    const Decode *d = argument;
    int64_t at = size_of(d->layer->type) * d->layer->width * token;
    if (!d->failed) add(d, d->sum + at, d->mixed + at, (char *)d->step->out + at, d->layer->width);
}

// What lies between the phases; NULL if memory ran out.
static void *reserve(Decode *d) {
    const Layer *l = d->layer;
    int64_t T = d->step->tokens, row = T * l->width * size_of(l->type), head = T * l->head_width * size_of(l->type), bytes = 0;
    const struct {
        void *to;
        int64_t bytes;
    } parts[] = {{&d->normed, row}, {&d->qkv[0], head * l->heads}, {&d->qkv[1], head * l->key_heads},
                 {&d->qkv[2], head * l->key_heads}, {&d->attended, head * l->heads}, {&d->product, row}, {&d->sum, row},
                 {&d->mixed, row}, {&d->logits, 4 * T * l->experts}, {&d->scores, 4 * T * l->choices},
                 {&d->gates, 4 * T * l->choices}, {&d->ids, 8 * T * l->choices}};
    const size_t count = sizeof parts / sizeof *parts;
    for (size_t i = 0; i < count; i++) bytes += (parts[i].bytes + 63) & ~(int64_t)63;
    char *memory = aligned_alloc(64, (size_t)bytes), *at = memory;
    for (size_t i = 0; memory && i < count; i++) {
        memcpy(parts[i].to, &at, sizeof at);
        at += (parts[i].bytes + 63) & ~(int64_t)63;
    }
    return memory;
}

static Call linear_of(const Decode *d, int i, const void *x, void *out) {
    const Layer *l = d->layer;
    return (Call){.x = x, .out = out, .tokens = d->step->tokens, .choices = 1, .type = l->type, .exact = l->exact,
                  .threads = d->step->threads, .first = l->projection[i]};
}

static void describe(Decode *d) {
    const Layer *l = d->layer;
    const Step *s = d->step;
    int64_t D = l->head_width;
    for (int i = 0; i < 3; i++) d->calls[i] = linear_of(d, i, d->normed, d->qkv[i]);
    d->calls[3] = linear_of(d, 3, d->attended, d->product);
    d->attention = (Attention){d->qkv[0], s->keys, s->values, 0, d->attended, s->tokens, l->heads, l->key_heads, 1, s->past + 1,
                               D, D, l->type, 0, s->threads, {l->heads * D, D, l->heads * D}, {0}, {0}, {0}, l->scale};
    memcpy(d->attention.k_stride, s->key_stride, sizeof s->key_stride);
    memcpy(d->attention.v_stride, s->value_stride, sizeof s->value_stride);
    d->router = (Router){d->normed, l->router, l->router_bias, d->logits, d->scores, d->ids, s->tokens, l->experts, l->width,
                         l->choices, l->type, l->score_type, l->normed, s->threads};
    d->routed = (Call){d->normed, d->mixed, d->ids, d->gates, s->tokens, l->choices, -1, l->type, l->activation, l->exact,
                       s->threads, l->alpha, l->limit, l->first, l->second};
}

int qmoe_decode(int tier, const Layer *layer, const Step *step) {
    Decode d = {.layer = layer, .step = step, .tier = qmoe_tiers[tier], .number = tier};
    void *memory = reserve(&d);
    if (!memory) return 1;
    describe(&d);
    d.failed = qmoe_begin_sides(&d.sides, tier, d.calls, 3) | qmoe_begin_attend(&d.attend, tier, &d.attention) |
               qmoe_begin(&d.out, tier, d.calls + 3) | qmoe_begin_route(&d.route, tier, &d.router);
    if (!d.failed) {
        d.phases[BEFORE] = (Phase){before, &d, .items = step->tokens};
        qmoe_sides_phases(&d.sides, d.phases + QKV);
        d.phases[HEADS] = (Phase){heads, &d, .items = step->tokens};
        qmoe_attend_phases(&d.attend, d.phases + ATTEND);
        qmoe_call_phases(&d.out, d.phases + OUT);
        d.phases[MIDDLE] = (Phase){middle, &d, .items = step->tokens};
        qmoe_route_phases(&d.route, d.phases + CHOICE);
        d.phases[BEGIN] = (Phase){begin_experts, &d, .items = 1};
        d.phases[AFTER] = (Phase){after, &d, .items = step->tokens};
        qmoe_run_phases(d.phases, COUNT, step->threads);
    }
    qmoe_end_sides(&d.sides);
    qmoe_end_attend(&d.attend);
    qmoe_end(&d.out);
    qmoe_end(&d.experts);
    qmoe_end_route(&d.route);
    free(memory);
    return d.failed;
}
