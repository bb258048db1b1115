// NEON with dot products (ARMv8.2 and later): a vector holds 4 of the 16 rows.
#if defined(__aarch64__)
#define TARGET "arch=armv8.2-a+dotprod"
#include "target.h"
#include <arm_neon.h>

#include "lanes.h"

#if defined(__linux__)
#include <sys/auxv.h>
static int has_dotprod(void) { return (int)(getauxval(AT_HWCAP) >> 20 & 1); }  // HWCAP_ASIMDDP
#else
static int has_dotprod(void) { return 1; }  // every 64-bit Apple processor that runs today's macOS
#endif

INLINE void unpack(const uint8_t *c, const int bits, int8x16_t *v) {
    uint8x16_t s[8], u;
    for (int i = 0; i < bits; i++) s[i] = vld1q_u8(c + 64 * i);
    for (int i = 0; i < 8; i++) {
        if (bits == 8) u = veorq_u8(s[i], vdupq_n_u8(128));
        else if (bits == 4) u = i % 2 ? vshrq_n_u8(s[i / 2], 4) : vandq_u8(s[i / 2], vdupq_n_u8(15));
        else u = vandq_u8(vshlq_u8(s[i / 4], vdupq_n_s8((int8_t)(-2 * (i % 4)))), vdupq_n_u8(3));
        if (bits == 3) u = vorrq_u8(u, vandq_u8(vshlq_u8(s[2], vdupq_n_s8((int8_t)(2 - i))), vdupq_n_u8(4)));
        v[i] = vreinterpretq_s8_u8(u);
    }
}

INLINE int32x4_t dot(int32x4_t sum, const int8x16_t *v, const int8_t *q) {
    int8x16_t a = vld1q_s8(q), b = vld1q_s8(q + 16);
    sum = vdotq_laneq_s32(sum, v[0], a, 0);
    sum = vdotq_laneq_s32(sum, v[1], a, 1);
    sum = vdotq_laneq_s32(sum, v[2], a, 2);
    sum = vdotq_laneq_s32(sum, v[3], a, 3);
    sum = vdotq_laneq_s32(sum, v[4], b, 0);
    sum = vdotq_laneq_s32(sum, v[5], b, 1);
    sum = vdotq_laneq_s32(sum, v[6], b, 2);
    return vdotq_laneq_s32(sum, v[7], b, 3);
}

// 8-bit codes are taken as code - 128, which moves their zero point.
INLINE void product_bits(const Block *b, const Rows *x, float *y, const int bits) {
    const int32_t moved = bits == 8 ? 128 : 0;
    const uint8_t *codes = b->codes;
    int64_t at = 0;
    for (int64_t g = 0; g < b->groups; g++) {
        float scale[16];
        int32_t zero[16];
        load(b->scales, b->scale_type, 16 * g, 16, scale);
        FOR16(r) zero[r] = (b->zeros ? b->zeros[16 * g + r] : (int32_t)b->offset) - moved;
        for (int64_t j = 0; j < b->steps; j++, codes += 64 * bits, at += x->rows) {
            __builtin_prefetch(codes + 1024);
            for (int h = 0; h < 16; h += 4) {
                int8x16_t v[8];
                unpack(codes + 4 * h, bits, v);
                for (int64_t t = 0; t < x->rows; t++) {
                    int32_t start = x->sums[at + t];
                    int32x4_t sum = x->ready ? vdupq_n_s32(moved ? 0 : start) : vmulq_n_s32(vld1q_s32(zero + h), start);
                    sum = dot(sum, v, x->codes + STEP * (at + t));
                    float32x4_t both = vmulq_n_f32(vld1q_f32(scale + h), x->scales[at + t]);
                    float *to = y + 16 * t + h;
                    vst1q_f32(to, vfmaq_f32(vld1q_f32(to), both, vcvtq_f32_s32(sum)));
                }
            }
        }
    }
}

DEFINE_PRODUCTS

#include "lanes16.h"
// (attend.h is written in terms of it)
#include "route.h"
#include "turn.h"

DEFINE_TIER(qmoe_neon, "neon", has_dotprod())
#include "target_end.h"
#endif
