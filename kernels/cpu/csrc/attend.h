// A part of an attention and a row of a norm, written once in terms of `Lanes`: 16 floats, of which each
// tier says before it includes this how they are loaded and multiplied. All tiers give equal bits,
// because every sum has one order: lane by lane first, then lanes 8, 4, 2 and 1 apart.
#pragma once

#include "lanes.h"

INLINE float sum_of(Lanes lanes) {
    float v[16], s[8];
    lanes_store(v, lanes);
    for (int i = 0; i < 8; i++) s[i] = v[i] + v[i + 8];
    for (int i = 0; i < 4; i++) s[i] = s[i] + s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
}
INLINE float most_of(Lanes lanes) {
    float v[16];
    lanes_store(v, lanes);
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) v[i] = v[i] > v[i + n] ? v[i] : v[i + n];
    return v[0];
}

// Rounds n floats to a type and back.
INLINE void round_to(int64_t type, int64_t n, float *v) {
    if (type == BFLOAT16) for (int64_t i = 0; i < n; i++) v[i] = float_of((uint32_t)to_bfloat(v[i]) << 16);
    else if (type == FLOAT16) for (int64_t i = 0; i < n; i++) v[i] = from_half(to_half(v[i]));
}

enum { SOME = 512 };  // values of a row at once

static void norm(const Norm *norm, int64_t row) {
    int64_t width = norm->width, size = norm->type == FLOAT32 ? 4 : 2;
    const char *x = (const char *)norm->x + size * width * row;
    char *out = (char *)norm->out + size * width * row;
    float v[SOME] = {0}, w[SOME];
    Lanes squares = lanes_zero();
    for (int64_t at = 0; at < width; at += SOME) {
        int64_t n = width - at < SOME ? width - at : SOME;
        load(x, norm->type, at, (int)n, v);
        for (int64_t i = n; i < padded(n); i++) v[i] = 0.0f;
        for (int64_t i = 0; i < n; i += 16) {
            Lanes some = lanes_load(v + i);
            squares = lanes_fma(some, some, squares);
        }
    }
    float scale = 1.0f / sqrtf(sum_of(squares) / (float)width + norm->epsilon);
    for (int64_t at = 0; at < width; at += SOME) {
        int64_t n = width - at < SOME ? width - at : SOME;
        if (width > SOME) load(x, norm->type, at, (int)n, v);
        load(norm->weight, norm->weight_type, at, (int)n, w);
        for (int64_t i = 0; i < n; i++) v[i] = v[i] * scale;
        if (norm->early) round_to(norm->type, n, v);
        for (int64_t i = 0; i < n; i++) v[i] = v[i] * (norm->shift + w[i]);
        store(v, out + size * at, norm->type, n);
    }
}

// Rows of n values, `stride` apart, to floats in rows of `width`, zeros behind them.
INLINE void widen(const void *from, int64_t type, int64_t at, int64_t stride, int64_t rows, int64_t n, int64_t width, float *to) {
    for (int64_t r = 0; r < rows; r++, at += stride, to += width) {
        load(from, type, at, (int)n, to);
        for (int64_t i = n; i < width; i++) to[i] = 0.0f;
    }
}

// s [rows, KEYS] = q [rows, width] times k [keys, width], for `rows` by `keys` of them.
INLINE void scores_tile(const float *q, const float *k, int64_t width, float *s, const int rows, const int keys) {
    Lanes sum[SIDE_KEYS * SIDE_ROWS];
    for (int i = 0; i < keys * rows; i++) sum[i] = lanes_zero();
    for (int64_t d = 0; d < width; d += 16) {
        Lanes of_k[SIDE_KEYS];
        for (int j = 0; j < keys; j++) of_k[j] = lanes_load(k + width * j + d);
        for (int r = 0; r < rows; r++) {
            Lanes of_q = lanes_load(q + width * r + d);
            for (int j = 0; j < keys; j++) sum[rows * j + r] = lanes_fma(of_q, of_k[j], sum[rows * j + r]);
        }
    }
#ifdef LANES_SUMS
    if (rows == SIDE_ROWS) {
        LANES_SUMS(sum, s);
        return;
    }
#endif
    for (int j = 0; j < keys; j++)
        for (int r = 0; r < rows; r++) s[KEYS * r + j] = sum_of(sum[rows * j + r]);
}
INLINE void scores(const float *q, const float *k, int64_t width, int64_t rows, int64_t keys, float *s) {
    int64_t r = 0;
    for (; r + SIDE_ROWS <= rows; r += SIDE_ROWS)
        for (int64_t j = 0; j < keys; j += SIDE_KEYS)
            scores_tile(q + width * r, k + width * j, width, s + KEYS * r + j, SIDE_ROWS, SIDE_KEYS);
    for (; r < rows; r++)
        for (int64_t j = 0; j < keys; j += SIDE_KEYS)
            scores_tile(q + width * r, k + width * j, width, s + KEYS * r + j, 1, SIDE_KEYS);
}

