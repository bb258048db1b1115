// AVX-VNNI: 256-bit integer dot products on processors without AVX-512.
#include "qmoe_cpu.h"
#if HAVE_AVXVNNI
#define TARGET "avx2,fma,f16c,avxvnni"
#include "target.h"
#include "ymm.h"

#define PREPARE(v, bits)

INLINE __m256i DOT(__m256i sum, const __m256i *v, const int8_t *q, const int bits) {
    (void)bits;
    for (int i = 0; i < 8; i++) sum = _mm256_dpbusd_avx_epi32(sum, v[i], four_of(q, i));
    return sum;
}

DEFINE_PRODUCT(0)

DEFINE_PRODUCTS

DEFINE_TIER(qmoe_avxvnni, "avxvnni", has_avx2() && cpuid(7, 1, 0) >> 4 & 1)
#include "target_end.h"
#endif
