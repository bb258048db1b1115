// AVX2: products of bytes are summed in pairs to 16 bits, which must never saturate.
//
// Up to 4 bits: 8 pair sums of at most 2 * 15 * 127 fit in 16 bits, and a step has just 8.
// 8 bits: codes are taken as signed; |code| * (x with the code's sign) is at most 2 * 128 * 127.
#if defined(__x86_64__)
#define TARGET "avx2,fma,f16c"
#include "target.h"
#include "ymm.h"

INLINE void PREPARE(__m256i *v, const int bits) {
    for (int i = 0; i < 8 && bits == 8; i++) v[i] = _mm256_xor_si256(v[i], _mm256_set1_epi8(-128));
}

INLINE __m256i DOT(__m256i sum, const __m256i *v, const int8_t *q, const int bits) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (bits == 8) {
        for (int i = 0; i < 8; i++) {
            __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(v[i]), _mm256_sign_epi8(four_of(q, i), v[i]));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
        }
        return sum;
    }
    __m256i pairs = _mm256_maddubs_epi16(v[0], four_of(q, 0));
    for (int i = 1; i < 8; i++) pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(v[i], four_of(q, i)));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
}

DEFINE_PRODUCT(1)

DEFINE_PRODUCTS

DEFINE_TIER(qmoe_avx2, "avx2", has_avx2())
#include "target_end.h"
#endif
