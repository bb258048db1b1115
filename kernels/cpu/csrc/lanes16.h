// `Lanes` in plain C, for attend.h: 16 floats.
#pragma once
#include "lanes.h"

typedef struct {
    float v[16];
} Lanes;
enum { SIDE_ROWS = 2, SIDE_KEYS = 2, SIDE_COLUMNS = 2 };  // rows, keys and vectors of values side by side

INLINE Lanes lanes_all(float f) {
    Lanes a;
    FOR16(i) a.v[i] = f;
    return a;
}
INLINE Lanes lanes_zero(void) { return lanes_all(0.0f); }
INLINE Lanes lanes_load(const float *v) {
    Lanes a;
    memcpy(a.v, v, 64);
    return a;
}
INLINE void lanes_store(float *to, Lanes a) { memcpy(to, a.v, 64); }
INLINE Lanes lanes_mul(Lanes a, Lanes b) {
    FOR16(i) a.v[i] = a.v[i] * b.v[i];
    return a;
}
INLINE Lanes lanes_add(Lanes a, Lanes b) {
    FOR16(i) a.v[i] = a.v[i] + b.v[i];
    return a;
}
INLINE Lanes lanes_max(Lanes a, Lanes b) {
    FOR16(i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
INLINE Lanes lanes_fma(Lanes a, Lanes b, Lanes c) {
    FOR16(i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return c;
}
