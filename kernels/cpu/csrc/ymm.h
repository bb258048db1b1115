// What AVX2 and AVX-VNNI share: a vector holds 8 of the 16 rows, so a block is gone through in two halves.
#pragma once
#include <immintrin.h>

#include "lanes.h"

// CPUID by hand: compilers differ in the names they know.
INLINE unsigned cpuid(unsigned leaf, unsigned part, int ecx) {
    unsigned a = leaf, b, c = part, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return ecx ? c : a;
}
INLINE int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpuid(1, 0, 1) >> 29 & 1;  // F16C
}

#define AHEAD 4096  // bytes that are fetched before they are needed

INLINE __m256 scales8(const uint8_t *at, int64_t type, int64_t first) {
    if (type == FLOAT32) return _mm256_loadu_ps((const float *)at + first);
    __m128i half = _mm_loadu_si128((const __m128i *)(at + 2 * first));
    if (type == FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE void unpack(const uint8_t *c, const int bits, __m256i *v) {
    __m256i s[8];
    for (int i = 0; i < bits; i++) s[i] = _mm256_loadu_si256((const __m256i *)(c + 64 * i));
    if (bits == 8) for (int i = 0; i < 8; i++) v[i] = s[i];
    else if (bits == 4) {
        const __m256i mask = _mm256_set1_epi8(15);
        for (int i = 0; i < 8; i++) v[i] = _mm256_and_si256(i % 2 ? _mm256_srli_epi16(s[i / 2], 4) : s[i / 2], mask);
    } else {
        const __m256i mask = _mm256_set1_epi8(3), four = _mm256_set1_epi8(4);
        for (int i = 0; i < 8; i++) {
            v[i] = _mm256_and_si256(i % 4 ? _mm256_srli_epi16(s[i / 4], 2 * (i % 4)) : s[i / 4], mask);
            if (bits == 3) {
                __m256i top = i < 2 ? _mm256_slli_epi16(s[2], 2 - i) : _mm256_srli_epi16(s[2], i - 2);
                v[i] = _mm256_or_si256(v[i], _mm256_and_si256(top, four));
            }
        }
    }
}

INLINE __m256i four_of(const int8_t *q, int i) {
    int32_t four;
    memcpy(&four, q + 4 * i, 4);
    return _mm256_set1_epi32(four);
}

// Defines product_bits from PREPARE(v, bits), done once for a step's vectors, and DOT(start, v, q, bits).
// SIGNED8: whether 8-bit codes are taken as code - 128, which moves their zero point.
#define DEFINE_PRODUCT(SIGNED8)                                                                                     \
    INLINE void product_bits(const Block *b, const Rows *x, float *y, const int bits) {                             \
        const int64_t rows = x->rows;                                                                               \
        const int32_t moved = SIGNED8 && bits == 8 ? 128 : 0;                                                       \
        const uint8_t *codes = b->codes;                                                                            \
        int64_t at = 0;                                                                                             \
        for (int64_t g = 0; g < b->groups; g++)                                                                     \
            for (int64_t j = 0; j < b->steps; j++, codes += 64 * bits, at += rows) {                                \
                for (int i = 0; i < bits; i++) _mm_prefetch((const char *)codes + AHEAD + 64 * i, _MM_HINT_T0);     \
                for (int h = 0; h < 16; h += 8) {                                                                   \
                    __m256 scale = scales8(b->scales, b->scale_type, 16 * g + h);                                   \
                    __m256i zero = _mm256_set1_epi32((int)b->offset), v[8];                                         \
                    if (b->zeros) zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(b->zeros + 16 * g + h))); \
                    zero = _mm256_sub_epi32(zero, _mm256_set1_epi32(moved));                                        \
                    zero = _mm256_and_si256(zero, _mm256_set1_epi32(0xffff)); /* the high half meets a sign */      \
                    unpack(codes + 4 * h, bits, v);                                                                 \
                    PREPARE(v, bits);                                                                               \
                    for (int64_t t = 0; t < rows; t++) {                                                            \
                        __m256i sum = _mm256_set1_epi32(x->ready && moved ? 0 : x->sums[at + t]);                   \
                        if (!x->ready) sum = _mm256_madd_epi16(zero, sum);                                          \
                        sum = DOT(sum, v, x->codes + STEP * (at + t), bits);                                        \
                        __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x->scales[at + t]));                      \
                        float *to = y + 16 * t + h;                                                                 \
                        _mm256_storeu_ps(to, _mm256_fmadd_ps(both, _mm256_cvtepi32_ps(sum), _mm256_loadu_ps(to)));  \
                    }                                                                                               \
                }                                                                                                   \
            }                                                                                                       \
    }

typedef struct {
    __m256 low, high;
} Lanes;
enum { SIDE_ROWS = 2, SIDE_KEYS = 2, SIDE_COLUMNS = 2 };  // what 16 registers hold
INLINE Lanes lanes_zero(void) { return (Lanes){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Lanes lanes_all(float f) { return (Lanes){_mm256_set1_ps(f), _mm256_set1_ps(f)}; }
INLINE Lanes lanes_load(const float *v) { return (Lanes){_mm256_loadu_ps(v), _mm256_loadu_ps(v + 8)}; }
INLINE void lanes_store(float *to, Lanes a) {
    _mm256_storeu_ps(to, a.low);
    _mm256_storeu_ps(to + 8, a.high);
}
INLINE Lanes lanes_mul(Lanes a, Lanes b) {
    return (Lanes){_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
INLINE Lanes lanes_add(Lanes a, Lanes b) {
    return (Lanes){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
INLINE Lanes lanes_max(Lanes a, Lanes b) {
    return (Lanes){_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
INLINE Lanes lanes_fma(Lanes a, Lanes b, Lanes c) {
    return (Lanes){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
#include "route.h"
#include "turn.h"
