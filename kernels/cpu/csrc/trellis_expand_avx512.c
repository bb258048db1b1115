// Expanding tiles of mul1 with AVX-512 VBMI: 32 windows at once, cut out by vpmultishiftqb.
#if defined(__x86_64__)
#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2"
#include "target.h"
#include <immintrin.h>
#include <pthread.h>

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

static inline __attribute__((always_inline)) __m512i codes32(const __m512i *tile, const int registers, const Plan *plan, int v) {
    const __m512i ones = _mm512_set1_epi8(1), index = _mm512_loadu_si512(plan->byte[v]);
    __m512i bytes = _mm512_permutexvar_epi8(index, tile[0]);
    for (int r = 1; r < registers; r++) bytes = _mm512_mask_permutexvar_epi8(bytes, plan->from[v][r], index, tile[r]);
    __m512i state = _mm512_multishift_epi64_epi8(_mm512_loadu_si512(plan->shift[v]), bytes);
    // state * 0x83DCD12D in two halves of 16 bits
    __m512i low = _mm512_mullo_epi16(state, _mm512_set1_epi16((short)0xD12D));
    __m512i high = _mm512_add_epi16(_mm512_mulhi_epu16(state, _mm512_set1_epi16((short)0xD12D)),
                                    _mm512_mullo_epi16(state, _mm512_set1_epi16((short)0x83DC)));
    __m512i sum = _mm512_add_epi16(_mm512_maddubs_epi16(low, ones), _mm512_maddubs_epi16(high, ones));
    return _mm512_srli_epi16(_mm512_add_epi16(sum, _mm512_set1_epi16(2)), 2);
}

static inline __attribute__((always_inline)) void expand(const uint16_t *tiles, int64_t stride, int64_t count, int64_t twice, uint8_t *codes,
                                                         const int registers) {
    const Plan *plan = plans + twice;
    const __mmask64 last = ~(__mmask64)0 >> (64 * registers - TILE_CODES * twice / 16);
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
#include "target_end.h"
#endif
