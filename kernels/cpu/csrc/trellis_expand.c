// Expanding tiles in plain C, for every codebook.
#include <math.h>
#include <string.h>

#include "trellis_expand.h"

static inline uint32_t state_at(const uint8_t *bytes, int p, int64_t twice) {
    int64_t first = end_of(p, twice) - WINDOW, at = first >> 3;  // rounded down, where it is before the start too
    uint32_t three = (uint32_t)bytes[byte_of(at, twice)] << 16 | (uint32_t)bytes[byte_of(at + 1, twice)] << 8 | bytes[byte_of(at + 2, twice)];
    return three >> (8 - (first - 8 * at)) & (STATES - 1);
}

void qmoe_expand_scalar(const uint16_t *tiles, int64_t stride, int64_t count, int64_t twice, const uint8_t *table, uint8_t *codes) {
    for (int64_t i = 0; i < count; i++, tiles += stride, codes += TILE_CODES) {
        const uint8_t *bytes = (const uint8_t *)tiles;
        for (int p = 0; p < LENGTH; p++) codes[place_of(p)] = table[state_at(bytes, p, twice)];
    }
}

void qmoe_direct_scalar(const uint16_t *tiles, int64_t stride, int64_t twice, int64_t steps, const Rows *x, float *y) {
    memset(y, 0, sizeof(float) * ROWS * (size_t)x->rows);
    for (int64_t s = 0; s < steps; s++) {
        int32_t sums[STEP][ROWS];  // byte sums by input and output
        for (int tile = 0; tile < STEP / SIDE_OF_TILE; tile++, tiles += stride)
            for (int p = 0; p < LENGTH; p++) {
                uint32_t product = state_at((const uint8_t *)tiles, p, twice) * 0x83DCD12Du;
                int place = place_of(p), input = SIDE_OF_TILE * tile + 4 * (place / 64) + place % 4;
                sums[input][place % 64 / 4] = (int32_t)((product & 255) + (product >> 8 & 255) + (product >> 16 & 255) + (product >> 24));
            }
        for (int64_t r = 0, at = s * x->rows; r < x->rows; r++, at++)
            for (int o = 0; o < ROWS; o++) {
                int32_t sum = 4 * x->sums[at];
                for (int i = 0; i < STEP; i++) sum += sums[i][o] * x->codes[STEP * at + i];
                y[ROWS * r + o] = fmaf(x->scales[at], (float)sum, y[ROWS * r + o]);
            }
    }
}
