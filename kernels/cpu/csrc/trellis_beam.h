// The M-algorithm: at each position every survivor is continued in all ways, and about `beam` of the best go on.
//
// A tier defines, before it includes this,
//   extend(cost, state, m, bits, aim, values, penalty, limit, to, from, room): the continuations of m survivors
//   that cost less than `limit`, in order: costs and survivor << bits | symbol. It stops once there are `room` of
//   them, and may write SPARE more. Returns how many there are. aim: the value that each survivor wants.
//
// With a shape every survivor has errors of its own behind it, and so its own wanted values: `Owed` is what its errors
// add to them. The least error is then that under the block's Hessian, and not under its diagonal.
#pragma once
#include <string.h>

enum { SAMPLE = 128, MOST = 1 << MOST_BITS, SPARE = MOST + 16, WIDER = 8 };

// How many survivors there may be where `beam` are wanted: a sample says which cost that is.
static int64_t room_of(int64_t beam) { return beam + beam / 2 + 64; }

static int64_t scratch_bytes(int64_t beam) {
    int64_t row = room_of(beam) + SPARE, wide = room_of(WIDER * beam) + SPARE;
    return 4 * ((9 + 2 * PAIR) * wide + LENGTH * row + 2 * WINDOW * wide);
}

// Costs are never negative, so as integers they have the same order.
static int32_t order_of(float x) {
    int32_t order;
    memcpy(&order, &x, 4);
    return order;
}

// About the `target`-th smallest of n costs; `guess` is tried first as a bound from above.
static float quantile(const float *cost, int64_t n, int64_t target, float guess) {
    int32_t order[2 * SAMPLE], low = order_of(guess), high = low, top = 0, least = low, below = 0;
    memcpy(order, cost, 4 * (size_t)n);
    for (int64_t i = 0; i < n; i++) {
        below += order[i] < high;
        top = order[i] > top ? order[i] : top;
        least = order[i] < least ? order[i] : least;
    }
    if (below < target) high = top + 1;
    else low = least;
    for (int round = 0; round < 8; round++) {
        int32_t middle = low + (high - low) / 2, count = 0;
        for (int64_t i = 0; i < n; i++) count += order[i] < middle;
        if (count < target) low = middle;
        else high = middle;
    }
    float limit;
    memcpy(&limit, &high, 4);
    return limit;
}

// The cost that about `beam` continuations stay below, from those of evenly spaced survivors.
static float limit_of(const float *cost, const uint32_t *state, int64_t m, int bits, const float *aim, const float *values,
                      const float *penalty, int64_t beam, float guess) {
    float some[SAMPLE], goal[SAMPLE], sample[2 * SAMPLE + SPARE];
    uint32_t of[SAMPLE], unused[2 * SAMPLE + SPARE];
    int64_t survivors = SAMPLE >> bits, n;
    if (survivors < 16) survivors = bits == 8 ? 1 : 16 >> (bits > 4 ? bits - 4 : 0);
    if (survivors > m) survivors = m;
    float stride = (float)m / (float)survivors, at = 0.5f * stride;
    for (int64_t i = 0; i < survivors; i++, at += stride) {
        some[i] = cost[(int32_t)at];
        of[i] = state[(int32_t)at];
        goal[i] = aim[(int32_t)at];
    }
    n = extend(some, of, survivors, bits, goal, values, penalty, 3e38f, sample, unused, 2 * SAMPLE);
    int64_t target = (n * beam + (m << bits) / 2) / (m << bits);
    return quantile(sample, n, target < 1 ? 1 : target, guess);
}

// Where nothing comes before, the survivors to begin with: spread over all states.
static uint32_t first_state(int64_t i) { return (uint32_t)(i * 40503) & (STATES - 1); }

// The states that choices lead to.
static void follow(const uint32_t *restrict choice, int64_t n, int bits, const uint32_t *restrict state, uint32_t *restrict to) {
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t i = 0; i < n; i++) to[i] = (state[choice[i] >> bits] << bits | (choice[i] & mask)) & (STATES - 1);
}

// Ahead of symbols that are fixed there must be more survivors: one of them has to be near with what it is given.
static int64_t widened(const Stretch *s, int64_t step, int64_t beam) {
    uint32_t want;
    int64_t ahead = 0;
    if (s->after < 0) return beam;
    while (ahead < 4 && !fixed_bits(s, step + ahead, &want)) ahead++;
    return ahead < 2 ? WIDER * beam : ahead < 4 ? WIDER / 2 * beam >> (ahead - 2) : beam;
}

#define SWAP(type, a, b)   \
    do {                   \
        type *swapped = a; \
        a = b;             \
        b = swapped;       \
    } while (0)

// The visit of a position's column, and the column: the first or the second of its pair.
static int visit_of(int64_t position) { return (int)(position % PAIR / 8 * 4 + position % 4); }
static int column_of(int64_t position) { return (int)(position / 4 % 2); }

// What survivors' errors add to the values that they want at the visits of a column. owed: rows of 16, and for each
// survivor its row: survivors that went on together share one until an error of theirs comes to it.
typedef float Visits __attribute__((vector_size(2 * VISITS), aligned(4), may_alias));  // half of them
typedef struct {
    float *owed, *spare;
    uint32_t *row, *spare_row;
} Owed;

static void aims(const Owed *owed, int64_t m, float wanted, int visit, float *aim) {
    for (int64_t i = 0; i < m; i++) aim[i] = owed ? wanted + owed->owed[VISITS * owed->row[i] + visit] : wanted;
}

