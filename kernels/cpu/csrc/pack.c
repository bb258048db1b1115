// Writes the matrices of a stack into its blocks: each item is one block, which owns its bytes.
#if defined(__linux__)
#define _DEFAULT_SOURCE  // madvise
#include <sys/mman.h>
#endif
#include <string.h>

#include "job.h"

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const Stack *stack;
    const Source *source;
} Packing;

// Four codes of `bits` each, the lowest first, to four bytes.
INLINE uint32_t spread(uint32_t x, const int bits) {
    const uint32_t mask = (1u << bits) - 1;
    const int gap = 8 - bits;
    return (x & mask) | (x << gap & mask << 8) | (x << 2 * gap & mask << 16) | (x << 3 * gap & mask << 24);
}

// The 32 codes from column `at` on. Columns from n on are another step's or no column at all: 0.
INLINE void take(const Source *from, int64_t row, int64_t at, int64_t n, const int bits, uint32_t to[8]) {
    const uint8_t *codes = from->codes + row * from->stride;
    uint8_t end[40] = {0}, *bytes = (uint8_t *)to;
    if (from->dense) {
        int64_t start = at / 8 * bits, left = from->stride - start;  // groups are of whole steps, so `at` is too
        codes += start;
        // Eight bytes are read at a time, but none behind the row.
        if (left < (int64_t)sizeof end) codes = memcpy(end, codes, (size_t)left);
        for (int i = 0; i < 8; i++) {
            uint64_t eight;
            memcpy(&eight, codes + 4 * i * bits / 8, 8);
            to[i] = spread((uint32_t)(eight >> 4 * i * bits % 8), bits);
        }
    } else {
        memcpy(bytes, codes + at, (size_t)n);
        for (int i = 0; i < STEP; i++) bytes[i] = (uint8_t)(bytes[i] + (1 << (bits - 1)));
    }
    if (n < STEP) memset(bytes + n, 0, (size_t)(STEP - n));
}

// Eight vectors of codes in `bits` vectors.
INLINE void join(uint32_t v[8][ROWS], const int bits, uint32_t *to) {
    const int low = bits == 3 ? 2 : bits, fields = 8 / low;
    const uint32_t mask = 0x01010101u * ((1u << low) - 1);
    for (int i = 0; i < low; i++, to += ROWS)
        for (int r = 0; r < ROWS; r++) {
            uint32_t all = 0;
            for (int f = 0; f < fields; f++) all |= (v[fields * i + f][r] & mask) << low * f;
            to[r] = all;
        }
    if (bits != 3) return;
    for (int r = 0; r < ROWS; r++) {
        uint32_t all = 0;
        for (int i = 0; i < 8; i++) all |= (v[i][r] >> 2 & 0x01010101u) << i;
        to[r] = all;
    }
}

// The codes of `rows` rows; the other rows of the block are 0.
INLINE void pack_codes(const Stack *stack, const Source *from, int64_t row, int64_t rows, uint8_t *to, const int bits) {
    for (int64_t start = 0; start < stack->k; start += stack->piece)
        for (int64_t i = 0; i < stack->piece; i += STEP, to += 64 * bits) {
            int64_t n = stack->piece - i < STEP ? stack->piece - i : STEP;
            uint32_t w[ROWS][8] = {{0}}, v[8][ROWS], joined[8 * ROWS];
            for (int64_t r = 0; r < rows; r++) take(from, row + r, start + i, n, bits, w[r]);
            for (int j = 0; j < 8; j++)
                for (int r = 0; r < ROWS; r++) v[j][r] = w[r][j];
            join(v, bits, joined);
            memcpy(to, joined, 64 * (size_t)bits);
        }
}

// Scales, zero points and the gap up to the codes.
static void pack_front(const Stack *stack, const Matrix *m, const Source *from, int64_t row, int64_t rows, uint8_t *to) {
    memset(to, 0, (size_t)m->codes);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < m->groups; g++) {
            int64_t at = (row + r) * m->groups + g, place = ROWS * g + r;
            if (stack->scale_type == FLOAT32) memcpy(to + 4 * place, (const uint32_t *)from->scales + at, 4);
            else memcpy(to + 2 * place, (const uint16_t *)from->scales + at, 2);
            if (m->zeros) to[m->zeros + place] = (uint8_t)(from->zeros[at] + (1 << (m->bits - 1)));
        }
}

static void pack_block(void *argument, int64_t item) {
    const Packing *packing = argument;
    const Stack *stack = packing->stack;
    int64_t parts = parts_of(stack), blocks = parts * blocks_of(stack), width = stack->n / parts, b = item % blocks;
    const Matrix *m = stack->matrices + item / blocks;
    const Source *from = packing->source + item / blocks;
    int64_t first = b / parts * ROWS, row = b % parts * width + first, rows = width - first < ROWS ? width - first : ROWS;
    uint8_t *to = stack->buffer + m->data + b * m->block, *codes = to + m->codes;
    pack_front(stack, m, from, row, rows, to);
    switch (m->bits) {
    case 2: pack_codes(stack, from, row, rows, codes, 2); break;
    case 3: pack_codes(stack, from, row, rows, codes, 3); break;
    case 4: pack_codes(stack, from, row, rows, codes, 4); break;
    default: pack_codes(stack, from, row, rows, codes, 8);
    }
}

// Large pages, where the system gives them to who asks: fewer to hand out now and to look up later.
static void ask_for_large_pages(const Stack *stack) {
#if defined(__linux__)
    const Matrix *last = stack->matrices + stack->experts - 1;
    uintptr_t page = 4096, start = ((uintptr_t)stack->buffer + page - 1) & ~(page - 1);
    uintptr_t end = (uintptr_t)stack->buffer + (uintptr_t)(last->data + last->block * parts_of(stack) * blocks_of(stack));
    if (end > start + (1 << 21)) madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
    (void)stack;
#endif
}

void qmoe_pack(const Stack *stack, const Source *sources, int64_t threads) {
    Packing packing = {stack, sources};
    Phase phase = {pack_block, &packing, .items = stack->experts * parts_of(stack) * blocks_of(stack)};
    ask_for_large_pages(stack);
    qmoe_run_phases(&phase, 1, threads);
}
