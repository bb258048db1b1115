// The encoder with AVX-512: sixteen continuations at once.
#if defined(__x86_64__)
#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,popcnt"
#include "target.h"
#include <immintrin.h>

#include "trellis.h"

static inline __attribute__((always_inline)) __m512 rows_of(const float *values, const uint32_t *state, const int bits) {
    const float *row[8];
    const int side = bits < 4 ? 16 >> bits : 1;
    for (int r = 0; r < side; r++) row[r] = values + (state[r] << bits & (STATES - 1));
    if (bits == 3) return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(row[0])), _mm256_loadu_ps(row[1]), 1);
    __m128 quarter[4];
    for (int q = 0; q < 4; q++)
        quarter[q] = bits == 2 ? _mm_loadu_ps(row[q])
                               : _mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)row[2 * q])), (const __m64 *)row[2 * q + 1]);
    __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(quarter[0]), quarter[1], 1);
    __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(quarter[2]), quarter[3], 1);
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

// Of each of 1, 2, 4 or 8 survivors its number, once for every symbol.
static inline __attribute__((always_inline)) __m512 spread(const float *from, __m512i lanes, const int side) {
    if (side == 1) return _mm512_set1_ps(*from);
    return _mm512_permutexvar_ps(lanes, side == 8 ? _mm512_castps256_ps512(_mm256_loadu_ps(from)) : _mm512_castps128_ps512(_mm_loadu_ps(from)));
}

static inline __attribute__((always_inline)) int64_t extend_by(const float *cost, const uint32_t *state, int64_t m, const int bits,
                                                               const float *aim, const float *values, const float *penalty, float limit,
                                                               float *to, uint32_t *from, int64_t room) {
    const int B = 1 << bits, side = B < 16 ? 16 / B : 1, wide = B < 16 ? 1 : B / 16;
    const __m512 most = _mm512_set1_ps(limit);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i lanes = _mm512_srli_epi32(lane, (unsigned)(bits < 4 ? bits : 4));
    __m512i number = lane;
    int64_t n = 0, i = 0;
    for (; i + side <= m && n < room; i += side) {
        const __m512 before = spread(cost + i, lanes, side), goal = spread(aim + i, lanes, side);
        const float *row = values + (state[i] << bits & (STATES - 1));
        for (int j = 0; j < wide; j++) {
            __m512 d = _mm512_sub_ps(goal, side == 1 ? _mm512_loadu_ps(row + 16 * j) : rows_of(values, state + i, bits));
            __m512 c = _mm512_fmadd_ps(d, d, _mm512_add_ps(before, _mm512_loadu_ps(penalty + 16 * j)));
            __mmask16 good = _mm512_cmp_ps_mask(c, most, _CMP_LT_OQ);
            // Compressed in a register: straight to memory is slow on some processors.
            _mm512_storeu_ps(to + n, _mm512_maskz_compress_ps(good, c));
            _mm512_storeu_si512(from + n, _mm512_maskz_compress_epi32(good, number));
            number = _mm512_add_epi32(number, _mm512_set1_epi32(16));
            n += __builtin_popcount(good);
        }
    }
    for (; i < m && n < room; i++)
        for (int j = 0; j < B; j++) {
            float d = aim[i] - values[(state[i] << bits & (STATES - 1)) + (uint32_t)j], c = __builtin_fmaf(d, d, cost[i] + penalty[j]);
            to[n] = c;
            from[n] = (uint32_t)(i * B + j);
            n += c < limit;
        }
    return n;
}

static int64_t extend(const float *cost, const uint32_t *state, int64_t m, int bits, const float *aim, const float *values,
                      const float *penalty, float limit, float *to, uint32_t *from, int64_t room) {
#define WITH(n) \
    case n: return extend_by(cost, state, m, n, aim, values, penalty, limit, to, from, room)
    switch (bits) {
        WITH(1);
        WITH(2);
        WITH(3);
        WITH(4);
        WITH(5);
        WITH(6);
        WITH(7);
    default: return extend_by(cost, state, m, 8, aim, values, penalty, limit, to, from, room);
    }
#undef WITH
}

#include "trellis_beam.h"

const Encoder qmoe_encode_avx512 = {scratch_bytes, search};
#include "target_end.h"
#endif
