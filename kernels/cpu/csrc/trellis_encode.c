// Encoding tiles: for each the state at the seam of its ring, then the ring from that state to itself.
#include <stdlib.h>
#include <string.h>

#include "parallel.h"
#include "qmoe_cpu.h"
#include "trellis.h"

// The seam's state is found by a search that begins and ends some windows away from it: what is farther off has
// next to no influence.
enum { BEFORE = 4 * WINDOW, BEHIND = 3 * WINDOW, AT_ONCE = 4 };  // bits; tiles

typedef struct {
    const Encoding *call;
    const Encoder *encoder;
    _Atomic int failed;
} Task;

static void encode_tile(const Encoding *call, const Encoder *encoder, int64_t tile, void *scratch) {
    uint16_t around[LENGTH], *states = call->states + tile * LENGTH;
    const float *wanted = call->wanted + tile * LENGTH;
    const float *shape = call->shape ? call->shape + tile / call->alike * (VISITS + 1) * VISITS : NULL;
    int64_t before = 2 * BEFORE / call->twice, behind = 2 * BEHIND / call->twice;
    Stretch seam = {wanted, call->values, shape, call->twice, LENGTH - before, before + behind, -1, -1};
    encoder->search(&seam, call->beam, scratch, around);
    int64_t state = around[before - 1];
    Stretch ring = {wanted, call->values, shape, call->twice, 0, LENGTH, state, state};
    call->errors[tile] = encoder->search(&ring, call->beam, scratch, states);
}

static void encode_some(void *argument, int64_t item) {
    Task *task = argument;
    const Encoding *call = task->call;
    void *scratch = malloc((size_t)task->encoder->scratch(call->beam));
    if (!scratch) {
        task->failed = 1;
        return;
    }
    int64_t stop = (item + 1) * AT_ONCE < call->tiles ? (item + 1) * AT_ONCE : call->tiles;
    for (int64_t tile = item * AT_ONCE; tile < stop; tile++) encode_tile(call, task->encoder, tile, scratch);
    free(scratch);
}

static const Encoder *encoder_of(int tier) {
#if defined(__x86_64__)
    const char *name = qmoe_tiers[tier]->name;
    if (!strcmp(name, "avx512vnni")) return &qmoe_encode_avx512;
    if (!strncmp(name, "avx", 3)) return &qmoe_encode_avx2;
#else
    (void)tier;
#endif
    return &qmoe_encode_scalar;
}

// 0, or 1 if memory ran out. tier: the instruction set; all give the same states.
EXPORTED int qmoe_encode_trellis(int tier, const Encoding *call) {
    Task task = {call, call->beam ? encoder_of(tier) : &qmoe_encode_all, 0};
    Phase phase = {encode_some, &task, .items = (call->tiles + AT_ONCE - 1) / AT_ONCE};
    qmoe_run_phases(&phase, 1, call->threads);
    return task.failed;
}
