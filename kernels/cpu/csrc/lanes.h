// What every instruction set computes in the same way, lane by lane: written once in plain C and
// compiled for each. Every operation is rounded alike everywhere (fused multiply-adds are spelled
// out), so all tiers give equal bits.
#pragma once

#include "exponential.h"
#include "qmoe_cpu.h"

#define FOR16(i) for (int i = 0; i < 16; i++)

// Subnormal halves come out right without subnormal floats, which a process may have switched off.
INLINE float from_half(uint16_t h) {
    uint32_t o = (uint32_t)(h & 0x7fff) << 13, exponent = o & 0x0f800000;
    float normal = float_of(o + (exponent == 0x0f800000 ? 0x70000000u : 0x38000000u));
    float small = float_of(o + 0x38800000u) - float_of(0x38800000u);
    return float_of(bits_of(exponent ? normal : small) | (uint32_t)(h & 0x8000) << 16);
}
INLINE uint16_t to_half(float f) {
    uint32_t u = bits_of(f), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    uint32_t small = bits_of(float_of(u) + 0.5f) - bits_of(0.5f);
    uint32_t normal = (u - 0x38000000u + 0xfff + (u >> 13 & 1)) >> 13;
    uint32_t large = u > 0x7f800000 ? 0x7e00 : 0x7c00;
    return (uint16_t)(sign | (u >= 0x47800000 ? large : u < 0x38800000 ? small : normal));
}
INLINE uint16_t to_bfloat(float f) {
    uint32_t u = bits_of(f);
    uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? (u >> 16 | 0x40) : rounded);
}

INLINE void load(const void *from, int64_t type, int64_t at, int n, float *to) {
    const uint16_t *half = (const uint16_t *)from + at;
    if (type == FLOAT32) memcpy(to, (const float *)from + at, 4 * (size_t)n);
    else if (type == BFLOAT16) for (int i = 0; i < n; i++) to[i] = float_of((uint32_t)half[i] << 16);
    else for (int i = 0; i < n; i++) to[i] = from_half(half[i]);
}
static void store(const float *from, void *to, int64_t type, int64_t n) {
    uint16_t *half = to;
    if (type == FLOAT32) memcpy(to, from, 4 * (size_t)n);
    else if (type == BFLOAT16) for (int i = 0; i < n; i++) half[i] = to_bfloat(from[i]);
    else for (int i = 0; i < n; i++) half[i] = to_half(from[i]);
}

// 32 values to codes of 127 / max|v|, halves to even. A step with a value that is not finite gets
// scale NaN and codes of 0, so that the outputs it reaches are NaN. Returns the codes' sum.
INLINE int32_t quantize_step(const float *v, int8_t *codes, float *scale) {
    int32_t top = 0, sum = 0;
    for (int i = 0; i < STEP; i++) {
        int32_t a = (int32_t)(bits_of(v[i]) & 0x7fffffff);
        top = a > top ? a : top;
    }
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    float most = float_of((uint32_t)top);
    int none = top >= 0x7f800000 || top < 0x0d800000;  // below 2^-100 it counts as 0
    float inverse = none ? 0.0f : 127.0f / most;
    *scale = top >= 0x7f800000 ? float_of(0x7fc00000) : none ? 0.0f : most / 127.0f;
    if (none) {
        memset(codes, 0, STEP);
        return 0;
    }
    for (int i = 0; i < STEP; i++) {
        int32_t q = (int32_t)(bits_of(v[i] * inverse + magic) - bits_of(magic));
        codes[i] = (int8_t)q;
        sum += q;
    }
    return sum;
}

static void pack(const void *x, int64_t type, int64_t k, int64_t piece, int64_t offset, Rows *to, int64_t r) {
    int64_t at = r;  // step * rows + r
    for (int64_t start = 0; start < k; start += piece)
        for (int64_t i = 0; i < piece; i += STEP, at += to->rows) {
            int n = (int)(piece - i < STEP ? piece - i : STEP);
            float v[STEP] = {0};
            if (n == STEP) load(x, type, start + i, STEP, v);
            else load(x, type, start + i, n, v);
            if (to->values) memcpy(to->values + STEP * at, v, sizeof v);
            else to->sums[at] = -(int32_t)offset * quantize_step(v, to->codes + STEP * at, to->scales + at);
        }
}

// The eight vectors of a step, as 16 words of four bytes.
INLINE void unpack_step(const uint8_t *codes, const int bits, uint32_t v[8][16]) {
    uint32_t s[8][16];
    memcpy(s, codes, 64 * (size_t)bits);
    for (int i = 0; i < 8; i++) FOR16(r) {
        if (bits == 8) v[i][r] = s[i][r];
        else if (bits == 4) v[i][r] = s[i / 2][r] >> 4 * (i % 2) & 0x0f0f0f0f;
        else v[i][r] = s[i / 4][r] >> 2 * (i % 4) & 0x03030303;
        if (bits == 3) v[i][r] |= (s[2][r] >> i & 0x01010101) << 2;
    }
}

