// Expanding tiles of a trellis code to the 8-bit codes of a block (qmoe_cpu.h): 16 outputs, 16 inputs a tile.
//
// An 8-bit code is a state's value in steps of the codebook's range / 255, from 0 on. For mul1 it is (n + 2) / 4 of
// the byte sum n, which vectors compute; the table has it for every codebook.
#pragma once
#include "qmoe_cpu.h"
#include "trellis.h"

enum { SIDE_OF_TILE = 16, TILE_CODES = 256 };

// tiles: the first of `count` tiles along the inputs, `stride` int16 apart. codes: 256 bytes of each.
typedef void Expand(const uint16_t *tiles, int64_t stride, int64_t count, int64_t twice, const uint8_t *table, uint8_t *codes);

Expand qmoe_expand_scalar;
#if defined(__x86_64__)
Expand qmoe_expand_avx2, qmoe_expand_avx512;  // mul1 alone
#endif

// Few rows take the byte sums of mul1 themselves, which saves the codes: y [rows, 16] = over the steps, scale times
// the sum of (byte sum - 512) times code of x. tiles: those of 16 outputs, `stride` int16 apart. The integer sums are
// exact, so all give equal bits.
enum { SOME_ROWS = 4 };
typedef void Direct(const uint16_t *tiles, int64_t stride, int64_t twice, int64_t steps, const Rows *x, float *y);

Direct qmoe_direct_scalar;
#if defined(__x86_64__)
Direct qmoe_direct_avx2, qmoe_direct_avx512;
#endif

// Where the code of a position goes: byte 4 c + r % 4 of vector r / 4, for input r and output c of its tile.
static inline int place_of(int position) {
    int lane = position / 8, j = position % 8;
    int r = 2 * (lane % 4) + (j & 1) + 8 * (j >> 1 & 1), c = lane / 4 + 8 * (j >> 2);
    return 64 * (r / 4) + 4 * c + r % 4;
}

// The ring's byte `at` (cyclic) lies at this byte of a stored tile: words of 32 bits begin with their highest bit.
static inline int byte_of(int64_t at, int64_t twice) {
    int64_t ring = TILE_CODES * twice / 16, b = (at + ring) % ring;
    return (int)((b & ~(int64_t)3) | (3 - (b & 3)));
}
