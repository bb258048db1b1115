// What a router computes, in terms of `Lanes` (attend.h).
#pragma once

#include "attend.h"

// As declared in Tier, for `rows` rows of the weight, each with a sum of its own for every token.
INLINE void dense_rows(const float *x, int64_t tokens, int64_t width, const void *weight, int64_t type, float *y, int64_t stride,
                       const int rows) {
    Lanes sum[FEW][SIDE_KEYS];
    float w[SIDE_KEYS][SOME];
    for (int64_t t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) sum[t][r] = lanes_zero();
    for (int64_t at = 0; at < width; at += SOME) {
        int64_t n = width - at < SOME ? width - at : SOME;
        for (int r = 0; r < rows; r++) {
            load(weight, type, width * r + at, (int)n, w[r]);
            for (int64_t i = n; i < padded(n); i++) w[r][i] = 0.0f;
        }
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t i = 0; i < n; i += 16) {
                Lanes of_x = lanes_load(x + padded(width) * t + at + i);
                for (int r = 0; r < rows; r++) sum[t][r] = lanes_fma(of_x, lanes_load(w[r] + i), sum[t][r]);
            }
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) y[stride * t + r] = sum_of(sum[t][r]);
}
static void dense(const float *x, int64_t tokens, int64_t width, const void *weight, int64_t type, int64_t n, float *y) {
    int64_t e = 0, size = type == FLOAT32 ? 4 : 2;
    const char *rows = weight;
    for (; e + SIDE_KEYS <= n; e += SIDE_KEYS)
        dense_rows(x, tokens, width, rows + size * width * e, type, y + e, n, SIDE_KEYS);
    for (; e < n; e++) dense_rows(x, tokens, width, rows + size * width * e, type, y + e, n, 1);
}

INLINE int is_larger(float a, float b) { return a > b || (a != a && b == b); }

static void choose(const Router *router, int64_t token, float *v) {
    int64_t E = router->experts, A = router->choices, *ids = router->ids + A * token, n = 0;
    float scores[A], total = 0.0f;
    for (int64_t e = 0; e < E; e++) {
        if (n == A && !is_larger(v[e], scores[A - 1])) continue;
        int64_t at = n < A ? n++ : A - 1;
        for (; at && is_larger(v[e], scores[at - 1]); at--) scores[at] = scores[at - 1], ids[at] = ids[at - 1];
        scores[at] = v[e];
        ids[at] = e;
    }
    const float top = scores[0];
    for (int64_t a = 0; a < A; a++) scores[a] = exponential(scores[a] - top);
    if (router->normed) {
        for (int64_t a = 0; a < A; a++) total = total + scores[a];
    } else {
        for (int64_t e = 0; e < E; e++) v[e] = exponential(v[e] - top);
        for (int64_t e = 0; e < E; e++) total = total + v[e];
    }
    for (int64_t a = 0; a < A; a++) scores[a] = scores[a] / total;
    store(scores, (char *)router->scores + (router->score_type == FLOAT32 ? 4 : 2) * A * token, router->score_type, A);
}