// sum [rows, width] = sum * shrink [rows] + p [rows, KEYS] times v [keys, width].
INLINE void values_tile(const float *p, const float *v, int64_t width, int64_t keys, const float *shrink, float *sum,
                        const int rows, const int columns) {
    Lanes to[SIDE_ROWS][SIDE_COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) to[r][c] = lanes_mul(lanes_all(shrink[r]), lanes_load(sum + width * r + 16 * c));
    for (int64_t j = 0; j < keys; j++, v += width) {
        Lanes of_v[SIDE_COLUMNS];
        for (int c = 0; c < columns; c++) of_v[c] = lanes_load(v + 16 * c);
        for (int r = 0; r < rows; r++) {
            Lanes of_p = lanes_all(p[KEYS * r + j]);
            for (int c = 0; c < columns; c++) to[r][c] = lanes_fma(of_p, of_v[c], to[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) lanes_store(sum + width * r + 16 * c, to[r][c]);
}
INLINE void values_columns(const float *p, const float *v, int64_t width, int64_t rows, int64_t keys, const float *shrink,
                           float *sum, const int columns) {
    int64_t r = 0;
    for (; r + SIDE_ROWS <= rows; r += SIDE_ROWS)
        values_tile(p + KEYS * r, v, width, keys, shrink + r, sum + width * r, SIDE_ROWS, columns);
    for (; r < rows; r++) values_tile(p + KEYS * r, v, width, keys, shrink + r, sum + width * r, 1, columns);
}

// Scores become e^(scale score - top), or 0 where they are -inf; top and total (by lanes) go on, and
// `shrink` is what earlier sums are worth under the new top.
INLINE void weigh(float *s, int64_t keys, float scale, float *top, float *total, float *shrink) {
    Lanes most = lanes_all(-INFINITY);
    for (int64_t j = 0; j < keys; j += 16) most = lanes_max(lanes_load(s + j), most);
    float now = most_of(most) * scale;
    now = now > *top ? now : *top;
    // Nothing counts yet: all weights are 0, under any top.
    float base = now == -INFINITY ? 0.0f : now;
    *shrink = *top == -INFINITY ? 0.0f : exponential(*top - base);
    *top = now;
    for (int64_t j = 0; j < keys; j++) {
        float weight = exponential(s[j] * scale - base);
        s[j] = s[j] == -INFINITY ? 0.0f : weight;
    }
    Lanes sum = lanes_mul(lanes_load(total), lanes_all(*shrink));
    for (int64_t j = 0; j < keys; j += 16) sum = lanes_add(lanes_load(s + j), sum);
    lanes_store(total, sum);
}

// Which of `keys` keys from `first` on a row does not see.
INLINE void hide(const Attention *a, const Part *part, int64_t row, int64_t first, int64_t keys, float *s) {
    int64_t query = row / part->group, head = part->key_head * part->group + row % part->group;
    int64_t end = a->causal && query + 1 < a->keys ? query + 1 : a->keys;
    for (int64_t j = end > first ? end - first : 0; j < keys; j++) s[j] = -INFINITY;
    if (!a->mask) return;
    const int64_t *stride = a->mask_stride;
    const uint8_t *mask = a->mask + stride[0] * part->batch + stride[1] * head + stride[2] * query + first * stride[3];
    for (int64_t j = 0; j < keys && first + j < a->keys; j++) s[j] = mask[j * stride[3]] ? s[j] : -INFINITY;
}

static void attend(const Attention *a, const Part *part, float *sum, float *top, float *total) {
    float q[QUERIES * WIDEST], k[KEYS * WIDEST], s[QUERIES * KEYS], lanes[QUERIES][16], shrink[QUERIES];
    int64_t width = padded(a->width), value_width = padded(a->value_width), rows = part->rows;
    for (int64_t r = 0; r < rows; r++) {
        int64_t row = part->row + r, query = row / part->group, head = part->key_head * part->group + row % part->group;
        int64_t at = a->q_stride[0] * part->batch + a->q_stride[1] * head + a->q_stride[2] * query;
        widen(a->q, a->type, at, 0, 1, a->width, width, q + width * r);
        top[r] = -INFINITY;
    }
    memset(sum, 0, 4 * (size_t)(rows * value_width));
    memset(lanes, 0, sizeof lanes);
    int64_t end = part->key + part->keys, seen = (part->row + rows - 1) / part->group + 1;
    if (a->causal && seen < end) end = seen;
    for (int64_t first = part->key; first < end; first += KEYS) {
        int64_t keys = end - first < KEYS ? end - first : KEYS, whole = (keys + 15) / 16 * 16;
        int64_t at_k = a->k_stride[0] * part->batch + a->k_stride[1] * part->key_head + a->k_stride[2] * first;
        int64_t at_v = a->v_stride[0] * part->batch + a->v_stride[1] * part->key_head + a->v_stride[2] * first;
        widen(a->k, a->type, at_k, a->k_stride[2], keys, a->width, width, k);
        memset(k + width * keys, 0, 4 * (size_t)(width * (whole - keys)));
        scores(q, k, width, rows, whole, s);
        for (int64_t r = 0; r < rows; r++) {
            float *of_row = s + KEYS * r;
            for (int64_t j = keys; j < whole; j++) of_row[j] = -INFINITY;
            if (a->mask || a->causal) hide(a, part, part->row + r, first, keys, of_row);
            weigh(of_row, whole, a->scale, top + r, lanes[r], shrink + r);
        }
        widen(a->v, a->type, at_v, a->v_stride[2], keys, a->value_width, value_width, k);
        int64_t c = 0;
        for (; c + 16 * SIDE_COLUMNS <= value_width; c += 16 * SIDE_COLUMNS)
            values_columns(s, k + c, value_width, rows, keys, shrink, sum + c, SIDE_COLUMNS);
        for (; c < value_width; c += 16) values_columns(s, k + c, value_width, rows, keys, shrink, sum + c, 1);
    }
    for (int64_t r = 0; r < rows; r++) total[r] = sum_of(lanes_load(lanes[r]));
}
