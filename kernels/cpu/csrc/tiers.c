// Which instruction sets this build has, and which one this machine runs.
#include <string.h>

#include "qmoe_cpu.h"

#if defined(__x86_64__)
extern const Tier qmoe_avx512, qmoe_avx2;
#if HAVE_AVXVNNI
extern const Tier qmoe_avxvnni;
#endif
#elif defined(__aarch64__)
extern const Tier qmoe_neon;
#endif
extern const Tier qmoe_scalar;

const Tier *const qmoe_tiers[] = {
#if defined(__x86_64__)
    &qmoe_avx512,
#if HAVE_AVXVNNI
    &qmoe_avxvnni,
#endif
    &qmoe_avx2,
#elif defined(__aarch64__)
    &qmoe_neon,
#endif
    &qmoe_scalar, 0};

int qmoe_find_tier(const char *name) {
    for (int i = 0; qmoe_tiers[i]; i++)
        if (qmoe_tiers[i]->usable() && (!name || !strcmp(name, qmoe_tiers[i]->name))) return i;
    return -1;
}

const char *qmoe_tier_name(int tier) { return qmoe_tiers[tier]->name; }
