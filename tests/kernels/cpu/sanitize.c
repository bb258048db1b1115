// Random calls of the C kernels, every instruction set against the scalar one, from several threads,
// with buffers of exactly the size they need: for sanitizers, and for processors that Python's tests
// do not run on. `make sanitize` builds and runs it.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qmoe_cpu.h"

typedef struct {
    uint64_t state;
} Random;

static uint64_t next(Random *r) { return r->state = r->state * 6364136223846793005ull + 1442695040888963407ull; }
static int64_t below(Random *r, int64_t n) { return (int64_t)((next(r) >> 33) % (uint64_t)n); }
// Asked through the functions that a shared object shows, so that a wheel's can be checked too.
static int usable(int tier) { return qmoe_find_tier(qmoe_tier_name(tier)) == tier; }
static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Values of about 1 in any type.
static void fill(Random *r, void *to, int64_t type, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t mantissa = (uint32_t)below(r, 1 << 23), sign = (uint32_t)below(r, 2) << 31;
        uint32_t f = sign | 0x3f000000u | mantissa;
        if (type == FLOAT32) memcpy((char *)to + 4 * i, &f, 4);
        else ((uint16_t *)to)[i] = (uint16_t)(type == BFLOAT16 ? f >> 16 : (sign >> 16 | 0x3800 | mantissa >> 13));
    }
}

// Random matrices, from sources of exactly their size.
static void pack_random(Random *r, const Stack *stack) {
    Source *sources = calloc((size_t)stack->experts, sizeof *sources);
    int64_t dense = below(r, 2);
    for (int64_t e = 0; e < stack->experts; e++) {
        const Matrix *m = stack->matrices + e;
        int64_t stride = dense ? up(stack->k * m->bits, 32) / 8 : stack->k, half = 1 << (m->bits - 1);
        int64_t size = stack->n * stride, scales = stack->n * m->groups;
        uint8_t *codes = malloc((size_t)size), *zeros = m->zeros ? malloc((size_t)scales) : 0;
        void *values = malloc((size_t)(scales * (stack->scale_type == FLOAT32 ? 4 : 2)));
        for (int64_t i = 0; i < size; i++) codes[i] = (uint8_t)(dense ? below(r, 256) : below(r, 2 * half) - half);
        for (int64_t i = 0; zeros && i < scales; i++) zeros[i] = (uint8_t)(below(r, 2 * half) - half);
        fill(r, values, stack->scale_type, scales);
        sources[e] = (Source){codes, values, (int8_t *)zeros, stride, dense};
    }
    qmoe_pack(stack, sources, 1 + below(r, 4));
    for (int64_t e = 0; e < stack->experts; e++) {
        free((void *)sources[e].codes);
        free((void *)sources[e].scales);
        free((void *)sources[e].zeros);
    }
    free(sources);
}

static Stack make_stack(Random *r, int64_t experts, int64_t n, int64_t k, int64_t type, int64_t paired) {
    int64_t piece = k % 32 ? k : 32, parts = paired ? 2 : 1, steps = k / piece * (up(piece, 32) / 32), size = 0;
    int64_t blocks = parts * up(n / parts, 16) / 16, one = below(r, 2), width = below(r, 4), ready = one;
    Matrix *matrices = calloc((size_t)experts, sizeof *matrices);
    for (int64_t e = 0; e < experts; e++) {
        int64_t groups = below(r, 2) || piece == k ? 1 : k / 32, zeros = !ready && below(r, 2);
        int64_t scales = groups * 16 * (type == FLOAT32 ? 4 : 2), codes = up(scales + (zeros ? groups * 16 : 0), 64);
        int64_t bits = (int64_t[]){2, 3, 4, 8}[one ? width : below(r, 4)];
        matrices[e] = (Matrix){size, codes + 64 * bits * steps, zeros ? scales : 0, codes, bits, groups};
        size += matrices[e].block * blocks;
    }
    Stack stack = {malloc((size_t)size), matrices, 0, experts, n, k, piece, paired, type, ready ? 1 << (matrices->bits - 1) : 0};
    pack_random(r, &stack);
    void *bias = 0;
    if (below(r, 2)) fill(r, bias = malloc((size_t)(experts * n * (type == FLOAT32 ? 4 : 2))), type, experts * n);
    stack.bias = bias;
    return stack;
}

