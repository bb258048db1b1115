// Products with coded matrices: what Python hands over.
#pragma once
#include "qmoe_cpu.h"

// The matrices [n, k] of all experts in one rate and codebook, filled up to wide_n, wide_k. Tiles that share their
// outputs lie one behind the other, so that they are read in one stream.
typedef struct {
    const uint16_t *trellis, *suh, *svh;  // [E, wide_n / 16, wide_k / 16, 8 twice], [E, wide_k], [E, wide_n]
    const uint8_t *table;                 // [65536] of every state its 8-bit code, 128 near 0
    const float *bias;                    // [E, parts n] of the stack that it is a part of, or NULL
    int64_t n, k, wide_n, wide_k, twice, fast;  // fast: codes of mul1, which vectors compute
    float step, offset;                   // a value is step (code - 128) + offset
} Coded;

// One call, as `Call` of qmoe_cpu.h. parts: matrices that the first stack is made of, one or two; second: whether
// there is one. Without it out is [T * A, n of all parts].
typedef struct {
    const void *x;
    void *out;
    const int64_t *ids;
    const float *gates;
    int64_t tokens, choices, only, type, activation, threads, experts, parts, has_second;
    float alpha, limit;
    Coded first[2], second;
} CodedCall;

// 0, or 1 if memory ran out.
EXPORTED int qmoe_run_coded(int tier, const CodedCall *call);
