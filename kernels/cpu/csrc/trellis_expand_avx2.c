// Expanding tiles of mul1 with AVX2: 16 windows at once, each from three bytes of the ring.
#if defined(__x86_64__)
#define TARGET "avx2,fma"
#include "target.h"
#include <immintrin.h>
#include <pthread.h>
#include <string.h>

#include "trellis_expand.h"

// Of every rate and lane of 8 positions: the word of the ring to load 16 bytes from, which of them are the first two
// bytes of each window and which is the third, and the power of two that shifts them to their place. Windows come in
// pairs of neighbouring inputs, so that pairs of two lanes make the four inputs of an output.
typedef struct {
    int32_t word[32];
    uint8_t two[32][16], third[32][16];
    uint16_t power[32][8];
} Plan;

static Plan plans[2 * MOST_BITS + 1];
static pthread_once_t planned = PTHREAD_ONCE_INIT;

static void make_plans(void) {
    for (int twice = 2; twice <= 2 * MOST_BITS; twice++) {
        Plan *plan = plans + twice;
        for (int t = 0; t < 32; t++) {
            int64_t start = ((end_of(8 * t, twice) - WINDOW) >> 5) * 4, most = TILE_CODES * twice / 16 - 16;
            start = start < most ? start : most;
            plan->word[t] = (int32_t)start;
            for (int j = 0; j < 8; j++) {
                int64_t first = end_of(8 * t + j, twice) - WINDOW, at = (first >> 3) - start;
                int byte[3];
                for (int b = 0; b < 3; b++) byte[b] = (int)(((at + b) & ~(int64_t)3) | (3 - ((at + b) & 3)));
                plan->two[t][2 * j] = (uint8_t)byte[1];
                plan->two[t][2 * j + 1] = (uint8_t)byte[0];
                plan->third[t][2 * j] = 128;
                plan->third[t][2 * j + 1] = (uint8_t)byte[2];
                plan->power[t][j] = (uint16_t)(1 << (first & 7));
            }
        }
    }
}


// The byte sums of lanes t and t + 1 in words.
static inline __attribute__((always_inline)) __m256i sums16(__m128i a, __m128i b, const Plan *plan, int t) {
    const __m256i ones = _mm256_set1_epi8(1), power = _mm256_loadu_si256((const __m256i *)plan->power[t]);
    __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    __m256i two = _mm256_shuffle_epi8(bytes, _mm256_loadu_si256((const __m256i *)plan->two[t]));
    __m256i third = _mm256_shuffle_epi8(bytes, _mm256_loadu_si256((const __m256i *)plan->third[t]));
    __m256i state = _mm256_or_si256(_mm256_mullo_epi16(two, power), _mm256_mulhi_epu16(third, power));
    __m256i low = _mm256_mullo_epi16(state, _mm256_set1_epi16((short)0xD12D));
    __m256i high = _mm256_add_epi16(_mm256_mulhi_epu16(state, _mm256_set1_epi16((short)0xD12D)),
                                    _mm256_mullo_epi16(state, _mm256_set1_epi16((short)0x83DC)));
    return _mm256_add_epi16(_mm256_maddubs_epi16(low, ones), _mm256_maddubs_epi16(high, ones));
}

static inline __attribute__((always_inline)) __m256i codes16(__m128i a, __m128i b, const Plan *plan, int t) {
    return _mm256_srli_epi16(_mm256_add_epi16(sums16(a, b, plan, t), _mm256_set1_epi16(2)), 2);
}

// The ring in front of the start of a tile of `size` bytes, and its first words.
static inline __attribute__((always_inline)) __m128i start_of(const uint8_t *tile, int64_t size) {
    int32_t before;
    memcpy(&before, tile + size - 4, 4);
    return _mm_insert_epi32(_mm_slli_si128(_mm_loadu_si128((const __m128i *)tile), 4), before, 0);
}

#define AT(p) _mm_loadu_si128((const __m128i *)(p))
#define AT_OR(word) (t == 0 && (word) < 0 ? start : AT(tile + (word)))

// Four vectors of four outputs from what lanes of one output each gave: x[c] has one word of inputs in each place.
static inline __attribute__((always_inline)) void store_turned(const __m128i *x, uint8_t *to, const int first, const int second) {
    __m128i a = _mm_unpacklo_epi32(x[0], x[1]), b = _mm_unpacklo_epi32(x[2], x[3]);
    __m128i c = _mm_unpackhi_epi32(x[0], x[1]), d = _mm_unpackhi_epi32(x[2], x[3]);
    _mm_storeu_si128((__m128i *)(to + 64 * first), _mm_unpacklo_epi64(a, b));
    _mm_storeu_si128((__m128i *)(to + 64 * second), _mm_unpackhi_epi64(a, b));
    _mm_storeu_si128((__m128i *)(to + 64 * first + 32), _mm_unpacklo_epi64(c, d));
    _mm_storeu_si128((__m128i *)(to + 64 * second + 32), _mm_unpackhi_epi64(c, d));
}

