// Expanding tiles in plain C, for every codebook.
#include "trellis_expand.h"

void qmoe_expand_scalar(const uint16_t *tiles, int64_t stride, int64_t count, int64_t twice, const uint8_t *table, uint8_t *codes) {
    for (int64_t i = 0; i < count; i++, tiles += stride, codes += TILE_CODES) {
        const uint8_t *bytes = (const uint8_t *)tiles;
        for (int p = 0; p < LENGTH; p++) {
            int64_t first = end_of(p, twice) - WINDOW, at = first >> 3;  // rounded down, where it is before the start too
            uint32_t three = (uint32_t)bytes[byte_of(at, twice)] << 16 | (uint32_t)bytes[byte_of(at + 1, twice)] << 8 | bytes[byte_of(at + 2, twice)];
            codes[place_of(p)] = table[three >> (8 - (first - 8 * at)) & (STATES - 1)];
        }
    }
}