static void drop(Stack *s) {
    free(s->buffer);
    free((void *)s->matrices);
    free((void *)s->bias);
}

static void trial(Random *r) {
    int64_t experts = 1 + below(r, 5), tokens = 1 + below(r, below(r, 4) ? 9 : 90), choices = 1 + below(r, 3);
    int64_t type = below(r, 3), what = below(r, 4), size = type == FLOAT32 ? 4 : 2;
    int64_t sizes[] = {32, 96, 160, 40, 7}, h = sizes[below(r, 5)], i = 1 + below(r, 50), out_n = 1 + below(r, 70);
    if (what == 3) choices = 1;
    Call call = {.tokens = tokens, .choices = choices, .type = type, .activation = 1 + below(r, 4), .alpha = 1.7f,
                 .limit = 0.5f, .exact = below(r, 2), .threads = 1 + below(r, 4), .only = below(r, experts + 1)};
    if (what != 1) call.first = make_stack(r, experts, what ? out_n : 2 * i, h, type, what == 0);
    if (what < 2) call.second = make_stack(r, experts, out_n, i, type, 0);
    int64_t in_rows = what == 1 ? tokens * choices : tokens, in_k = what == 1 ? i : h;
    int64_t out_rows = what > 1 ? tokens * choices : tokens, out_size = out_rows * out_n * size;
    int64_t *ids = malloc((size_t)(8 * tokens * choices));
    float *gates = malloc((size_t)(4 * tokens * choices));
    for (int64_t s = 0; s < tokens * choices; s++) ids[s] = below(r, experts + 2) - 1;
    fill(r, gates, FLOAT32, tokens * choices);
    void *x = malloc((size_t)(in_rows * in_k * size)), *wanted = malloc((size_t)out_size), *out = malloc((size_t)out_size);
    fill(r, x, type, in_rows * in_k);
    call.x = x, call.ids = what == 3 ? 0 : ids, call.gates = what < 2 ? gates : 0;
    int scalar = qmoe_find_tier("scalar");
    call.out = wanted;
    if (qmoe_run(scalar, &call)) abort();
    call.out = out;
    for (int tier = 0; tier <= qmoe_find_tier("scalar"); tier++) {
        if (!usable(tier)) continue;
        memset(out, 0xa5, (size_t)out_size);
        if (qmoe_run(tier, &call)) abort();
        if (memcmp(out, wanted, (size_t)out_size)) {
            fprintf(stderr, "%s differs from scalar: kind %d, type %d, exact %d, E %d, T %d, A %d, H %d, I %d, N %d\n",
                    qmoe_tier_name(tier), (int)what, (int)type, (int)call.exact, (int)experts, (int)tokens, (int)choices,
                    (int)h, (int)i, (int)out_n);
            exit(1);
        }
    }
    drop(&call.first), drop(&call.second);
    free(ids), free(gates), free(x), free(wanted), free(out);
}

