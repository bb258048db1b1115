// Trellis codes of EXL3: 256 values are a ring of 256 * rate bits, and the value at a position follows from
// the 16 bits of the ring that end there. Encoding searches the ring whose values are nearest to given ones.
#pragma once
#include <stdint.h>

enum { LENGTH = 256, WINDOW = 16, STATES = 1 << WINDOW, MOST_BITS = 8 };

// A column of a tile is met in 16 visits, which lie in 32 positions of the ring together with those of one more
// column: four visits of the one, four of the other.
enum { VISITS = 16, PAIR = 2 * VISITS };

// One call of the encoder. twice: the rate times two (a rate may be half an integer). beam: survivors that are
// kept at each position, 0 for the search over all states, which knows no `shape`.
// shape: what is minimized, for every `alike` tiles: 16 rows of what an error at a visit adds to the values that
// are wanted at the visits behind it, and 16 weights of squared errors. Null for sums of squared errors.
typedef struct {
    const float *wanted;   // [tiles, 256] in the order of the ring
    const float *values;   // [65536] of every state
    uint16_t *states;      // [tiles, 256], written
    float *errors;         // [tiles] sums of weighted squared errors, written
    const float *shape;    // [tiles / alike, 17, 16]
    int64_t tiles, twice, beam, threads, alike;
} Encoding;

// Where the window of a position ends in the ring, and how many bits are new there.
static inline int64_t end_of(int64_t position, int64_t twice) { return (position + 1) * twice / 2; }
static inline int new_bits(int64_t position, int64_t twice) { return (int)(end_of(position, twice) - end_of(position - 1, twice)); }

// The ring read from `start` on, for `length` positions. before: the state that comes before, -1 if any may.
// after: the state that must be reached at the end, -1 if any may. shape: see Encoding.
typedef struct {
    const float *wanted, *values, *shape;
    int64_t twice, start, length, before, after;
} Stretch;

// Finds the states of a stretch and returns the sum of weighted squared errors. scratch: of `scratch(beam)` bytes.
typedef struct {
    int64_t (*scratch)(int64_t beam);
    float (*search)(const Stretch *, int64_t beam, void *scratch, uint16_t *states);
} Encoder;

extern const Encoder qmoe_encode_scalar, qmoe_encode_all;
#if defined(__x86_64__)
extern const Encoder qmoe_encode_avx2, qmoe_encode_avx512;
#endif

// The bits of the symbol at a position of a stretch that `after` fixes, and what they must be.
static inline uint32_t fixed_bits(const Stretch *s, int64_t step, uint32_t *want) {
    // Bits that follow the symbol up to the end of the stretch.
    int64_t whole = (s->start + s->length) * s->twice / 2 - s->start * s->twice / 2;
    int64_t behind = whole - ((s->start + step + 1) * s->twice / 2 - s->start * s->twice / 2);
    int bits = new_bits((s->start + step) % LENGTH, s->twice);
    *want = 0;
    if (s->after < 0 || behind >= WINDOW) return 0;
    *want = (uint32_t)(s->after >> behind) & ((1u << bits) - 1);
    int64_t known = WINDOW - behind;
    return known >= bits ? (1u << bits) - 1 : (1u << known) - 1;
}
