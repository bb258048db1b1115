// Packed matrices on a CPU: what Python hands over, and what each instruction set implements.
//
// A matrix [N, K] lies in blocks of 16 rows. K is cut into steps of 32 (each group of weights is
// padded to whole steps), and a step of a block is eight vectors V0..V7 of 64 bytes: byte 4 r + k of
// Vi is the code of row r at column 4 i + k. So four bytes of activations, broadcast, meet 16 rows.
// Bits store the eight vectors densely:
//   8: V0..V7          4: Vi | V(i+1) << 4, four vectors          2: four to a byte, two vectors
//   3: the low two bits as at 2, then one vector whose bit i is the top bit of Vi
// In front of a block's codes are its scales [G, 16] and, if there are any, its zero points [G, 16].
#pragma once
#include <stdint.h>

// Compilers that know 256-bit dot products outside of AVX-512.
#if defined(__x86_64__) && (__clang_major__ >= 12 || __GNUC__ >= 11)
#define HAVE_AVXVNNI 1
#else
#define HAVE_AVXVNNI 0
#endif

enum { ROWS = 16, STEP = 32, TILE = 64 };      // rows of a block, columns of a step, rows of x at once
enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
enum { NONE = 0, SILU = 1, GELU = 2, GELU_TANH = 3, CLAMPED_SWIGLU = 4 };

// One expert's matrix; a row of the table that Python keeps. Offsets in bytes: data from the start
// of the buffer; zeros (0: none) and codes from the start of a block.
typedef struct {
    int64_t data, block, zeros, codes, bits, groups;
} Matrix;

// The matrices [N, K] of all experts. piece: columns that are padded to whole steps. paired: blocks
// of gate and up rows take turns. offset: the zero point that all share, or 0 if they differ.
typedef struct {
    uint8_t *buffer;  // written by qmoe_pack alone
    const Matrix *matrices;
    const void *bias;  // [E, N] in the type of x, or NULL
    int64_t experts, n, k, piece, paired, scale_type, offset;
} Stack;

// Where the numbers of one matrix come from. codes: rows of int8 values, or (`dense`) of the bits of
// values + 2^(bits - 1) one behind the other, lowest first, as checkpoints have them.
typedef struct {
    const uint8_t *codes;
    const void *scales;   // [N, G] in the stack's type of scales
    const int8_t *zeros;  // [N, G], or NULL
    int64_t stride, dense;  // stride: bytes from one row of codes to the next
} Source;

// One call. first and second: y[t] = sum_a gates[t, a] second(activation(first(x[t]))).
// first alone (second.buffer NULL): out [T * A, N], the products by assignment; second alone
// (first.buffer NULL): x is [T * A, K], out the weighted sum. ids NULL: every row takes expert `only`.
typedef struct {
    const void *x;
    void *out;
    const int64_t *ids;  // [T, A]; ids outside of [0, E) are no expert
    const float *gates;  // [T, A]
    int64_t tokens, choices, only, type, activation, exact, threads;
    float alpha, limit;
    Stack first, second;
} Call;

// Sixteen rows of a matrix, ready to be multiplied with.
typedef struct {
    const uint8_t *scales, *zeros, *codes;
    int64_t groups, steps;  // steps: per group
    int64_t scale_type, bits, offset;
} Block;

// Rows of x in a tile, step by step: codes [steps, rows, 32] with scales and sums [steps, rows], or
// in exact mode values [steps, rows, 32]. sums: minus the sum of the codes, times the shared offset
// if there is one (`ready`).
typedef struct {
    int8_t *codes;
    float *scales;
    int32_t *sums;
    float *values;
    int64_t rows, ready;
} Rows;

// Rows of x [rows, width] divided by their root mean square, times (shift + weight). early: they are
// rounded to the type of x before that product, as most families do it.
typedef struct {
    const void *x, *weight;
    void *out;
    int64_t rows, width, type, weight_type, early, threads;
    float epsilon, shift;
} Norm;

// Heads x [tokens, heads, width], in place: normalised first if there is a weight (as Norm, of a head),
// then the first `turned` values of each rotated by the position of its token, in halves (Su et al. 2021,
// RoFormer, in the order of GPT-NeoX): x cos + (-second half, first half) sin, each product and the sum
// rounded to the type, as families write it. Token t has row t % positions of cos and sin [positions, turned].
typedef struct {
    void *x;
    const void *cos, *sin, *weight;
    int64_t tokens, positions, heads, width, turned, type, weight_type, early;
    float epsilon, shift;
} Turn;

enum { QUERIES = 32, KEYS = 64, WIDEST = 256 };  // rows of an item, keys at once, values of a head
static inline int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

// softmax(scale q k^T) v. q [B, heads, T, width], k [B, key_heads, S, width], v [B, key_heads, S,
// value_width] with strides of all dimensions but the last, counted in values; out [B, T, heads,
// value_width] in the same type. mask: bytes, 1 where a query sees a key, or NULL. causal: query t
// sees keys up to t. A query that sees no key gets zeros. Widths up to WIDEST.
typedef struct {
    const void *q, *k, *v;
    const uint8_t *mask;
    void *out;
    int64_t batch, heads, key_heads, queries, keys, width, value_width, type, causal, threads;
    int64_t q_stride[3], k_stride[3], v_stride[3], mask_stride[4];
    float scale;
} Attention;

