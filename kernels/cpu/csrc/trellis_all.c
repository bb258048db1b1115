// The search over all 65,536 states (Viterbi's algorithm): what the narrower one is measured against.
#include <string.h>

#include "trellis.h"

static int64_t scratch_bytes(int64_t beam) {
    (void)beam;
    return 4 * (int64_t)(2 * STATES) + (int64_t)LENGTH * STATES;
}

// best[g] and which: of the states whose low 16 - bits bits are g, the one with the least cost.
static inline __attribute__((always_inline)) void merge(const float *cost, int bits, float *best, uint8_t *which) {
    const int64_t groups = STATES >> bits;
    memcpy(best, cost, 4 * (size_t)groups);
    memset(which, 0, (size_t)groups);
    for (int x = 1; x < 1 << bits; x++)
        for (int64_t g = 0; g < groups; g++) {
            float c = cost[x * groups + g];
            which[g] = c < best[g] ? (uint8_t)x : which[g];
            best[g] = c < best[g] ? c : best[g];
        }
}

static float search(const Stretch *s, int64_t beam, void *scratch, uint16_t *states) {
    float *cost = scratch, *best = cost + STATES;
    uint8_t *which = (uint8_t *)(best + STATES);
    (void)beam;
    for (int64_t i = 0; i < STATES; i++) cost[i] = s->before < 0 || i == s->before ? 0.0f : 1e30f;
    for (int64_t step = 0; step < s->length; step++) {
        int64_t position = (s->start + step) % LENGTH;
        int bits = new_bits(position, s->twice), B = 1 << bits;
        float wanted = s->wanted[position];
        merge(cost, bits, best, which + step * STATES);
        for (int64_t g = 0; g < STATES >> bits; g++)
            for (int j = 0; j < B; j++) {
                float d = wanted - s->values[g * B + j];
                cost[g * B + j] = __builtin_fmaf(d, d, best[g]);
            }
    }
    int64_t at = s->after < 0 ? 0 : s->after;
    for (int64_t i = 0; s->after < 0 && i < STATES; i++)
        if (cost[i] < cost[at]) at = i;
    float error = cost[at];
    for (int64_t step = s->length - 1; step >= 0; step--) {
        int bits = new_bits((s->start + step) % LENGTH, s->twice);
        states[step] = (uint16_t)at;
        int64_t group = at >> bits;
        at = group | (int64_t)which[step * STATES + group] << (WINDOW - bits);
    }
    return error;
}

const Encoder qmoe_encode_all = {scratch_bytes, search};