INLINE void exact_bits(const Block *b, const Rows *x, float *y, const int bits) {
    const uint8_t *codes = b->codes;
    const float *values = x->values;
    memset(y, 0, 64 * (size_t)x->rows);
    for (int64_t g = 0; g < b->groups; g++) {
        float scale[16], zero[16];
        load(b->scales, b->scale_type, 16 * g, 16, scale);
        FOR16(r) zero[r] = b->zeros ? b->zeros[16 * g + r] : (float)b->offset;
        for (int64_t j = 0; j < b->steps; j++, codes += 64 * bits) {
            uint32_t v[8][16];
            float w[STEP][16];
            unpack_step(codes, bits, v);
            for (int k = 0; k < STEP; k++) FOR16(r) w[k][r] = (float)(int32_t)(v[k / 4][r] >> 8 * (k % 4) & 255) - zero[r];
            for (int64_t t = 0; t < x->rows; t++, values += STEP) {
                float sum[16] = {0};
                for (int k = 0; k < STEP; k++) FOR16(r) sum[r] = __builtin_fmaf(w[k][r], values[k], sum[r]);
                FOR16(r) y[16 * t + r] = __builtin_fmaf(scale[r], sum[r], y[16 * t + r]);
            }
        }
    }
}
static void exact(const Block *b, int64_t count, const Rows *x, float *y) {
    for (; count; count--, b++, y += 16 * x->rows) switch (b->bits) {
        case 2: exact_bits(b, x, y, 2); break;
        case 3: exact_bits(b, x, y, 3); break;
        case 4: exact_bits(b, x, y, 4); break;
        default: exact_bits(b, x, y, 8);
        }
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
// Abramowitz and Stegun 7.1.26, to 2e-7.
INLINE float error_function(float x) {
    float a = float_of(bits_of(x) & 0x7fffffff), t = 1.0f / __builtin_fmaf(0.3275911f, a, 1.0f);
    float p = __builtin_fmaf(1.061405429f, t, -1.453152027f);
    p = __builtin_fmaf(p, t, 1.421413741f);
    p = __builtin_fmaf(p, t, -0.284496736f);
    p = __builtin_fmaf(p, t, 0.254829592f);
    float e = 1.0f - p * t * exponential(-a * a);
    return float_of(bits_of(e) | (bits_of(x) & 0x80000000));
}

INLINE float between(int64_t activation, float alpha, float limit, float g, float u) {
    if (activation == SILU) return g * sigmoid(g) * u;
    if (activation == GELU) return 0.5f * g * (1.0f + error_function(g * 0.70710678f)) * u;
    if (activation == GELU_TANH) return g * sigmoid(1.59576912f * (g + 0.044715f * g * g * g)) * u;
    g = g > limit ? limit : g;
    u = u > limit ? limit : u;
    u = u < -limit ? -limit : u;
    return g * sigmoid(alpha * g) * (u + 1.0f);
}
INLINE void activate_one(const int64_t activation, float alpha, float limit, float *gate, const float *up, int64_t rows,
                         float *out, int64_t stride, int64_t n) {
    for (int64_t t = 0; t < rows; t++, gate += 16, up += 16, out += stride) {
        FOR16(r) gate[r] = between(activation, alpha, limit, gate[r], up[r]);
        if (n == 16) memcpy(out, gate, 64);
        else memcpy(out, gate, 4 * (size_t)n);
    }
}
static void activate(int64_t activation, float alpha, float limit, float *gate, float *up, int64_t rows, float *out,
                     int64_t stride, int64_t n) {
    switch (activation) {
    case SILU: activate_one(SILU, alpha, limit, gate, up, rows, out, stride, n); break;
    case GELU: activate_one(GELU, alpha, limit, gate, up, rows, out, stride, n); break;
    case GELU_TANH: activate_one(GELU_TANH, alpha, limit, gate, up, rows, out, stride, n); break;
    default: activate_one(CLAMPED_SWIGLU, alpha, limit, gate, up, rows, out, stride, n);
    }
}

static void add(float *sum, int64_t stride, const int64_t *row, const float *gate, const float *y, int64_t rows) {
    for (int64_t r = 0; r < rows; r++, y += 16) {
        float *to = sum + row[r] * stride;
        FOR16(i) to[i] = __builtin_fmaf(gate[r], y[i], to[i]);
    }
}
static void load_some(const void *from, int64_t type, int64_t at, int64_t n, float *to) { load(from, type, at, (int)n, to); }

// Products of blocks, for a tier that takes them one by one, from `product_bits(block, rows, y, bits)`.
#define DEFINE_PRODUCTS                                                                                          \
    INLINE void products_bits(const Block *b, int64_t count, const Rows *x, float *y, const int bits) {          \
        for (int64_t i = 0; i < count; i++) product_bits(b + i, x, y + 16 * x->rows * i, bits);                  \
    }

// A product function for each width from `products_bits(blocks, count, rows, y, bits)`, and the tier's table.
#define DEFINE_TIER(symbol, shown, usable_if)                                      \
    static void product(const Block *b, int64_t count, const Rows *x, float *y) {  \
        memset(y, 0, 64 * (size_t)(count * x->rows));                              \
        switch (b->bits) {                                                         \
        case 2: products_bits(b, count, x, y, 2); break;                           \
        case 3: products_bits(b, count, x, y, 3); break;                           \
        case 4: products_bits(b, count, x, y, 4); break;                           \
        default: products_bits(b, count, x, y, 8);                                 \
        }                                                                          \
    }                                                                              \
    static int usable(void) { return usable_if; }                                  \
    const Tier symbol = {shown, usable, pack, product, exact, activate, add, load_some, store, norm, turn, attend, dense, choose};