// Attention with every instruction set, against the scalar one.
static void attention_trial(Random *r) {
    int64_t group = 1 + below(r, 5), G = 1 + below(r, 3), H = G * group, B = 1 + below(r, 2), type = below(r, 3);
    int64_t T = 1 + below(r, below(r, 4) ? 4 : 40), S = below(r, 2) ? T : 1 + below(r, 600), D = 1 + below(r, 40);
    int64_t V = below(r, 9) ? 1 + below(r, 40) : 256, size = type == FLOAT32 ? 4 : 2, out_size = B * T * H * V * size;
    void *q = malloc((size_t)(B * H * T * D * size)), *k = malloc((size_t)(B * G * S * D * size));
    void *v = malloc((size_t)(B * G * S * V * size)), *wanted = malloc((size_t)out_size), *out = malloc((size_t)out_size);
    uint8_t *mask = below(r, 2) ? malloc((size_t)(B * T * S)) : 0;
    for (int64_t i = 0; mask && i < B * T * S; i++) mask[i] = (uint8_t)below(r, 2);
    fill(r, q, type, B * H * T * D), fill(r, k, type, B * G * S * D), fill(r, v, type, B * G * S * V);
    Attention a = {q, k, v, mask, wanted, B, H, G, T, S, D, V, type, T == S && below(r, 2), 1 + below(r, 4),
                   {H * T * D, T * D, D}, {G * S * D, S * D, D}, {G * S * V, S * V, V}, {T * S, 0, S, 1}, 0.3f};
    if (qmoe_attend(qmoe_find_tier("scalar"), &a)) abort();
    a.out = out;
    for (int tier = 0; tier <= qmoe_find_tier("scalar"); tier++) {
        if (!usable(tier)) continue;
        if (qmoe_attend(tier, &a)) abort();
        if (memcmp(out, wanted, (size_t)out_size)) {
            fprintf(stderr, "%s differs from scalar: attention, type %d, B %d, H %d, G %d, T %d, S %d, D %d, V %d\n",
                    qmoe_tier_name(tier), (int)type, (int)B, (int)H, (int)G, (int)T, (int)S, (int)D, (int)V);
            exit(1);
        }
    }
    free(q), free(k), free(v), free(mask), free(wanted), free(out);
}

static void norm_trial(Random *r) {
    int64_t rows = 1 + below(r, 200), width = 1 + below(r, 1200), type = below(r, 3), weights = below(r, 3);
    size_t bytes = (size_t)(rows * width * (type == FLOAT32 ? 4 : 2));
    void *x = malloc(bytes), *wanted = malloc(bytes), *out = malloc(bytes);
    void *weight = malloc((size_t)(width * (weights == FLOAT32 ? 4 : 2)));
    fill(r, x, type, rows * width), fill(r, weight, weights, width);
    Norm norm = {x, weight, wanted, rows, width, type, weights, below(r, 2), 1 + below(r, 4), 1e-6f, (float)below(r, 2)};
    qmoe_norm(qmoe_find_tier("scalar"), &norm);
    norm.out = out;
    for (int tier = 0; tier <= qmoe_find_tier("scalar"); tier++) {
        if (!usable(tier)) continue;
        qmoe_norm(tier, &norm);
        if (memcmp(out, wanted, bytes)) {
            fprintf(stderr, "%s differs from scalar: norm, type %d, rows %d, width %d\n", qmoe_tier_name(tier), (int)type,
                    (int)rows, (int)width);
            exit(1);
        }
    }
    free(x), free(weight), free(wanted), free(out);
}

static void router_trial(Random *r) {
    int64_t T = 1 + below(r, FEW), E = 1 + below(r, 70), A = 1 + below(r, E < 9 ? E : 9), K = 1 + below(r, 1200), type = below(r, 3);
    int64_t size = type == FLOAT32 ? 4 : 2, scores = below(r, 2) ? type : FLOAT32, size_of_score = scores == FLOAT32 ? 4 : 2;
    size_t bytes[] = {(size_t)(T * E * size), (size_t)(T * A * size_of_score), (size_t)(T * A * 8)};
    void *x = malloc((size_t)(T * K * size)), *weight = malloc((size_t)(E * K * size)), *bias = malloc((size_t)(E * size));
    void *wanted[3], *out[3];
    for (int i = 0; i < 3; i++) wanted[i] = malloc(bytes[i]), out[i] = malloc(bytes[i]);
    fill(r, x, type, T * K), fill(r, weight, type, E * K), fill(r, bias, type, E);
    Router router = {x, weight, below(r, 2) ? bias : 0, wanted[0], wanted[1], wanted[2], T, E, K, A, type, scores,
                     below(r, 2), 1 + below(r, 4)};
    if (qmoe_route(qmoe_find_tier("scalar"), &router)) abort();
    router.logits = out[0], router.scores = out[1], router.ids = out[2];
    for (int tier = 0; tier <= qmoe_find_tier("scalar"); tier++) {
        if (!usable(tier)) continue;
        if (qmoe_route(tier, &router)) abort();
        for (int i = 0; i < 3; i++)
            if (memcmp(out[i], wanted[i], bytes[i])) {
                fprintf(stderr, "%s differs from scalar: router, type %d, T %d, E %d, A %d, K %d\n", qmoe_tier_name(tier),
                        (int)type, (int)T, (int)E, (int)A, (int)K);
                exit(1);
            }
    }
    for (int i = 0; i < 3; i++) free(wanted[i]), free(out[i]);
    free(x), free(weight), free(bias);
}

