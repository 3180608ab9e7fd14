/* Attention of one new query row per sequence over packed rows, on the CPU: see attend_cpu.py for the formula.
 *
 * Work is cut into (sequence, key-value head, run of slots). Each piece decodes tiles of TILE rows into float levels, takes the
 * logits of all query heads that share the head, and keeps a running maximum, mass and weighted sum of values. Pieces are
 * merged at the end. Levels stay in the basis of the codec: the caller has moved the query there and moves the sum back.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "attend_cpu.h"
#include "half.h"
#if defined(__AVX512F__) && defined(__AVX512VL__)
#include <immintrin.h>
#define PERMUTE
#endif

#define TILE 64
#define LOWEST -1e30f

/* exp for x <= 0: 2^i times a polynomial on [-1/2, 1/2], relative error below 3e-7; the compiler makes vectors of it. */
static inline float fast_exp(float x) {
    float t = x * 1.44269504f;
    t = t < -126.0f ? -126.0f : t;
    float i = (float)(int32_t)(t - 0.5f), y = (t - i) * 0.693147181f, f;
    float p = 1.0f + y * (1.0f + y * (0.5f + y * (1.66666667e-1f + y * (4.16666667e-2f + y * (8.33333333e-3f + y * 1.38888889e-3f)))));
    int32_t bits = ((int32_t)i + 127) << 23;
    memcpy(&f, &bits, 4);
    return p * f;
}

static void decode_vectors(const Side *s, const uint8_t *row, const float *book, float *out) {
    const int64_t c = s->couple, b = s->code_bits, size = (int64_t)1 << b;
    for (int64_t g = 0; g < s->dim / c; g++) {
        const int64_t bit = g * b, byte = bit >> 3;
        uint32_t word = row[byte];
        if ((bit & 7) + b > 8) word |= (uint32_t)row[byte + 1] << 8;
        if ((bit & 7) + b > 16) word |= (uint32_t)row[byte + 2] << 16;
        const float *from = book + (g * size + ((word >> (bit & 7)) & (size - 1))) * c;
        for (int64_t x = 0; x < c; x++) out[g * c + x] = from[x];
    }
}

#ifdef PERMUTE
/* Runs of at most four bits: eight codes are one word of `width` bytes, their levels one permutation of sixteen numbers. */
static inline __attribute__((always_inline)) void decode_narrow(int64_t n, int64_t width, const uint8_t *in, const float *levels, float *to) {
    const __m256i shift = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32((int)width));
    const __m256i mask = _mm256_set1_epi32((1 << width) - 1);
    const __m256 low = _mm256_loadu_ps(levels), high = _mm256_loadu_ps(levels + 8);
    for (int64_t i = 0; i < n / 8; i++, in += width) {
        uint32_t word = in[0];
        for (int64_t b = 1; b < width; b++) word |= (uint32_t)in[b] << (8 * b);
        const __m256i code = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int)word), shift), mask);
        _mm256_storeu_ps(to + 8 * i, _mm256_permutex2var_ps(low, code, high));
    }
}
#endif

static void decode_row(const Side *s, const uint8_t *row, int64_t head, float *out) {
    if (s->couple) {
        decode_vectors(s, row, s->book + head * s->book_h, out);
        return;
    }
    for (int64_t k = 0; k < s->runs; k++) {
        const int64_t *run = s->run + 4 * k, width = run[3];
        const uint8_t *in = row + run[2];
        const float *table = s->tables[k];
        float *to = out + run[0];
        const int64_t n = run[1] - run[0];
#ifdef PERMUTE
        if (width <= 4) {
            switch (width) { /* so that the compiler knows the width */
            case 1: decode_narrow(n, 1, in, s->levels[k], to); break;
            case 2: decode_narrow(n, 2, in, s->levels[k], to); break;
            case 3: decode_narrow(n, 3, in, s->levels[k], to); break;
            default: decode_narrow(n, 4, in, s->levels[k], to);
            }
            continue;
        }
#endif
        switch (width) {
        case 1: for (int64_t i = 0; i < n / 8; i++) memcpy(to + 8 * i, table + 8 * in[i], 32); break;
        case 2: for (int64_t i = 0; i < n / 4; i++) memcpy(to + 4 * i, table + 4 * in[i], 16); break;
        case 4: for (int64_t i = 0; i < n / 2; i++) memcpy(to + 2 * i, table + 2 * in[i], 8); break;
        case 8: for (int64_t i = 0; i < n; i++) to[i] = table[in[i]]; break;
        default:
            for (int64_t i = 0; i < n / 8; i++) {
                uint64_t word = 0, mask = (1u << width) - 1;
                for (int64_t b = 0; b < width; b++) word |= (uint64_t)in[i * width + b] << (8 * b);
                for (int64_t c = 0; c < 8; c++) to[8 * i + c] = table[(word >> (c * width)) & mask];
            }
        }
    }
}

