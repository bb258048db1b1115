// Expanding tiles of mul1 with AVX-512 VBMI: 32 windows at once, cut out by vpmultishiftqb.
#if defined(__x86_64__)
#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx2"
#include "target.h"
#include <immintrin.h>
#include <pthread.h>
#include <string.h>

#include "trellis_expand.h"

// Of every rate and each vector of 32 windows: which bytes of a tile make its quarters of windows, from which of up
// to four registers, and where in them the bytes of the windows begin.
typedef struct {
    uint8_t byte[8][64], shift[8][64];
    __mmask64 from[8][4];
} Plan;

static Plan plans[2 * MOST_BITS + 1];
static pthread_once_t planned = PTHREAD_ONCE_INIT;

// Vector 2 i + h: for the packing that follows, lane L has outputs 4 L + 2 h and 4 L + 2 h + 1, inputs 4 i to 4 i + 3.
static void make_plans(void) {
    for (int twice = 2; twice <= 2 * MOST_BITS; twice++) {
        Plan *plan = plans + twice;
        int position_at[TILE_CODES];
        for (int p = 0; p < LENGTH; p++) position_at[place_of(p)] = p;
        for (int v = 0; v < 8; v++)
            for (int q = 0; q < 8; q++)
                for (int half = 0; half < 2; half++) {
                    int c = 4 * (q / 2) + 2 * (v % 2) + q % 2, p = position_at[64 * (v / 2) + 4 * c + 2 * half];
                    int64_t first = end_of(p, twice) - WINDOW, at = first >> 3;
                    for (int b = 0; b < 4; b++) {
                        int byte = byte_of(at + 3 - b, twice), lane = 8 * q + 4 * half + b;
                        plan->byte[v][lane] = (uint8_t)(byte % 64);
                        plan->from[v][byte / 64] |= (__mmask64)1 << lane;
                    }
                    for (int w = 0; w < 2; w++) {
                        int shift = 32 * half + 32 - WINDOW - (int)(end_of(p + w, twice) - WINDOW - 8 * at);
                        plan->shift[v][8 * q + 4 * half + 2 * w] = (uint8_t)shift;
                        plan->shift[v][8 * q + 4 * half + 2 * w + 1] = (uint8_t)(shift + 8);
                    }
                }
    }
}

// The products of 32 states with mul1's multiplier: their lower and upper 16 bits.
static inline __attribute__((always_inline)) void products32(const __m512i *tile, const int registers, const Plan *plan, int v,
                                                             __m512i *low, __m512i *high) {
    const __m512i index = _mm512_loadu_si512(plan->byte[v]);
    __m512i bytes = _mm512_permutexvar_epi8(index, tile[0]);
    for (int r = 1; r < registers; r++) bytes = _mm512_mask_permutexvar_epi8(bytes, plan->from[v][r], index, tile[r]);
    __m512i state = _mm512_multishift_epi64_epi8(_mm512_loadu_si512(plan->shift[v]), bytes);
    *low = _mm512_mullo_epi16(state, _mm512_set1_epi16((short)0xD12D));
    *high = _mm512_add_epi16(_mm512_mulhi_epu16(state, _mm512_set1_epi16((short)0xD12D)),
                             _mm512_mullo_epi16(state, _mm512_set1_epi16((short)0x83DC)));
}

static inline __attribute__((always_inline)) __m512i codes32(const __m512i *tile, const int registers, const Plan *plan, int v) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i low, high;
    products32(tile, registers, plan, v, &low, &high);
    __m512i sum = _mm512_add_epi16(_mm512_maddubs_epi16(low, ones), _mm512_maddubs_epi16(high, ones));
    return _mm512_srli_epi16(_mm512_add_epi16(sum, _mm512_set1_epi16(2)), 2);
}

static inline __mmask64 last_of(int64_t twice, int registers) { return ~(__mmask64)0 >> (64 * registers - TILE_CODES * twice / 16); }

static inline __attribute__((always_inline)) void expand(const uint16_t *tiles, int64_t stride, int64_t count, int64_t twice, uint8_t *codes,
                                                         const int registers) {
    const Plan *plan = plans + twice;
    const __mmask64 last = last_of(twice, registers);
    for (int64_t i = 0; i < count; i++, tiles += stride, codes += TILE_CODES) {
        __m512i tile[4];
        for (int r = 0; r < registers; r++)
            tile[r] = _mm512_maskz_loadu_epi8(r + 1 < registers ? ~(__mmask64)0 : last, (const char *)tiles + 64 * r);
        for (int v = 0; v < 8; v += 2)
            _mm512_storeu_si512(codes + 32 * v, _mm512_packus_epi16(codes32(tile, registers, plan, v), codes32(tile, registers, plan, v + 1)));
    }
}