// Survivors have gone on by `choice`, with errors in the column `here`.
static void owe(const Stretch *s, int64_t position, int bits, const uint32_t *restrict choice, int64_t n, const uint32_t *restrict state,
                Owed *here, Owed *other) {
    const float wanted = s->wanted[position], *restrict values = s->values;
    const Visits *adds = (const Visits *)(s->shape + VISITS * visit_of(position)), first = adds[0], second = adds[1];
    const int early = visit_of(position) < VISITS / 2;
    const float *restrict owed = here->owed;
    const uint32_t *restrict row = here->row, *restrict old = other->row;
    float *restrict now = here->spare;
    uint32_t *restrict row_now = here->spare_row, *restrict old_now = other->spare_row;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t parent = choice[i] >> bits;
        const float error = wanted - values[state[i]], *before = owed + VISITS * row[parent];
        Visits *after = (Visits *)(now + VISITS * i);
        // What is behind the first half of the visits is owed to the second alone.
        if (early) after[0] = ((const Visits *)before)[0] + error * first;
        after[1] = ((const Visits *)before)[1] + error * second;
        row_now[i] = (uint32_t)i;
        old_now[i] = old[parent];
    }
    SWAP(float, here->owed, here->spare);
    SWAP(uint32_t, here->row, here->spare_row);
    SWAP(uint32_t, other->row, other->spare_row);
}

// The weight of a position's squared errors.
static float weight_of(const Stretch *s, int64_t step) {
    return s->shape ? s->shape[VISITS * VISITS + visit_of((s->start + step) % LENGTH)] : 1.0f;
}

// The symbols that led to the survivor `best`, as the states behind them.
static void trace(const Stretch *s, int64_t best, uint32_t *const *record, uint16_t *states) {
    for (int64_t step = s->length - 1; step >= 0; step--) {
        int bits = new_bits((s->start + step) % LENGTH, s->twice);
        uint32_t choice = record[step][best];
        states[step] = (uint16_t)(choice & ((1u << bits) - 1));
        best = choice >> bits;
    }
    uint32_t at = s->before >= 0 ? (uint32_t)s->before : first_state(best);
    for (int64_t step = 0; step < s->length; step++) {
        at = (at << new_bits((s->start + step) % LENGTH, s->twice) | states[step]) & (STATES - 1);
        states[step] = (uint16_t)at;
    }
}

// Costs are kept in units of the weight of the position at hand.
static float search(const Stretch *s, int64_t beam, void *scratch, uint16_t *states) {
    int64_t wide = room_of(WIDER * beam) + SPARE, m = s->before >= 0 ? 1 : beam;
    float *cost = scratch, *next = cost + wide, *aim = next + wide;
    float penalty[MOST] = {0}, limit = 1.0f, weight = 1.0f;
    uint32_t *state = (uint32_t *)(aim + wide), *from = state + wide, *record[LENGTH], *free = from + wide;
    Owed owed[2];
    for (int c = 0; c < 2; c++, free += (2 + PAIR) * wide) owed[c] = (Owed){(float *)free, (float *)free + VISITS * wide, free + PAIR * wide, free + (1 + PAIR) * wide};
    for (int64_t i = 0; i < m; i++) {
        cost[i] = 0;
        state[i] = s->before >= 0 ? (uint32_t)s->before : first_state(i);
    }
    for (int64_t step = 0; step < s->length; step++) {
        int64_t position = (s->start + step) % LENGTH, wanted_now = widened(s, step, beam), room = room_of(wanted_now);
        int bits = new_bits(position, s->twice);
        uint32_t want, fixed = fixed_bits(s, step, &want);
        if (fixed)
            for (uint32_t j = 0; j < MOST; j++) penalty[j] = (j ^ want) & fixed ? 1e30f : 0.0f;
        Owed *here = s->shape ? &owed[column_of(position)] : NULL;
        if (here && (step == 0 || position % PAIR == 0))
            for (int c = 0; c < 2; c++) {
                memset(owed[c].owed, 0, VISITS * 4);
                memset(owed[c].row, 0, (size_t)m * 4);
            }
        aims(here, m, s->wanted[position], visit_of(position), aim);
        if (here) {
            float ratio = weight / weight_of(s, step);
            for (int64_t i = 0; i < m; i++) cost[i] *= ratio;
            limit *= ratio;
            weight = weight_of(s, step);
        }
        record[step] = free;
        int64_t ways = m << (bits - __builtin_popcount(fixed)), n = 0;
        if (ways > wanted_now) {
            limit = limit_of(cost, state, m, bits, aim, s->values, penalty, wanted_now, limit);
            n = extend(cost, state, m, bits, aim, s->values, penalty, limit, next, free, room);
        }
        // Few enough, or a sample that says nothing: all of them, as far as there is room.
        if (n == 0) n = extend(cost, state, m, bits, aim, s->values, penalty, 1e29f, next, free, room);
        n = n < room ? n : room;
        follow(free, n, bits, state, from);
        if (here) owe(s, position, bits, free, n, from, here, here == owed ? owed + 1 : owed);
        SWAP(float, cost, next);
        SWAP(uint32_t, state, from);
        m = n;
        free += n;
    }
    int64_t best = 0;
    for (int64_t i = 1; i < m; i++)
        if (cost[i] < cost[best]) best = i;
    trace(s, best, record, states);
    return cost[best] * weight;
}
