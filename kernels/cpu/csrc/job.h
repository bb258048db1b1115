// One call while it is computed: which rows go to which expert, and the buffers between the phases.
#pragma once
#include "parallel.h"
#include "qmoe_cpu.h"

// Up to 64 rows of one expert: slots [slot, slot + rows).
typedef struct {
    int64_t expert, slot, rows;
} Tile;

struct Memory;

// Rows sorted by expert are slots; an expert that has rows is active.
typedef struct {
    const Call *call;
    const Tier *tier;
    struct Memory *memory;      // of all that follows
    int64_t assignments, used;  // T * A, and how many of them name an expert
    int64_t active, tiles;
    int64_t *slot;              // [assignments] the slot of an assignment, -1 if it names no expert
    int64_t *assignment;        // [used] and back
    int64_t *token;             // [used] whose it is
    float *gate;                // [used] and its weight, where there are weights
    Tile *tile;                 // [tiles]
    int64_t *first_tile;        // [active + 1] of each active expert
    void *in, *between;         // packed rows of the first and of the second product
    float *mid;                 // [used, I]: what lies between the products
    float *sum;                 // the weighted sum: of each chunk of blocks [T, 16 blocks]
    int64_t grain_in, grain_mid, first_chunk, second_chunk;
} Job;

// Counts and sorts the assignments; 1 if memory ran out. `qmoe_end` gives the memory back.
int qmoe_begin(Job *, int tier, const Call *);
void qmoe_end(Job *);

enum { CALL_PHASES = 4, SIDES = 4, SIDES_PHASES = 2, ROUTE_PHASES = 3, ATTEND_PHASES = 2 };

// Pack x, first product, pack what lies between, second product; those of a product that is not there
// have no items.
void qmoe_call_phases(Job *, Phase *to);

// Calls with the same x and a first product alone, whose products are shared out as one.
typedef struct {
    Job job[SIDES];
    int64_t end[SIDES];  // of the items of the first product, one side behind the other
    int count, packed[SIDES];  // whether a side reads the rows that the first one packs
} Sides;

int qmoe_begin_sides(Sides *, int tier, const Call *, int count);
void qmoe_sides_phases(Sides *, Phase *to);
void qmoe_end_sides(Sides *);

typedef struct {
    const Router *router;
    const Tier *tier;
    float *x, *logits;  // [T, padded K], [T, E]
} Route;

int qmoe_begin_route(Route *, int tier, const Router *);
void qmoe_route_phases(Route *, Phase *to);
void qmoe_end_route(Route *);

typedef struct {
    const Attention *a;
    const Tier *tier;
    int64_t group, rows, parts, shares;  // heads of a key head; its rows and items of rows; shares of the keys
    float *sum, *top, *total;            // of all shares, where there is more than one
} Attend;

int qmoe_begin_attend(Attend *, int tier, const Attention *);
void qmoe_attend_phases(Attend *, Phase *to);
void qmoe_end_attend(Attend *);

// Steps of 32 columns in a row of a stack's matrices, and blocks of 16 rows.
static inline int64_t steps_of(const Stack *s) { return s->k / s->piece * ((s->piece + STEP - 1) / STEP); }
static inline int64_t parts_of(const Stack *s) { return s->paired ? 2 : 1; }
static inline int64_t blocks_of(const Stack *s) { return (s->n / parts_of(s) + ROWS - 1) / ROWS; }  // of a part
