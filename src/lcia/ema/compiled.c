/* The passes of lcia.ema.passes over float32 numbers in a processor's memory: a plain shared library, which
   lcia.ema.compiled loads and calls.

   All weights are cut into pieces, parts of one tensor each. A function does the pieces [first, last): threads share the
   work without sharing a piece, and what is added up does not depend on how many there are. The arrays of arguments
   have an element for each piece, those of K reads K rows of them. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* One version for each generation of processors; which is taken is decided where it runs. */
#if !defined(__x86_64__)
#define FOR_EACH_PROCESSOR
#elif !defined(__GLIBC__) || defined(__clang__)
#error "without a choice of versions this would be slower than torch's passes"
#elif __GNUC__ >= 12
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

enum { PIECE = 16384, BLOCK = 4096, LANES = 64 }; /* PIECE: elements of a piece at most, as in compiled.py */

typedef int64_t count;

/* SOURCE: the hash of this file, by setup.py. */
const char *source(void) { return SOURCE; }

/* Sum of |a - b + c|, `b` NULL for 0. A lane adds at most BLOCK / LANES numbers before its sum goes into a double. */
FOR_EACH_PROCESSOR
static double absolute_sum(const float *restrict a, const float *restrict b, float c, count n) {
    double sum = 0;
    for (count start = 0; start < n; start += BLOCK) {
        float lane[LANES] = {0};
        count stop = n - start < BLOCK ? n : start + BLOCK, i = start;
        for (; i + LANES <= stop; i += LANES)
            if (b)
                for (count j = 0; j < LANES; j++) lane[j] += fabsf(a[i + j] - b[i + j] + c);
            else
                for (count j = 0; j < LANES; j++) lane[j] += fabsf(a[i + j] + c);
        for (; i < stop; i++) lane[i % LANES] += fabsf(a[i] - (b ? b[i] : 0) + c);
        for (count j = 0; j < LANES; j++) sum += lane[j];
    }
    return sum;
}

/* sums[k][p] = sum of |a[k][p] - b[k][p] + c[k]|; then, where `to` is given, `from[p]` is copied to `to[p]`. */
void absolute_sums(count first, count last, count pieces, count reads, const count *size, float *const *a,
                   float *const *b, const float *c, double *sums, float *const *from, float *const *to) {
    for (count p = first; p < last; p++) {
        for (count k = 0, at = p; k < reads; k++, at += pieces) sums[at] = absolute_sum(a[at], b[at], c[k], size[p]);
        if (to && to[p] != from[p]) memcpy(to[p], from[p], (size_t)size[p] * sizeof(float));
    }
}

/* a + share (b - a): exactly `a` for a share of 0, exactly `b` for 1, as torch.lerp. */
static inline float between(float a, float b, float share) {
    float way = b - a;
    return share < 0.5f ? a + share * way : b - (1 - share) * way;
}

FOR_EACH_PROCESSOR
static void move_piece(float *restrict average, const float *restrict weights, float move, count n) {
    for (count i = 0; i < n; i++) average[i] = between(average[i], weights[i], move);
}

/* average + move (weights - average), one number a piece; then, where `to` is given, the weights are copied there. */
void move_tensors(count first, count last, const count *size, float *const *average, float *const *weights,
                  const float *move, float *const *to) {
    for (count p = first; p < last; p++) {
        move_piece(average[p], weights[p], move[p], size[p]);
        if (to) memcpy(to[p], weights[p], (size_t)size[p] * sizeof(float));
    }
}

/* What the running mean of squares becomes that sees a gradient, or a square already. What overflows is the largest
   number, what is none (0 times an infinite scale) is 0. */
static inline float with_seen(float square, float seen, float weight, float scale, int squared) {
    float gradient = seen * scale;
    float new = squared ? seen : gradient * gradient;
    new = new <= FLT_MAX ? new : new > FLT_MAX ? FLT_MAX : 0;
    return between(square, new, weight);
}

FOR_EACH_PROCESSOR
static void observe_piece(float *restrict squares, const float *restrict seen, float weight, float scale, int squared,
                          count n) {
    for (count i = 0; i < n; i++) squares[i] = with_seen(squares[i], seen[i], weight, scale, squared);
}

/* A weight of 0 leaves a piece as it is, whatever was seen. */
void observe(count first, count last, const count *size, float *const *squares, float *const *seen, const float *weight,
             float scale, int squared) {
    for (count p = first; p < last; p++)
        if (weight[p] != 0) observe_piece(squares[p], seen[p], weight[p], scale, squared, size[p]);
}