void qmoe_expand_avx2(const uint16_t *tiles, int64_t stride, int64_t count, int64_t twice, const uint8_t *table, uint8_t *codes) {
    (void)table;
    pthread_once(&planned, make_plans);
    const Plan *plan = plans + twice;
    const int64_t size = TILE_CODES * twice / 16;
    for (int64_t i = 0; i < count; i++, tiles += stride, codes += TILE_CODES) {
        const uint8_t *tile = (const uint8_t *)tiles;
        const __m128i start = start_of(tile, size);
        for (int c = 0; c < 8; c += 4) {
            __m128i even[4], odd[4];
            for (int k = 0; k < 4; k++) {
                int t = 4 * (c + k);
                const int32_t *word = plan->word + t;
                __m256i both = _mm256_packus_epi16(codes16(AT_OR(word[0]), AT_OR(word[1]), plan, t),
                                                   codes16(AT_OR(word[2]), AT_OR(word[3]), plan, t + 2));
                __m128i first = _mm256_castsi256_si128(both), second = _mm256_extracti128_si256(both, 1);
                even[k] = _mm_unpacklo_epi16(first, second);
                odd[k] = _mm_unpackhi_epi16(first, second);
            }
            store_turned(even, codes + 4 * c, 0, 2);
            store_turned(odd, codes + 4 * c, 1, 3);
        }
    }
}

// A row of x as words for lanes t and t + 1 of a tile, with t % 4 = 0 and 2.
static inline __attribute__((always_inline)) void words_of(const int8_t *codes, __m256i *words) {
    __m256i all = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)codes));
    words[0] = _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 0, 4, 1, 5, 1, 5));
    words[1] = _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(2, 6, 2, 6, 3, 7, 3, 7));
}

// Sums of outputs c and c + 8 of four vectors, each with four places of both: outputs 0 to 3, and 8 to 11.
static inline __attribute__((always_inline)) void gather(const __m256i *sum, __m128i *low, __m128i *high) {
    __m128i x[4];
    for (int c = 0; c < 4; c++) x[c] = _mm_add_epi32(_mm256_castsi256_si128(sum[c]), _mm256_extracti128_si256(sum[c], 1));
    __m128 a = _mm_castsi128_ps(_mm_hadd_epi32(x[0], x[1])), b = _mm_castsi128_ps(_mm_hadd_epi32(x[2], x[3]));
    *low = _mm_castps_si128(_mm_shuffle_ps(a, b, 0x88));
    *high = _mm_castps_si128(_mm_shuffle_ps(a, b, 0xdd));
}

void qmoe_direct_avx2(const uint16_t *tiles, int64_t stride, int64_t twice, int64_t steps, const Rows *x, float *y) {
    pthread_once(&planned, make_plans);
    const Plan *plan = plans + twice;
    const int64_t size = TILE_CODES * twice / 16, rows = x->rows;
    memset(y, 0, sizeof(float) * ROWS * (size_t)rows);
    for (int64_t s = 0, at = 0; s < steps; s++, at += rows) {
        __m256i sum[SOME_ROWS][8];
        memset(sum, 0, sizeof sum);
        for (int half = 0; half < 2; half++, tiles += stride) {
            const uint8_t *tile = (const uint8_t *)tiles;
            const __m128i start = start_of(tile, size);
            __m256i words[SOME_ROWS][2];
            for (int64_t r = 0; r < rows; r++) words_of(x->codes + STEP * (at + r) + SIDE_OF_TILE * half, words[r]);
            for (int t = 0; t < 32; t += 2) {
                const int32_t *word = plan->word + t;
                __m256i of_w = sums16(AT_OR(word[0]), AT_OR(word[1]), plan, t);
                for (int64_t r = 0; r < rows; r++)
                    sum[r][t / 4] = _mm256_add_epi32(sum[r][t / 4], _mm256_madd_epi16(of_w, words[r][t / 2 % 2]));
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            __m128i part[4];
            gather(sum[r], part, part + 2);
            gather(sum[r] + 4, part + 1, part + 3);
            for (int i = 0; i < 4; i++) {
                float *to = y + ROWS * r + 4 * i;
                __m128 values = _mm_cvtepi32_ps(_mm_add_epi32(part[i], _mm_set1_epi32(4 * x->sums[at + r])));
                _mm_storeu_ps(to, _mm_fmadd_ps(_mm_set1_ps(x->scales[at + r]), values, _mm_loadu_ps(to)));
            }
        }
    }
}
#include "target_end.h"
#endif