/* x = a * level + b for the group of a row */
static inline void affine(const Side *s, const uint16_t *scale, int64_t group, float *a, float *b) {
    *a = 1.0f, *b = 0.0f;
    if (s->kind == 1) *a = half(scale[0]);
    else if (s->kind >= 2) {
        *a = half(scale[2 * group]), *b = half(scale[2 * group + 1]);
        if (s->kind == 3) *b *= -*a;
    }
}

/* Sixteen numbers at any address; the compiler cuts them into what the machine has. */
typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
#define LANES 16
#define AT(p) (*(const vec *)(p))

static inline float dot(const float *a, const float *b, int64_t n) {
    vec lanes = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) lanes += AT(a + i) * AT(b + i);
    float sum = 0.0f;
#ifdef PERMUTE
    sum = _mm512_reduce_add_ps((__m512)lanes);
#else
    for (int64_t j = 0; j < LANES; j++) sum += lanes[j];
#endif
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* out[i] += sum over t of weight[i][t] * rows[t], for `queries` of them and `vecs` times sixteen channels, held in registers. */
static inline __attribute__((always_inline)) void gather(
    int queries, int vecs, int64_t n, const float *rows, int64_t row, const float *weight, float *out, int64_t step
) {
    vec sum[4][4];
    for (int i = 0; i < queries; i++)
        for (int x = 0; x < vecs; x++) sum[i][x] = AT(out + i * step + x * LANES);
    for (int64_t t = 0; t < n; t++, rows += row)
        for (int i = 0; i < queries; i++) {
            const float w = weight[i * TILE + t];
            for (int x = 0; x < vecs; x++) sum[i][x] += AT(rows + x * LANES) * w;
        }
    for (int i = 0; i < queries; i++)
        for (int x = 0; x < vecs; x++) *(vec *)(out + i * step + x * LANES) = sum[i][x];
}

#define GATHER(q, v) case 4 * (q) + (v): gather(q, v, n, rows, row, weight, out, step); break
#define GATHERS(q) GATHER(q, 1); GATHER(q, 2); GATHER(q, 3); GATHER(q, 4)

/* The same for any number of queries and channels. */
static void gather_all(
    int64_t queries, int64_t channels, int64_t n, const float *rows, int64_t row, const float *weight, float *out, int64_t step
) {
    for (; channels >= LANES;) {
        const int64_t vecs = channels / LANES < 4 ? channels / LANES : 4;
        const float *all_weight = weight;
        float *all_out = out;
        for (int64_t left = queries; left > 0; left -= 4, weight += 4 * TILE, out += 4 * step)
            switch (4 * (left < 4 ? left : 4) + vecs) { GATHERS(1); GATHERS(2); GATHERS(3); GATHERS(4); }
        weight = all_weight, out = all_out + vecs * LANES;
        rows += vecs * LANES, channels -= vecs * LANES;
    }
    for (int64_t i = 0; i < queries; i++)
        for (int64_t t = 0; t < n; t++)
            for (int64_t x = 0; x < channels; x++) out[i * step + x] += weight[i * TILE + t] * rows[t * row + x];
}