static inline float float_of(int32_t bits) {
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* log(1 + x) for finite x >= 0, u = 1 + x = 2^k (1 + f). What rounding took from u counts where x is small. */
static inline float log_1_plus(float x) {
    float u = 1 + x;
    float lost = x < 1 ? x - (u - 1) : 0;
    int32_t bits;
    memcpy(&bits, &u, sizeof bits);
    int32_t k = (bits - 0x3f3504f3) >> 23; /* 1 + f lies between the roots of 1/2 and 2 */
    float f = float_of(bits - (k << 23)) - 1;
    /* (log(1 + f) - f + f^2 / 2) / f^3; the logarithm is within a relative 4e-8 */
    float p = 8.700430533e-02f;
    p = p * f - 1.426748632e-01f;
    p = p * f + 1.491476926e-01f;
    p = p * f - 1.657758475e-01f;
    p = p * f + 1.996306369e-01f;
    p = p * f - 2.500133704e-01f;
    p = p * f + 3.333391074e-01f;
    float log = f + f * f * (p * f - 0.5f);
    return log + lost + (float)k * 0.693147181f;
}

/* 1 - exp(-y) for y >= 0: exp(-y) = 2^k exp(f), |f| <= log(2) / 2. */
static inline float one_minus_exp(float y) {
    y = y < 80 ? y : 80; /* where it is 1 */
    float k = rintf(y * -1.44269504f);
    float f = (-y - k * 0.693359375f) - k * -2.12194440e-4f; /* log(2) in two parts, the first of few bits */
    /* (exp(f) - 1 - f) / f^2; exp(f) - 1 is within a relative 2e-8 */
    float p = 1.388250993e-03f;
    p = p * f + 8.366580346e-03f;
    p = p * f + 4.166720178e-02f;
    p = p * f + 1.666654318e-01f;
    p = p * f + 4.999999814e-01f;
    float less = f + f * f * p; /* exp(f) - 1 */
    float power = float_of(((int32_t)k + 127) << 23);
    return (1 - power) - power * less;
}

static inline float fisher_move(float square, float importance, float correction, float exponent) {
    float ratio = square * correction / importance;
    int finite = ratio <= FLT_MAX;
    /* else nothing needed it before: it follows the training, also where nothing needs it now, 0 / 0 */
    return finite ? one_minus_exp(exponent * log_1_plus(finite ? ratio : 1)) : 1;
}

/* A piece of `move_by_fisher`, with its moves. One loop: while one element waits for memory, another is computed. */
FOR_EACH_PROCESSOR
static void fisher_piece(float *restrict average, const float *restrict weights, const float *restrict importance,
                         const float *restrict squares, float correction, float exponent, float *restrict move,
                         count n) {
    for (count i = 0; i < n; i++) {
        move[i] = fisher_move(squares[i], importance[i], correction, exponent);
        average[i] = between(average[i], weights[i], move[i]);
    }
}

/* The same of squares that see a gradient, or a square, first. */
FOR_EACH_PROCESSOR
static void observed_fisher_piece(float *restrict average, const float *restrict weights,
                                  const float *restrict importance, float *restrict squares,
                                  const float *restrict seen, float seen_weight, float scale, int squared,
                                  float correction, float exponent, float *restrict move, count n) {
    for (count i = 0; i < n; i++) {
        float square = with_seen(squares[i], seen[i], seen_weight, scale, squared);
        squares[i] = square;
        move[i] = fisher_move(square, importance[i], correction, exponent);
        average[i] = between(average[i], weights[i], move[i]);
    }
}

FOR_EACH_PROCESSOR
static void follow_piece(float *restrict left, const int32_t *restrict element, const float *restrict move, count n) {
    for (count i = 0; i < n; i++) left[i] *= 1 - move[element[i]];
}

/* `fisher` (lcia.ema.rules): average + move (weights - average), a number for each element.

   importance: NULL: 0 everywhere. seen: what `observe` should see first, or NULL. moves: 0 where a piece must not move.
   follow[p] to follow[p + 1]: the elements `element`, counted within the piece, of which `left`, the product of
   1 - move, is kept. sums[p]: of the moves. */
void move_by_fisher(count first, count last, const count *size, float *const *average, float *const *weights,
                    float *const *importance, float *const *squares, float *const *seen, const float *seen_weight,
                    float scale, int squared, const float *correction, float exponent, const float *moves,
                    const count *follow, const int32_t *element, float *left, double *sums) {
    float move[PIECE];
    for (count p = first; p < last; p++) {
        const float *unseen = seen && seen_weight[p] != 0 ? seen[p] : NULL;
        count n = size[p];
        sums[p] = 0;
        if (unseen && importance && moves[p] != 0) {
            observed_fisher_piece(average[p], weights[p], importance[p], squares[p], unseen, seen_weight[p], scale,
                                  squared, correction[p], exponent, move, n);
        } else {
            if (unseen) observe_piece(squares[p], unseen, seen_weight[p], scale, squared, n);
            if (moves[p] == 0) continue;
            if (importance) {
                fisher_piece(average[p], weights[p], importance[p], squares[p], correction[p], exponent, move, n);
            } else {
                memcpy(average[p], weights[p], (size_t)n * sizeof(float));
                for (count i = 0; i < n; i++) move[i] = 1;
            }
        }
        sums[p] = absolute_sum(move, NULL, 0, n);
        follow_piece(left + follow[p], element + follow[p], move, follow[p + 1] - follow[p]);
    }
}