void qmoe_expand_avx512(const uint16_t *tiles, int64_t stride, int64_t count, int64_t twice, const uint8_t *table, uint8_t *codes) {
    (void)table;
    pthread_once(&planned, make_plans);
    switch ((twice + 3) / 4) {
    case 1: expand(tiles, stride, count, twice, codes, 1); break;
    case 2: expand(tiles, stride, count, twice, codes, 2); break;
    case 3: expand(tiles, stride, count, twice, codes, 3); break;
    default: expand(tiles, stride, count, twice, codes, 4);
    }
}

// Outputs of vector 2 i + h: in lanes of 32 bits, two places for each, of inputs 4 i, 4 i + 1 and of the other two. A
// dot product with the bytes of a product, and x twice for each of its two weights, adds byte sums.
static inline __attribute__((always_inline)) void direct(const uint16_t *tiles, int64_t stride, int64_t twice, int64_t steps, const Rows *x,
                                                         float *y, const int registers, const int rows) {
    const Plan *plan = plans + twice;
    const __mmask64 last = last_of(twice, registers);
    __m512 to[SOME_ROWS];
    for (int r = 0; r < rows; r++) to[r] = _mm512_setzero_ps();
    for (int64_t s = 0, at = 0; s < steps; s++, at += rows) {
        __m512i sum[SOME_ROWS][2], more[SOME_ROWS][2];  // of lower and upper halves, which do not wait for each other
        int8_t twins[SOME_ROWS][2 * STEP] __attribute__((aligned(64)));
        for (int r = 0; r < rows; r++) {
            __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(x->codes + STEP * (at + r))));
            _mm512_store_si512(twins[r], _mm512_or_si512(codes, _mm512_slli_epi16(codes, 8)));
            sum[r][0] = sum[r][1] = more[r][0] = more[r][1] = _mm512_setzero_si512();
        }
        for (int half = 0; half < 2; half++, tiles += stride) {
            __m512i tile[4];
            _mm_prefetch((const char *)tiles + 2048, _MM_HINT_T0);
            for (int r = 0; r < registers; r++)
                tile[r] = _mm512_maskz_loadu_epi8(r + 1 < registers ? ~(__mmask64)0 : last, (const char *)tiles + 64 * r);
            for (int v = 0; v < 8; v++) {
                __m512i low, high;
                products32(tile, registers, plan, v, &low, &high);
                for (int r = 0; r < rows; r++) {
                    int64_t four;
                    memcpy(&four, twins[r] + STEP * half + 8 * (v / 2), 8);
                    __m512i of_x = _mm512_set1_epi64(four);
                    sum[r][v % 2] = _mm512_dpbusd_epi32(sum[r][v % 2], low, of_x);
                    more[r][v % 2] = _mm512_dpbusd_epi32(more[r][v % 2], high, of_x);
                }
            }
        }
        for (int r = 0; r < rows; r++) {
            __m512 a = _mm512_castsi512_ps(_mm512_add_epi32(sum[r][0], more[r][0]));
            __m512 b = _mm512_castsi512_ps(_mm512_add_epi32(sum[r][1], more[r][1]));
            __m512i both = _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd)));
            both = _mm512_add_epi32(both, _mm512_set1_epi32(4 * x->sums[at + r]));
            to[r] = _mm512_fmadd_ps(_mm512_set1_ps(x->scales[at + r]), _mm512_cvtepi32_ps(both), to[r]);
        }
    }
    for (int r = 0; r < rows; r++) _mm512_storeu_ps(y + ROWS * r, to[r]);
}

static inline __attribute__((always_inline)) void direct_rows(const uint16_t *tiles, int64_t stride, int64_t twice, int64_t steps,
                                                              const Rows *x, float *y, const int registers) {
    switch (x->rows) {
    case 1: direct(tiles, stride, twice, steps, x, y, registers, 1); break;
    case 2: direct(tiles, stride, twice, steps, x, y, registers, 2); break;
    case 3: direct(tiles, stride, twice, steps, x, y, registers, 3); break;
    default: direct(tiles, stride, twice, steps, x, y, registers, 4);
    }
}

void qmoe_direct_avx512(const uint16_t *tiles, int64_t stride, int64_t twice, int64_t steps, const Rows *x, float *y) {
    pthread_once(&planned, make_plans);
    switch ((twice + 3) / 4) {
    case 1: direct_rows(tiles, stride, twice, steps, x, y, 1); break;
    case 2: direct_rows(tiles, stride, twice, steps, x, y, 2); break;
    case 3: direct_rows(tiles, stride, twice, steps, x, y, 3); break;
    default: direct_rows(tiles, stride, twice, steps, x, y, 4);
    }
}
#include "target_end.h"
#endif