static void turn_trial(Random *r) {
    int64_t T = 1 + below(r, 40), P = 1 + below(r, 3), H = 1 + below(r, 6), D = 2 * (1 + below(r, 20)), type = below(r, 3);
    int64_t R = 2 * (1 + below(r, D / 2)), size = type == FLOAT32 ? 4 : 2, weights = below(r, 3);
    size_t bytes = (size_t)(T * H * D * size);
    void *x = malloc(bytes), *wanted = malloc(bytes), *out = malloc(bytes), *weight = malloc((size_t)(4 * D));
    void *cos = malloc((size_t)(P * R * size)), *sin = malloc((size_t)(P * R * size));
    fill(r, x, type, T * H * D), fill(r, cos, type, P * R), fill(r, sin, type, P * R), fill(r, weight, weights, D);
    memcpy(wanted, x, bytes);
    Turn turn = {wanted, cos, sin, below(r, 2) ? weight : 0, T, P, H, D, R, type, weights, below(r, 2), 1e-6f, 0.0f};
    qmoe_turn(qmoe_find_tier("scalar"), &turn, 1, 1);
    turn.x = out;
    for (int tier = 0; qmoe_tiers[tier]; tier++) {
        if (!qmoe_tiers[tier]->usable()) continue;
        memcpy(out, x, bytes);
        qmoe_turn(tier, &turn, 1, 1 + below(r, 4));
        if (memcmp(out, wanted, bytes)) {
            fprintf(stderr, "%s differs from scalar: turn, type %d, T %d, H %d, D %d, R %d\n", qmoe_tier_name(tier), (int)type,
                    (int)T, (int)H, (int)D, (int)R);
            exit(1);
        }
    }
    free(x), free(wanted), free(out), free(weight), free(cos), free(sin);
}

