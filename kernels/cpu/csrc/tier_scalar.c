// Plain C: the definition of what every instruction set computes.
#include "lanes.h"

INLINE void product_bits(const Block *b, const Rows *x, float *y, const int bits) {
    const uint8_t *codes = b->codes;
    int64_t at = 0;  // step * rows + row
    for (int64_t g = 0; g < b->groups; g++) {
        float scale[16];
        load(b->scales, b->scale_type, 16 * g, 16, scale);
        for (int64_t j = 0; j < b->steps; j++, codes += 64 * bits) {
            uint32_t v[8][16];
            unpack_step(codes, bits, v);
            for (int64_t t = 0; t < x->rows; t++, at++) FOR16(r) {
                int32_t zero = b->zeros ? b->zeros[16 * g + r] : (int32_t)b->offset;
                int32_t sum = x->ready ? x->sums[at] : zero * x->sums[at];
                for (int k = 0; k < STEP; k++) sum += (int32_t)(v[k / 4][r] >> 8 * (k % 4) & 255) * x->codes[STEP * at + k];
                y[16 * t + r] = __builtin_fmaf(scale[r] * x->scales[at], (float)sum, y[16 * t + r]);
            }
        }
    }
}

DEFINE_PRODUCTS

#include "lanes16.h"
// (attend.h is written in terms of it)
#include "route.h"
#include "turn.h"

DEFINE_TIER(qmoe_scalar, "scalar", 1)
