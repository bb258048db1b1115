// The encoder in plain C.
#include "trellis.h"

static int64_t extend(const float *cost, const uint32_t *state, int64_t m, int bits, const float *aim, const float *values,
                      const float *penalty, float limit, float *to, uint32_t *from, int64_t room) {
    int64_t n = 0, B = (int64_t)1 << bits;
    for (int64_t i = 0; i < m && n < room; i++) {
        const float *row = values + (state[i] << bits & (STATES - 1));
        for (int64_t j = 0; j < B && n < room; j++) {
            float d = aim[i] - row[j], c = __builtin_fmaf(d, d, cost[i] + penalty[j]);
            to[n] = c;
            from[n] = (uint32_t)(i * B + j);
            n += c < limit;
        }
    }
    return n;
}

#include "trellis_beam.h"

const Encoder qmoe_encode_scalar = {scratch_bytes, search};