// A decoder layer with every instruction set and several numbers of threads, against the scalar one. Not
// in halves: these weights are so large that they overflow, and any NaN is as good as another.
static void decode_trial(Random *r) {
    int64_t T = 1 + below(r, FEW), G = 1 + below(r, 2), H = G * (1 + below(r, 3)), D = 2 * (1 + below(r, 12));
    int64_t type = below(r, 2) ? FLOAT32 : BFLOAT16;
    int64_t size = type == FLOAT32 ? 4 : 2, W = 32 * (1 + below(r, 3)), E = 1 + below(r, 5), A = 1 + below(r, E), I = 1 + below(r, 40);
    int64_t past = below(r, 2) ? below(r, 20) : 500, room = past + 1, P = below(r, 2) ? T : 1, R = 2 * (1 + below(r, D / 2));
    int64_t widths[] = {H * D, G * D, G * D, W}, row = T * W * size, cache = T * G * room * D;
    Layer l = {.width = W, .heads = H, .key_heads = G, .head_width = D, .type = type, .exact = below(r, 2), .experts = E,
               .choices = A, .normed = below(r, 2), .score_type = below(r, 2) ? type : FLOAT32, .activation = 1 + below(r, 4),
               .alpha = 1.7f, .limit = 0.5f, .scale = 0.3f, .epsilon = {1e-6f, 1e-6f, 1e-6f, 1e-6f}};
    void *values[12] = {0}, *rows[6];
    for (int i = 0; i < 4; i++) {
        int64_t of_norm[] = {W, W, below(r, 2) ? D : H * D, below(r, 2) ? D : G * D};
        l.projection[i] = make_stack(r, 1, widths[i], i == 3 ? H * D : W, type, 0);
        fill(r, values[i] = malloc((size_t)(widths[i] * size)), type, widths[i]);
        l.bias[i] = below(r, 2) ? values[i] : 0;
        l.norm_type[i] = below(r, 2) ? type : FLOAT32, l.early[i] = below(r, 2);
        fill(r, values[4 + i] = malloc((size_t)(4 * of_norm[i])), l.norm_type[i], of_norm[i]);
        if (i >= 2 && below(r, 3)) *(of_norm[i] == D ? l.head_norm + i - 2 : l.row_norm + i - 2) = values[4 + i];
    }
    l.before = values[4], l.after = values[5];
    l.first = make_stack(r, E, 2 * I, W, type, 1), l.second = make_stack(r, E, W, I, type, 0);
    fill(r, values[8] = malloc((size_t)(E * W * size)), type, E * W), fill(r, values[9] = malloc((size_t)(E * size)), type, E);
    l.router = values[8], l.router_bias = below(r, 2) ? values[9] : 0;
    fill(r, values[10] = malloc((size_t)(P * R * size)), type, P * R), fill(r, values[11] = malloc((size_t)(P * R * size)), type, P * R);
    for (int i = 0; i < 6; i++) rows[i] = malloc((size_t)(i < 2 ? row : cache * size));
    fill(r, rows[0], type, T * W), fill(r, rows[2], type, cache), fill(r, rows[3], type, cache);
    memcpy(rows[4], rows[2], (size_t)(cache * size)), memcpy(rows[5], rows[3], (size_t)(cache * size));
    void *wanted = malloc((size_t)row);
    Step step = {rows[0], values[10], values[11], wanted, rows[2], rows[3], {G * room * D, room * D, D}, {G * room * D, room * D, D},
                 T, past, P, R, 1};
    if (qmoe_decode(qmoe_find_tier("scalar"), &l, &step)) abort();
    step.out = rows[1], step.keys = rows[4], step.values = rows[5];
    for (int tier = 0; qmoe_tiers[tier]; tier++) {
        if (!qmoe_tiers[tier]->usable()) continue;
        step.threads = 1 + below(r, 4);
        if (qmoe_decode(tier, &l, &step)) abort();
        if (memcmp(rows[1], wanted, (size_t)row) || memcmp(rows[4], rows[2], (size_t)(cache * size)) ||
            memcmp(rows[5], rows[3], (size_t)(cache * size))) {
            fprintf(stderr, "%s differs from scalar: decode, type %d, T %d, H %d, G %d, D %d, W %d, E %d, A %d, I %d, past %d\n",
                    qmoe_tier_name(tier), (int)type, (int)T, (int)H, (int)G, (int)D, (int)W, (int)E, (int)A, (int)I, (int)past);
            exit(1);
        }
    }
    for (int i = 0; i < 4; i++) drop(l.projection + i);
    drop(&l.first), drop(&l.second);
    for (int i = 0; i < 12; i++) free(values[i]);
    for (int i = 0; i < 6; i++) free(rows[i]);
    free(wanted);
}

static int64_t trials = 300;

static void *work(void *seed) {
    Random r = {(uint64_t)(size_t)seed * 7919 + 1};
    for (int64_t i = 0; i < trials; i++) trial(&r), attention_trial(&r), norm_trial(&r), router_trial(&r), turn_trial(&r), decode_trial(&r);
    return 0;
}

int main(int count, char **arguments) {
    pthread_t thread[3];
    if (count > 1) trials = atoi(arguments[1]);
    for (size_t i = 0; i < 3; i++)
        if (pthread_create(thread + i, 0, work, (void *)(i + 1))) return 1;
    for (size_t i = 0; i < 3; i++) pthread_join(thread[i], 0);
    printf("%d random calls, tiers:", 3 * (int)trials);
    for (int tier = 0; tier <= qmoe_find_tier("scalar"); tier++)
        if (usable(tier)) printf(" %s", qmoe_tier_name(tier));
    puts(": equal bits");
    return 0;
}
