// The heads of a token, normalised and rotated, in terms of what attend.h defines.
#pragma once

#include "attend.h"

static void turn(const Turn *turn, int64_t token) {
    int64_t size = turn->type == FLOAT32 ? 4 : 2, at = turn->turned * (token % turn->positions), n = turn->turned, half = n / 2;
    char *x = (char *)turn->x + size * turn->width * turn->heads * token;
    float cosine[WIDEST], sine[WIDEST], v[WIDEST], other[WIDEST];
    load(turn->cos, turn->type, at, (int)n, cosine);
    load(turn->sin, turn->type, at, (int)n, sine);
    const Norm of_head = {x, turn->weight, x, turn->heads, turn->width, turn->type, turn->weight_type, turn->early, 1,
                          turn->epsilon, turn->shift};
    for (int64_t h = 0; h < turn->heads; h++) {
        char *head = x + size * turn->width * h;
        if (turn->weight) norm(&of_head, h);
        load(head, turn->type, 0, (int)n, v);
        for (int64_t i = 0; i < half; i++) other[i] = -v[half + i] * sine[i];
        for (int64_t i = half; i < n; i++) other[i] = v[i - half] * sine[i];
        for (int64_t i = 0; i < n; i++) v[i] = v[i] * cosine[i];
        round_to(turn->type, n, v);
        round_to(turn->type, n, other);
        for (int64_t i = 0; i < n; i++) v[i] = v[i] + other[i];
        store(v, head, turn->type, n);
    }
}