// Queries that share keys: rows [row, row + rows) of T * group, a query's heads one behind the other,
// and keys [key, key + keys). group: heads of a key head.
typedef struct {
    int64_t batch, key_head, group, row, rows, key, keys;
} Part;

enum { FEW = 8 };  // rows that share what is loaded of a weight

// A layer's router for up to FEW tokens: logits [T, E] = x [T, K] weight [E, K]^T + bias [E], rounded to
// the type of x, which x, weight, bias and logits have; ids [T, A] of the largest, the largest first (of
// equal ones the first; NaN counts as the largest); and scores [T, A], their probabilities among all
// experts, or (`normed`) among the chosen ones, rounded to score_type.
typedef struct {
    const void *x, *weight, *bias;
    void *logits, *scores;
    int64_t *ids;
    int64_t tokens, experts, width, choices, type, score_type, normed, threads;
} Router;

// A decoder layer: x + attention(norm(x)), of which the same norm, router and experts give the rest.
// Its rows have one type. Biases [N] of the projections q, k, v, o, norms of whole rows of q and k, and of
// each of their heads: NULL where there is none.
typedef struct {
    Stack projection[4], first, second;
    const void *bias[4], *before, *after, *row_norm[2], *head_norm[2], *router, *router_bias;
    int64_t width, heads, key_heads, head_width, type, exact;
    int64_t experts, choices, normed, score_type, activation;
    int64_t norm_type[4], early[4];  // before, after, and the norm of q and of k
    float epsilon[4], shift[4], alpha, limit, scale;
} Layer;

// One new token of each of `tokens` sequences (up to FEW) through a layer: x [tokens, width] to out. keys
// and values have room [tokens, key_heads, .., head_width] with strides of all dimensions but the last,
// and hold `past` tokens; the new ones are written behind them. cos, sin: [positions, turned], 1 or `tokens`.
typedef struct {
    const void *x, *cos, *sin;
    void *out, *keys, *values;
    int64_t key_stride[3], value_stride[3], tokens, past, positions, turned, threads;
} Step;

// What an instruction set implements. All of them give the same bits.
typedef struct {
    const char *name;
    int (*usable)(void);
    // Row r of the tile from k values of a type.
    void (*pack)(const void *x, int64_t type, int64_t k, int64_t piece, int64_t offset, Rows *to, int64_t r);
    // y [count, rows, 16] = rows times each of one or two blocks of a matrix, from int8 or from exact values.
    void (*product)(const Block *, int64_t count, const Rows *, float *y);
    void (*exact)(const Block *, int64_t count, const Rows *, float *y);
    // gate, up [rows, 16] to out, whose rows are `stride` apart; n of the 16 are stored.
    void (*activate)(int64_t activation, float alpha, float limit, float *gate, float *up, int64_t rows, float *out,
                     int64_t stride, int64_t n);
    // sum[row[r] stride + i] += gate[r] y[r, i]
    void (*add)(float *sum, int64_t stride, const int64_t *row, const float *gate, const float *y, int64_t rows);
    // n values from place `at` on to float, and n floats to a type.
    void (*load)(const void *from, int64_t type, int64_t at, int64_t n, float *to);
    void (*store)(const float *from, void *to, int64_t type, int64_t n);
    void (*norm)(const Norm *, int64_t row);
    void (*turn)(const Turn *, int64_t token);
    // Of a part: sums [rows, padded value_width] of values by weights e^(score - top), tops [rows]
    // (-inf: nothing is seen) and the sums of the weights.
    void (*attend)(const Attention *, const Part *, float *sum, float *top, float *total);
    // y [tokens, n] = x [tokens, padded width], zeros behind the width, times n rows of `weight`.
    void (*dense)(const float *x, int64_t tokens, int64_t width, const void *weight, int64_t type, int64_t n, float *y);
    // Ids and scores of a token from its logits [E], which are changed.
    void (*choose)(const Router *, int64_t token, float *logits);
} Tier;

extern const Tier *const qmoe_tiers[];  // best first; the last is scalar; NULL behind it

#define EXPORTED __attribute__((visibility("default")))

// The address of libgomp's GOMP_parallel, or NULL: threads are started for each call then.
EXPORTED void qmoe_use_openmp(void *gomp_parallel);
// The number of the tier with this name (NULL: the best) or -1 if this machine cannot run it.
EXPORTED int qmoe_find_tier(const char *name);
EXPORTED const char *qmoe_tier_name(int tier);
// 0, or 1 if memory ran out. Up to 128 MiB of buffers are kept for the next call of the process.
EXPORTED int qmoe_run(int tier, const Call *call);
// Calls that have a first product alone and the same x, as one: `count` up to 4.
EXPORTED int qmoe_run_side_by_side(int tier, const Call *calls, int count);
// The heads of the same tokens, of queries and of keys.
EXPORTED void qmoe_turn(int tier, const Turn *turns, int count, int64_t threads);
EXPORTED void qmoe_norm(int tier, const Norm *norm);
// 0, or 1 if memory ran out.
EXPORTED int qmoe_attend(int tier, const Attention *attention);
// 0, or 1 if memory ran out.
EXPORTED int qmoe_decode(int tier, const Layer *layer, const Step *step);
EXPORTED int qmoe_route(int tier, const Router *router);
// Writes every byte of the matrices into the stack's buffer, from one source each.
EXPORTED void qmoe_pack(const Stack *stack, const Source *sources, int64_t threads);