static void piece(const Call *c, int64_t b, int64_t h, int64_t begin, int64_t end, float *work) {
    const Side *k = &c->key, *v = &c->value;
    const int64_t r = c->repeats, d = k->dim, dv = v->dim, state = 2 + dv, kg = k->groups, vg = v->groups;
    const int64_t most = kg > vg ? kg : vg;
    float *rows = malloc(sizeof(float) * TILE * (d > dv ? d : dv)), *p = malloc(sizeof(float) * r * TILE);
    float *weight = malloc(sizeof(float) * r * TILE), *a = malloc(sizeof(float) * TILE * most), *z = malloc(sizeof(float) * TILE * most);
    float *base = calloc((size_t)(r * vg), sizeof(float)), *sums = malloc(sizeof(float) * kg * (r + 1));
    int64_t *last = malloc(sizeof(int64_t) * r);
    uint8_t *skip = calloc((size_t)(end - begin), 1);
    for (int64_t e = 0; e < c->exact; e++) {
        const int64_t slot = c->exact_slot[b * c->exact + e];
        if (slot >= begin && slot < end) skip[slot - begin] = 1;
    }
    for (int64_t i = 0; i < r; i++) {
        work[i * state] = LOWEST, last[i] = -1;
        memset(work + i * state + 1, 0, sizeof(float) * (1 + dv));
    }
    for (int64_t start = begin; start < end; start += TILE) {
        const int64_t n = end - start < TILE ? end - start : TILE;
        const uint8_t *codes = k->codes + b * k->stride_b + h * k->stride_h + start * k->row_bytes;
        const uint16_t *scale = k->scale + b * k->scale_b + h * k->scale_h + start * k->scales;
        int32_t at[TILE], block[TILE];
        for (int64_t t = 0; t < n; t++) {
            decode_row(k, codes + t * k->row_bytes, h, rows + t * d);
            for (int64_t g = 0; g < kg; g++) affine(k, scale + t * k->scales, g, a + t * kg + g, z + t * kg + g);
            at[t] = c->positions[b * c->position_stride + start + t];
            at[t] = at[t] < 0 ? 0 : at[t];
            block[t] = (int32_t)((uint32_t)at[t] / (uint32_t)c->block);
            block[t] = block[t] < c->blocks ? block[t] : (int32_t)c->blocks - 1;
        }
        for (int64_t i = 0; i < r; i++) {
            const int64_t q = (b * c->heads + h) * r + i;
            const float *of_query = c->w + q * c->blocks * d, *mean = c->mean ? c->mean + q * c->mean_span : NULL;
            const float *mask = c->mask ? c->mask + b * c->mask_b + (h * r + i) * c->mask_h + start : NULL;
            float *logits = p + i * TILE, *sum = sums + i * kg;
            for (int64_t t = 0; t < n; t++) {
                const float *w = of_query + block[t] * d, *row = rows + t * d;
                if (k->kind < 2) {
                    logits[t] = a[t] * dot(w, row, d);
                    continue;
                }
                if (block[t] != last[i])
                    for (int64_t g = 0; g < kg; g++) {
                        sum[g] = 0.0f;
                        for (int64_t x = 0; x < k->group_size; x++) sum[g] += w[g * k->group_size + x];
                    }
                last[i] = block[t];
                float logit = 0.0f;
                for (int64_t g = 0; g < kg; g++)
                    logit += a[t * kg + g] * dot(w + g * k->group_size, row + g * k->group_size, k->group_size) + z[t * kg + g] * sum[g];
                logits[t] = logit;
            }
            if (mean)
                for (int64_t t = 0; t < n; t++) logits[t] += mean[at[t] < c->mean_span ? at[t] : c->mean_span - 1];
            if (mask)
                for (int64_t t = 0; t < n; t++) logits[t] += mask[t];
            float *held = work + i * state, peak = held[0], mass = 0.0f;
            for (int64_t t = 0; t < n; t++) {
                logits[t] = skip[start - begin + t] || logits[t] < LOWEST ? LOWEST : logits[t];
                peak = logits[t] > peak ? logits[t] : peak;
            }
            const float fade = fast_exp(held[0] - peak);
            for (int64_t t = 0; t < n; t++) {
                const float e = fast_exp(logits[t] - peak);
                logits[t] = logits[t] <= LOWEST ? 0.0f : e;
                mass += logits[t];
            }
            held[0] = peak;
            held[1] = held[1] * fade + mass;
            for (int64_t x = 0; x < dv; x++) held[2 + x] *= fade;
            for (int64_t g = 0; g < vg; g++) base[i * vg + g] *= fade;
        }
        codes = v->codes + b * v->stride_b + h * v->stride_h + start * v->row_bytes;
        scale = v->scale + b * v->scale_b + h * v->scale_h + start * v->scales;
        for (int64_t t = 0; t < n; t++) {
            decode_row(v, codes + t * v->row_bytes, h, rows + t * dv);
            for (int64_t g = 0; g < vg; g++) affine(v, scale + t * v->scales, g, a + t * vg + g, z + t * vg + g);
        }
        for (int64_t g = 0; g < vg; g++) {
            for (int64_t i = 0; i < r; i++) {
                float shift = 0.0f;
                for (int64_t t = 0; t < n; t++) { /* a row that is skipped may hold codes and scales of nothing */
                    const float e = p[i * TILE + t];
                    weight[i * TILE + t] = e > 0.0f ? e * a[t * vg + g] : 0.0f;
                    shift += e > 0.0f ? e * z[t * vg + g] : 0.0f;
                }
                base[i * vg + g] += shift;
            }
            gather_all(r, v->group_size, n, rows + g * v->group_size, dv, weight, work + 2 + g * v->group_size, state);
        }
    }
    for (int64_t i = 0; i < r; i++)
        for (int64_t g = 0; g < vg; g++)
            for (int64_t x = 0; x < v->group_size; x++) work[i * state + 2 + g * v->group_size + x] += base[i * vg + g];
    free(rows), free(p), free(weight), free(a), free(z), free(base), free(sums), free(last), free(skip);
}

