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

#include "half.h"
#if defined(__AVX512F__) && defined(__AVX512VL__)
#include <immintrin.h>
#define PERMUTE
#endif

#define TILE 64
#define LOWEST -1e30f

typedef struct {
    int64_t dim, row_bytes, groups, group_size, scales; /* channels, bytes of codes, scale groups, channels of one, numbers a row */
    int64_t stride_b, stride_h;                          /* of codes, in bytes */
    int64_t scale_b, scale_h;                            /* of scales, in numbers */
    int64_t kind;                                        /* 0 lloyd without gain, 1 lloyd with gain, 2 step and base, 3 step and code of zero */
    int64_t runs;                                        /* runs of equal width */
    const int64_t *run;                                  /* [runs, 4]: first channel, end channel, first byte, width */
    const float *const *tables;                          /* per run: levels of every byte (1, 2, 4, 8 bit) or of every code */
    const float *const *levels;                          /* per run: levels of every code, at least sixteen numbers */
    const uint8_t *codes;
    const uint16_t *scale; /* float16 */
    int64_t couple, code_bits, book_h; /* channels of one code when codes name vectors, else 0; numbers between books of heads */
    const float *book;                 /* [H or 1, dim / couple, 2^code_bits, couple] */
} Side;

typedef struct {
    int64_t batch, heads, repeats, slots, pieces;
    Side key, value;
    int64_t blocks, block, mean_span; /* w [B, H, R, blocks, D], one per `block` positions; mean [B, H, R, span] by position, or NULL */
    const float *w, *mean;
    const int32_t *positions; /* [B, L] */
    int64_t position_stride;
    const float *mask;        /* additive, [B or 1, 1 or Hq, L], or NULL */
    int64_t mask_b, mask_h;
    const float *q;           /* [B, H, R, D] as attention sees it, times the scale */
    int64_t exact;            /* rows held as they are: k [B, H, E, D], v, slot [B, E] (negative: empty) */
    const float *exact_k, *exact_v;
    const int32_t *exact_slot;
    float *out;               /* [2, B, H, R, value dim]: sums of decoded values and of exact ones */
    float *mass;              /* [2, B, H, R] */
    float *work;              /* [B * H * pieces, R, 2 + value dim] */
} Call;

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

static inline float dot(const float *a, const float *b, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void piece(const Call *c, int64_t b, int64_t h, int64_t begin, int64_t end, float *work) {
    const Side *k = &c->key, *v = &c->value;
    const int64_t r = c->repeats, d = k->dim, dv = v->dim;
    float *rows = malloc(sizeof(float) * TILE * (d > dv ? d : dv)), *p = malloc(sizeof(float) * r * TILE);
    float *base = malloc(sizeof(float) * r * v->groups), *sums = malloc(sizeof(float) * (k->groups + 1));
    uint8_t *skip = calloc((size_t)(end - begin), 1);
    for (int64_t e = 0; e < c->exact; e++) {
        const int64_t slot = c->exact_slot[b * c->exact + e];
        if (slot >= begin && slot < end) skip[slot - begin] = 1;
    }
    for (int64_t i = 0; i < r; i++) {
        work[i * (2 + dv)] = LOWEST;
        memset(work + i * (2 + dv) + 1, 0, sizeof(float) * (1 + dv));
    }
    memset(base, 0, sizeof(float) * r * v->groups);
    for (int64_t start = begin; start < end; start += TILE) {
        const int64_t n = end - start < TILE ? end - start : TILE;
        const uint8_t *codes = k->codes + b * k->stride_b + h * k->stride_h + start * k->row_bytes;
        const uint16_t *scale = k->scale + b * k->scale_b + h * k->scale_h + start * k->scales;
        for (int64_t t = 0; t < n; t++) decode_row(k, codes + t * k->row_bytes, h, rows + t * d);
        for (int64_t i = 0; i < r; i++) {
            const int64_t q = (b * c->heads + h) * r + i;
            float top = LOWEST;
            int64_t last = -1;
            for (int64_t t = 0; t < n; t++) {
                if (skip[start - begin + t]) { p[i * TILE + t] = LOWEST; continue; }
                int64_t at = c->positions[b * c->position_stride + start + t];
                at = at < 0 ? 0 : at;
                int64_t m = at / c->block;
                m = m < c->blocks ? m : c->blocks - 1;
                const float *w = c->w + (q * c->blocks + m) * d;
                if (k->kind >= 2 && m != last)
                    for (int64_t g = 0; g < k->groups; g++) {
                        sums[g] = 0.0f;
                        for (int64_t x = 0; x < k->group_size; x++) sums[g] += w[g * k->group_size + x];
                    }
                last = m;
                float logit = 0.0f;
                if (k->kind < 2) {
                    float a, z;
                    affine(k, scale + t * k->scales, 0, &a, &z);
                    logit = a * dot(w, rows + t * d, d);
                } else
                    for (int64_t g = 0; g < k->groups; g++) {
                        float a, z;
                        affine(k, scale + t * k->scales, g, &a, &z);
                        logit += a * dot(w + g * k->group_size, rows + t * d + g * k->group_size, k->group_size) + z * sums[g];
                    }
                if (c->mean) logit += c->mean[q * c->mean_span + (at < c->mean_span ? at : c->mean_span - 1)];
                if (c->mask) logit += c->mask[b * c->mask_b + (h * r + i) * c->mask_h + start + t];
                p[i * TILE + t] = logit = logit < LOWEST ? LOWEST : logit;
                top = logit > top ? logit : top;
            }
            float *state = work + i * (2 + dv);
            const float peak = top > state[0] ? top : state[0], fade = fast_exp(state[0] - peak);
            float mass = 0.0f;
            for (int64_t t = 0; t < n; t++) {
                const float e = p[i * TILE + t] <= LOWEST ? 0.0f : fast_exp(p[i * TILE + t] - peak);
                p[i * TILE + t] = e;
                mass += e;
            }
            state[0] = peak;
            state[1] = state[1] * fade + mass;
            for (int64_t x = 0; x < dv; x++) state[2 + x] *= fade;
            for (int64_t g = 0; g < v->groups; g++) base[i * v->groups + g] *= fade;
        }
        codes = v->codes + b * v->stride_b + h * v->stride_h + start * v->row_bytes;
        scale = v->scale + b * v->scale_b + h * v->scale_h + start * v->scales;
        for (int64_t t = 0; t < n; t++) {
            if (skip[start - begin + t]) continue;
            decode_row(v, codes + t * v->row_bytes, h, rows);
            for (int64_t g = 0; g < v->groups; g++) {
                float a, z;
                affine(v, scale + t * v->scales, g, &a, &z);
                for (int64_t i = 0; i < r; i++) {
                    const float e = p[i * TILE + t], ea = e * a;
                    float *sum = work + i * (2 + dv) + 2 + g * v->group_size;
                    const float *row = rows + g * v->group_size;
                    for (int64_t x = 0; x < v->group_size; x++) sum[x] += ea * row[x];
                    base[i * v->groups + g] += e * z;
                }
            }
        }
    }
    for (int64_t i = 0; i < r; i++)
        for (int64_t g = 0; g < v->groups; g++)
            for (int64_t x = 0; x < v->group_size; x++) work[i * (2 + dv) + 2 + g * v->group_size + x] += base[i * v->groups + g];
    free(rows), free(p), free(base), free(sums), free(skip);
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
