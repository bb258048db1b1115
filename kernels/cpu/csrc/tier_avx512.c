// AVX-512 with VNNI: a vector holds all 16 rows.
#if defined(__x86_64__)
#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"
#include "target.h"
// (the target comes before the intrinsics)
#include <immintrin.h>

#include "lanes.h"

#define AHEAD 4096  // bytes that are fetched before they are needed
#define SIDE 4      // rows side by side

INLINE __m512 scales16(const uint8_t *at, int64_t type, int64_t group) {
    if (type == FLOAT32) return _mm512_loadu_ps(at + 64 * group);
    __m256i half = _mm256_loadu_si256((const __m256i *)(at + 32 * group));
    if (type == FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE void unpack(const uint8_t *c, const int bits, __m512i *v) {
    __m512i s[8];
    for (int i = 0; i < bits; i++) s[i] = _mm512_loadu_si512(c + 64 * i);
    if (bits == 8) for (int i = 0; i < 8; i++) v[i] = s[i];
    else if (bits == 4) {
        const __m512i mask = _mm512_set1_epi8(15);
        for (int i = 0; i < 8; i++) v[i] = _mm512_and_si512(i % 2 ? _mm512_srli_epi16(s[i / 2], 4) : s[i / 2], mask);
    } else {
        const __m512i mask = _mm512_set1_epi8(3), four = _mm512_set1_epi8(4);
        for (int i = 0; i < 8; i++) {
            v[i] = _mm512_and_si512(i % 4 ? _mm512_srli_epi16(s[i / 4], 2 * (i % 4)) : s[i / 4], mask);
            if (bits == 3) {
                __m512i top = i < 2 ? _mm512_slli_epi16(s[2], 2 - i) : _mm512_srli_epi16(s[2], i - 2);
                v[i] = _mm512_ternarylogic_epi32(v[i], top, four, 0xf8);  // v | (top & four)
            }
        }
    }
}

// A step of one or two blocks.
typedef struct {
    __m512i v[2][8], zero[2];
    __m512 scale[2];
} Weights;

// One step of `count` rows at once: their sums grow side by side, as each alone would wait for itself;
// and two blocks share what is loaded of x.
INLINE void multiply_rows(const Weights *w, const Rows *x, int64_t at, float *y, const int count, const int blocks) {
    const int8_t *q = x->codes + STEP * at;
    __m512i sum[SIDE][2];
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) {
            sum[r][b] = _mm512_set1_epi32(x->sums[at + r]);
            if (!x->ready) sum[r][b] = _mm512_madd_epi16(w->zero[b], sum[r][b]);  // |sum| < 2^15, zero < 2^8
        }
    for (int i = 0; i < 8; i++)
        for (int r = 0; r < count; r++) {
            int32_t four;
            memcpy(&four, q + STEP * r + 4 * i, 4);
            for (int b = 0; b < blocks; b++) sum[r][b] = _mm512_dpbusd_epi32(sum[r][b], w->v[b][i], _mm512_set1_epi32(four));
        }
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) {
            float *to = y + 16 * (x->rows * b + r);
            __m512 both = _mm512_mul_ps(w->scale[b], _mm512_set1_ps(x->scales[at + r]));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(both, _mm512_cvtepi32_ps(sum[r][b]), _mm512_loadu_ps(to)));
        }
}

INLINE void multiply_blocks(const Block *block, const Rows *x, float *y, const int bits, const int blocks) {
    const Rows rows = *x;
    const int64_t steps = block->steps;
    int64_t at = 0, step = 0;  // at: step * rows + row
    Weights w;
    for (int b = 0; b < blocks; b++) w.zero[b] = _mm512_set1_epi32((int)block->offset);
    for (int64_t g = 0; g < block->groups; g++) {
        for (int b = 0; b < blocks; b++) {
            w.scale[b] = scales16(block[b].scales, block->scale_type, g);
            if (block->zeros) w.zero[b] = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(block[b].zeros + 16 * g)));
        }
        for (int64_t j = 0; j < steps; j++, step++, at += rows.rows) {
            for (int b = 0; b < blocks; b++) {
                const uint8_t *codes = block[b].codes + 64 * bits * step;
                for (int i = 0; i < bits; i++) _mm_prefetch((const char *)codes + AHEAD + 64 * i, _MM_HINT_T0);
                unpack(codes, bits, w.v[b]);
            }
            int64_t t = 0;
            for (; t + SIDE <= rows.rows; t += SIDE) multiply_rows(&w, &rows, at + t, y + 16 * t, SIDE, blocks);
            for (; t < rows.rows; t++) multiply_rows(&w, &rows, at + t, y + 16 * t, 1, blocks);
        }
    }
}

INLINE void products_bits(const Block *b, int64_t count, const Rows *x, float *y, const int bits) {
    if (count == 2) multiply_blocks(b, x, y, bits, 2);
    else multiply_blocks(b, x, y, bits, 1);
}

typedef __m512 Lanes;
enum { SIDE_ROWS = 4, SIDE_KEYS = 4, SIDE_COLUMNS = 4 };
INLINE Lanes lanes_zero(void) { return _mm512_setzero_ps(); }
INLINE Lanes lanes_all(float f) { return _mm512_set1_ps(f); }
INLINE Lanes lanes_load(const float *v) { return _mm512_loadu_ps(v); }
INLINE void lanes_store(float *to, Lanes v) { _mm512_storeu_ps(to, v); }
INLINE Lanes lanes_mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
INLINE Lanes lanes_add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
INLINE Lanes lanes_max(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
INLINE Lanes lanes_fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }

// Sums of 16 vectors at once, in the order of sum_of: halves and quarters of vectors, then of these.
INLINE __m512 halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
INLINE __m512 quarters(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
INLINE void sums(const Lanes *sum, float *s) {
    __m512 key[4], two[2];
    for (int j = 0; j < 4; j++, sum += 4) key[j] = quarters(halves(sum[0], sum[1]), halves(sum[2], sum[3]));
    for (int j = 0; j < 2; j++)
        two[j] = _mm512_add_ps(_mm512_shuffle_ps(key[2 * j], key[2 * j + 1], 0x44),
                               _mm512_shuffle_ps(key[2 * j], key[2 * j + 1], 0xee));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd));
    _mm_storeu_ps(s, _mm512_castps512_ps128(all));
    _mm_storeu_ps(s + KEYS, _mm512_extractf32x4_ps(all, 1));
    _mm_storeu_ps(s + 2 * KEYS, _mm512_extractf32x4_ps(all, 2));
    _mm_storeu_ps(s + 3 * KEYS, _mm512_extractf32x4_ps(all, 3));
}
#define LANES_SUMS sums
#include "route.h"
#include "turn.h"

DEFINE_TIER(qmoe_avx512, "avx512vnni",
            __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
#include "target_end.h"
#endif