/* Rows held as they are: the first output holds decoded rows, the second these, on one common maximum. */
static void merge(const Call *c, int64_t b, int64_t h) {
    const int64_t r = c->repeats, d = c->key.dim, dv = c->value.dim, width = 2 + dv, e = c->exact, bh = b * c->heads + h;
    float *logits = malloc(sizeof(float) * (e + 1));
    for (int64_t i = 0; i < r; i++) {
        const int64_t q = bh * r + i, all = c->batch * c->heads * r;
        float peak = LOWEST;
        for (int64_t s = 0; s < c->pieces; s++) {
            const float top = c->work[((bh * c->pieces + s) * r + i) * width];
            peak = top > peak ? top : peak;
        }
        for (int64_t x = 0; x < e; x++) {
            const int64_t slot = c->exact_slot[b * e + x];
            logits[x] = LOWEST;
            if (slot < 0) continue;
            float logit = dot(c->q + q * d, c->exact_k + (bh * e + x) * d, d);
            if (c->mask) logit += c->mask[b * c->mask_b + (h * r + i) * c->mask_h + slot];
            logits[x] = logit < LOWEST ? LOWEST : logit;
            peak = logits[x] > peak ? logits[x] : peak;
        }
        float *decoded = c->out + q * dv, *held = c->out + (all + q) * dv;
        memset(decoded, 0, sizeof(float) * dv), memset(held, 0, sizeof(float) * dv);
        float mass = 0.0f, held_mass = 0.0f;
        for (int64_t s = 0; s < c->pieces; s++) {
            const float *state = c->work + ((bh * c->pieces + s) * r + i) * width, fade = fast_exp(state[0] - peak);
            mass += fade * state[1];
            for (int64_t x = 0; x < dv; x++) decoded[x] += fade * state[2 + x];
        }
        for (int64_t x = 0; x < e; x++) {
            if (logits[x] <= LOWEST) continue;
            const float p = fast_exp(logits[x] - peak), *row = c->exact_v + (bh * e + x) * dv;
            held_mass += p;
            for (int64_t y = 0; y < dv; y++) held[y] += p * row[y];
        }
        c->mass[q] = mass, c->mass[all + q] = held_mass;
    }
    free(logits);
}

void kvsink_attend(const Call *c) {
    const int64_t pieces = c->batch * c->heads * c->pieces, run = (c->slots + c->pieces - 1) / c->pieces;
#pragma omp parallel for schedule(dynamic)
    for (int64_t x = 0; x < pieces; x++) {
        const int64_t bh = x / c->pieces, begin = (x % c->pieces) * run;
        int64_t end = begin + run < c->slots ? begin + run : c->slots;
        if (end < begin) end = begin;
        piece(c, bh / c->heads, bh % c->heads, begin, end, c->work + x * c->repeats * (2 + c->value.dim));
    }
#pragma omp parallel for schedule(static)
    for (int64_t bh = 0; bh < c->batch * c->heads; bh++) merge(c, bh / c->heads, bh % c->heads);
}

/* A version the caller checks, so that a stale library is never called with another layout. */
int64_t kvsink_attend_call_bytes(void) { return (int64_t)sizeof(Call); }
