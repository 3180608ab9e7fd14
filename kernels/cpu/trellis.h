/* Rows in trellis-coded levels, see ../trellis.py for the formula: the search for the best walk. A lane is a
 * circle, so that the eight channels of a run stand side by side. Whoever includes this has sums and quotients as they are written. */
#ifndef KVSINK_TRELLIS_H
#define KVSINK_TRELLIS_H
#include <math.h>
#include <stdint.h>

#include "half.h"

typedef float circles __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t lanes __attribute__((vector_size(32), aligned(4), may_alias));

static inline circles pick(lanes where, circles yes, circles no) {
    return (circles)(((lanes)yes & where) | ((lanes)no & ~where));
}

/* Of every subset the level nearest to v: its index, a byte each, and the weighted error. levels [4, half], edges between them. */
static inline __attribute__((always_inline)) lanes nearest_levels(
    int64_t half, const float *levels, const float *edges, circles v, circles weight, circles *error
) {
    lanes found = {0};
    for (int64_t j = 0; j < 4; j++, levels += half, edges += half - 1) {
        const circles zero = {0};
        circles level = zero + levels[0];
        lanes m = {0};
        for (int64_t e = 0; e + 1 < half; e++) {
            const lanes above = zero + edges[e] < v;
            level = pick(above, zero + levels[e + 1], level), m -= above;
        }
        const circles off = v - level;
        error[j] = off * off * weight;
        found |= m << (int32_t)(8 * j);
    }
    return found;
}

/* Codes of the best circular walks for y / g, and their levels. run [runs, 4] as everywhere; levels, edges: per run, by subset.
 * room: 6 numbers a channel. */
static void best_walks(
    int64_t dim, int64_t runs, const int64_t *run, const float *const *levels, const float *const *edges, const float *y, float g,
    const float *weight, float *room, uint16_t *code, float *level
) {
    const int64_t steps = dim / 8;
    circles *error = (circles *)room, now[4][4], best; /* error [steps, 4]; now [first state, state] */
    lanes *found = (lanes *)(room + 4 * dim), *taken = found + steps, first = {0}, state;
    const int32_t turn = steps > 2; /* u_(t-2) of shorter walks counts as 0 */
    for (int64_t k = 0, t = 0; k < runs; k++, run += 4) {
        const int64_t half = (int64_t)1 << (run[3] - 1);
        for (; 8 * t < run[1]; t++) {
            const circles v = *(const circles *)(y + 8 * t) / g, w = *(const circles *)(weight + 8 * t);
            switch (half) { /* so that the compiler knows it */
            case 1: found[t] = nearest_levels(1, levels[k], edges[k], v, w, error + 4 * t); break;
            case 2: found[t] = nearest_levels(2, levels[k], edges[k], v, w, error + 4 * t); break;
            case 4: found[t] = nearest_levels(4, levels[k], edges[k], v, w, error + 4 * t); break;
            case 8: found[t] = nearest_levels(8, levels[k], edges[k], v, w, error + 4 * t); break;
            case 16: found[t] = nearest_levels(16, levels[k], edges[k], v, w, error + 4 * t); break;
            default: found[t] = nearest_levels(32, levels[k], edges[k], v, w, error + 4 * t);
            }
        }
    }
    for (int f = 0; f < 4; f++)
        for (int s = 0; s < 4; s++) now[f][s] = (circles){0} + (f == s ? 0.0f : INFINITY);
    for (int64_t t = 0; t < steps; t++) {
        const circles *e = error + 4 * t;
        lanes word = {0};
#pragma GCC unroll 4
        for (int f = 0; f < 4; f++) {
            const circles was[4] = {now[f][0], now[f][1], now[f][2], now[f][3]};
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) { /* the lower bit of a state is u_t, the upper one u_(t-1) */
                const int a = s >> 1, u = s & 1;
                const circles zero = was[a] + e[2 * u + a], one = was[a + 2] + (turn ? e[2 * (1 - u) + a] : e[2 * u + a]);
                const lanes less = one < zero;
                word |= less & (1 << (4 * f + s));
                now[f][s] = pick(less, one, zero);
            }
        }
        taken[t] = word;
    }
    best = now[0][0];
    for (int f = 1; f < 4; f++) {
        const lanes less = now[f][f] < best;
        best = pick(less, now[f][f], best), first = (first & ~less) | (less & f);
    }
    state = first;
    run -= 4;
    for (int64_t t = steps - 1, k = runs - 1; t >= 0; t--) {
        for (; 8 * t < run[0]; run -= 4) k--;
        const lanes oldest = (taken[t] >> (4 * first + state)) & 1, u = state & 1, a = state >> 1;
        const lanes subset = 2 * (u ^ (oldest & turn)) + a, m = (found[t] >> (8 * subset)) & 255, at = (subset << (int32_t)(run[3] - 1)) + m;
        const lanes word = 2 * m + u;
        for (int i = 0; i < 8; i++) code[8 * t + i] = (uint16_t)word[i], level[8 * t + i] = levels[k][at[i]];
        state = a + 2 * oldest;
    }
}

/* A row x [dim] with deviations: codes, and the byte of the gain. room: 10 numbers a channel. */
static uint8_t trellis_row(
    int64_t dim, int64_t runs, const int64_t *run, const float *const *levels, const float *const *edges, const float *x,
    const float *sigma, float *room, uint16_t *code
) {
    float *y = room, *weight = y + dim, *level = weight + dim, most = 6.0e-8f;
    double square = 0.0;
    int finite = 1;
    for (int64_t i = 0; i < dim; i++) most = sigma[i] > most ? sigma[i] : most;
    for (int64_t i = 0; i < dim; i++) {
        const float deviation = sigma[i] > 6.0e-8f ? sigma[i] : 6.0e-8f, share = deviation / most;
        y[i] = x[i] / deviation;
        weight[i] = share * share;
        finite &= isfinite(y[i]) != 0;
    }
    if (!finite) memset(y, 0, sizeof(float) * dim);
    for (int64_t i = 0; i < dim; i++) square += y[i] * y[i];
    const float rms = (float)sqrt(square / (double)dim);
    const float two[2] = {0.9f, 1.1f}, four[4] = {0.8f, 0.95f, 1.1f, 1.3f}; /* where a run has more than 4 bits */
    uint16_t *other = (uint16_t *)(level + 7 * dim);
    uint8_t gain = 0;
    double least = 0.0;
    int wide = 0;
    for (int64_t k = 0; k < runs; k++) wide |= run[4 * k + 3] > 4;
    for (int search = 0; search < (wide ? 4 : 2); search++) {
        const uint8_t with = gain_byte((wide ? four : two)[search] * rms);
        double product = 0.0, size = 0.0;
        best_walks(dim, runs, run, levels, edges, y, gain_of(with ? with : 1), weight, level + dim, search ? other : code, level);
        for (int64_t i = 0; i < dim; i++) {
            const float weighted = weight[i] * level[i];
            product += weighted * y[i], size += weighted * level[i];
        }
        const uint8_t fitted = gain_byte((float)(product / size));
        const double g = gain_of(fitted), error = size * g * g - 2 * g * product;
        if (search && !(error < least)) continue;
        if (search) memcpy(code, other, sizeof(uint16_t) * dim);
        gain = fitted, least = error;
    }
    return finite ? gain : NOT_A_NUMBER;
}
#endif
