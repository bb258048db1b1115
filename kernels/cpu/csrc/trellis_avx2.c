// The encoder with AVX2: eight continuations at once.
#if defined(__x86_64__)
#define TARGET "avx2,fma,popcnt"
#include "target.h"
#include <immintrin.h>
#include <pthread.h>

#include "trellis.h"

// For each set of lanes, their numbers one behind the other.
static uint64_t packed_lanes[256];
static pthread_once_t packed = PTHREAD_ONCE_INIT;

static void pack_lanes(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int lane = 0, n = 0; lane < 8; lane++)
            if (mask >> lane & 1) packed_lanes[mask] |= (uint64_t)lane << 8 * n++;
}

static inline __attribute__((always_inline)) int64_t extend_by(const float *cost, const uint32_t *state, int64_t m, const int bits,
                                                               const float *aim, const float *values, const float *penalty, float limit,
                                                               float *to, uint32_t *from, int64_t room) {
    const int B = 1 << bits, side = B < 8 ? 8 / B : 1, wide = B < 8 ? 1 : B / 8;
    const __m256 most = _mm256_set1_ps(limit);
    __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    int64_t n = 0, i = 0;
    for (; i + side <= m && n < room; i += side) {
        const float *row = values + (state[i] << bits & (STATES - 1));
        for (int j = 0; j < wide; j++) {
            __m256 value, c, goal;
            if (B >= 8) {
                value = _mm256_loadu_ps(row + 8 * j);
                c = _mm256_broadcast_ss(cost + i);
                goal = _mm256_broadcast_ss(aim + i);
            } else if (B == 4) {
                const float *other = values + (state[i + 1] << bits & (STATES - 1));
                value = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(other), 1);
                c = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_broadcast_ss(cost + i)), _mm_broadcast_ss(cost + i + 1), 1);
                goal = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_broadcast_ss(aim + i)), _mm_broadcast_ss(aim + i + 1), 1);
            } else {
                const float *r1 = values + (state[i + 1] << bits & (STATES - 1)), *r2 = values + (state[i + 2] << bits & (STATES - 1)),
                            *r3 = values + (state[i + 3] << bits & (STATES - 1));
                __m128 low = _mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)row)), (const __m64 *)r1);
                __m128 high = _mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)r2)), (const __m64 *)r3);
                value = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
                const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
                c = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(cost + i)), twice);
                goal = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(aim + i)), twice);
            }
            __m256 d = _mm256_sub_ps(goal, value);
            c = _mm256_fmadd_ps(d, d, _mm256_add_ps(c, _mm256_loadu_ps(penalty + 8 * j)));
            unsigned good = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(c, most, _CMP_LT_OQ));
            __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(packed_lanes + good)));
            _mm256_storeu_ps(to + n, _mm256_permutevar8x32_ps(c, order));
            _mm256_storeu_si256((__m256i *)(from + n), _mm256_permutevar8x32_epi32(number, order));
            number = _mm256_add_epi32(number, _mm256_set1_epi32(8));
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
    pthread_once(&packed, pack_lanes);
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

const Encoder qmoe_encode_avx2 = {scratch_bytes, search};
#include "target_end.h"
#endif
