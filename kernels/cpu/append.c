/* New rows into the packed cache, on the CPU: see append.py for the formulas.
 *
 * `kvsink_append` codes rows that stand in the basis of their codec, or brings one new row per sequence there first, and writes
 * codes and scales to their slots; work is cut into rows of one head. `kvsink_select` is the running selection of exact rows for
 * one new row per sequence; `kvsink_append_one` does all that one new row needs.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"
#include "trellis.h"

#define TINY 6.0e-8f /* as quantize.py */

enum { DEVIATIONS, STEP_BASE, STEP_ZERO, DEVIATION_MEAN, VECTORS, TRELLIS };

typedef struct {
    int64_t dim, row_bytes, groups, group_size, scales; /* channels, bytes of codes, groups, channels of one, numbers a row */
    int64_t stride_b, stride_h;                          /* of codes, in bytes */
    int64_t scale_b, scale_h;                            /* of scales, in numbers */
    int64_t kind, gain, runs;
    const int64_t *run;             /* [runs, 4]: first channel, end channel, first byte, width */
    const float *const *levels;     /* per run [2^width]; of a trellis [4, 2^(width - 1)] */
    const float *const *thresholds; /* per run between levels [2^width - 1]; of a trellis [4, 2^(width - 1) - 1] */
    const float *sigma;             /* [H, D] */
    int64_t couple, code_bits, book_h; /* channels of one code when codes name vectors; numbers between books of heads */
    const float *book;                 /* [H or 1, dim / couple, 2^code_bits, couple] */
    double clip;
    const float *x; /* [B, H, S, D] in the basis of the codec, or NULL: `row` is brought there */
    uint8_t *codes;
    uint16_t *scale;
    const void *row; /* [B, H, D], of `type`, keys after RoPE */
    int64_t type, row_b, row_h;
    int64_t rope, order;                 /* what happens to RoPE; channels of a Hadamard rotation, 0 for none */
    const float *mean, *middle, *basis;  /* [H, D] before the offset is rotated to and behind it; [H, D, D]; or NULL */
    const float *offset_cos, *offset_sin; /* [block, rotary] or NULL */
    int64_t block;
} Side;

enum { AS_IT_IS, BY_BLOCK, ROTATED_MEAN }; /* rows whose RoPE stays; whose RoPE is that of the offset; less the mean after RoPE */

typedef struct {
    int64_t batch, heads, rows, slot;
    Side sides[2];
    const int64_t *position; /* of the new row of every sequence, as cos and sin [B or 1, rotary] */
    int64_t position_b;
    const void *cos, *sin;
    int64_t angle_type, angle_b, rotary;
    int32_t *positions; /* [B, L] */
    int64_t positions_b;
} Append;

typedef struct {
    int64_t batch, heads, places, segments, first; /* exact rows of a sequence, their runs, the slot of the new row */
    const int64_t *capacity;                       /* [segments] */
    const int64_t *scores;                         /* per segment: how often the new row may be chosen */
    const float *const *candidate;                 /* per segment: its scores [B, n] */
    int32_t *slot;                                 /* [B, E] */
    float *score;                                  /* [B, E] */
    uint8_t *store[2];                             /* keys and values [B, H, E, bytes] */
    const uint8_t *fresh[2];                       /* of the new row [B, H, bytes] */
    int64_t bytes[2], fresh_b[2], fresh_h[2];      /* of a row; between sequences and heads of the new ones */
} Select;

/* Number of thresholds below y / g; all of them for what is no number, as a search gives. */
static void bucket(const float *y, float g, int64_t n, const float *thresholds, int64_t width, uint16_t *code) {
    const int64_t count = ((int64_t)1 << width) - 1;
    float z[8];
    for (int64_t a = 0; a < n; a += 8) { /* runs and groups are multiples of eight channels */
        uint32_t c[8] = {0};
        for (int64_t i = 0; i < 8; i++) z[i] = y[a + i] / g;
        for (int64_t t = 0; t < count; t++)
            for (int64_t i = 0; i < 8; i++) c[i] += !(thresholds[t] >= z[i]);
        for (int64_t i = 0; i < 8; i++) code[a + i] = (uint16_t)c[i];
    }
}

static void pack(const uint16_t *code, int64_t n, int64_t width, uint8_t *out) {
    uint64_t word = 0;
    int64_t held = 0;
    for (int64_t i = 0; i < n; i++) {
        word |= (uint64_t)code[i] << held;
        for (held += width; held >= 8; held -= 8, word >>= 8) *out++ = (uint8_t)word;
    }
    if (held) *out = (uint8_t)word;
}

static void deviations_code(const Side *s, const float *y, float g, uint16_t *code) {
    for (int64_t k = 0; k < s->runs; k++) {
        const int64_t *r = s->run + 4 * k;
        bucket(y + r[0], g, r[1] - r[0], s->thresholds[k], r[3], code + r[0]);
    }
}

/* The gain for which gain * deviation * level comes closest to x over the coded channels. */
static uint16_t deviations_fit(const Side *s, const float *x, const float *deviation, const uint16_t *code) {
    double product = 0.0, square = 0.0;
    for (int64_t k = 0; k < s->runs; k++)
        for (int64_t i = s->run[4 * k]; i < s->run[4 * k + 1]; i++) {
            const float level = s->levels[k][code[i]] * deviation[i];
            product += x[i] * level, square += level * level;
        }
    const float below = (float)square;
    return to_half((float)product / (below > 1e-30f ? below : 1e-30f));
}

static void deviations_row(const Side *s, const float *x, const float *sigma, float *room, uint16_t *code, uint16_t *scale) {
    float *deviation = room, *y = room + s->dim;
    double square = 0.0;
    for (int64_t i = 0; i < s->dim; i++) {
        deviation[i] = sigma[i] > TINY ? sigma[i] : TINY;
        y[i] = x[i] / deviation[i];
        square += y[i] * y[i];
    }
    float g = 1.0f;
    if (s->gain) {
        g = (float)sqrt(square / (double)s->dim);
        deviations_code(s, y, g > TINY ? g : TINY, code);
        g = half(deviations_fit(s, x, deviation, code));
        g = g > TINY ? g : TINY;
    }
    deviations_code(s, y, g, code);
    if (s->gain) scale[0] = deviations_fit(s, x, deviation, code);
}

static void group_row(const Side *s, const float *x, float *room, uint16_t *code, uint16_t *scale) {
    const int64_t n = s->group_size, width = s->run[3];
    const float top = (float)(((int64_t)1 << width) - 1), clip = (float)s->clip;
    for (int64_t g = 0; g < s->groups; g++, x += n, code += n, scale += 2) {
        if (s->kind == DEVIATION_MEAN) {
            double sum = 0.0, square = 0.0;
            for (int64_t i = 0; i < n; i++) sum += x[i];
            scale[1] = to_half((float)(sum / (double)n));
            const float mean = half(scale[1]);
            for (int64_t i = 0; i < n; i++) room[i] = x[i] - mean, square += room[i] * room[i];
            scale[0] = to_half((float)sqrt(square / (double)n));
            const float d = half(scale[0]);
            bucket(room, d > TINY ? d : TINY, n, s->thresholds[0], width, code);
            continue;
        }
        float hi = x[0], lo = x[0];
        for (int64_t i = 1; i < n; i++) hi = x[i] > hi ? x[i] : hi, lo = x[i] < lo ? x[i] : lo;
        hi *= clip, lo *= clip;
        uint16_t s16 = to_half((hi - lo) / top);
        float step = half(s16);
        float shift = 0.0f, base = 0.0f;
        if (s->kind == STEP_ZERO) {
            step = step > 0.0f ? step : 1.0f;
            s16 = to_half(step);
            scale[1] = to_half(rintf(-lo / step));
            shift = half(scale[1]);
        } else {
            scale[1] = to_half(lo);
            base = half(scale[1]);
            step = step > TINY ? step : TINY;
        }
        scale[0] = s16;
        for (int64_t i = 0; i < n; i++) {
            float c = rintf((x[i] - base) / step) + shift;
            c = c < 0.0f ? 0.0f : c > top ? top : c;
            code[i] = (uint16_t)c;
        }
    }
}

static void vectors_code(const Side *s, const float *x, float g, const float *book, float *room, uint16_t *code) {
    const int64_t c = s->couple, size = (int64_t)1 << s->code_bits;
    for (int64_t a = 0; a < s->dim / c; a++, book += size * c) {
        float y[64];
        for (int64_t j = 0; j < c; j++) y[j] = x[a * c + j] / g;
        for (int64_t k = 0; k < size; k++) { /* x.C - |C|^2 / 2 is largest where the distance is smallest */
            float product = 0.0f, square = 0.0f;
            for (int64_t j = 0; j < c; j++) product += y[j] * book[k * c + j], square += book[k * c + j] * book[k * c + j];
            room[k] = product - 0.5f * square;
        }
        int64_t best = 0;
        for (int64_t k = 1; k < size; k++)
            if (room[k] > room[best]) best = k;
        code[a] = (uint16_t)best;
    }
}

static uint16_t vectors_fit(const Side *s, const float *x, const float *book, const uint16_t *code) {
    const int64_t c = s->couple, size = (int64_t)1 << s->code_bits;
    double product = 0.0, square = 0.0;
    for (int64_t a = 0; a < s->dim / c; a++) {
        const float *from = book + (a * size + code[a]) * c;
        for (int64_t j = 0; j < c; j++) product += x[a * c + j] * from[j], square += from[j] * from[j];
    }
    const float below = (float)square, g = (float)product / (below > 1e-30f ? below : 1e-30f);
    return to_half(g > 0.0f ? g : 0.0f);
}

static void vectors_row(const Side *s, const float *x, const float *book, float *room, uint16_t *code, uint16_t *scale) {
    float g = 1.0f;
    if (s->gain) {
        double square = 0.0;
        for (int64_t i = 0; i < s->dim; i++) square += x[i] * x[i];
        g = (float)sqrt(square / (double)s->dim);
        vectors_code(s, x, g > TINY ? g : TINY, book, room, code);
        g = half(vectors_fit(s, x, book, code));
        g = g > TINY ? g : TINY;
    }
    vectors_code(s, x, g, book, room, code);
    if (s->gain) scale[0] = vectors_fit(s, x, book, code);
}

/* y = x after RoPE by cos and sin, in the order of roundings of rope.py */
static void rope(const float *x, const float *cos, const float *sin, int64_t rotary, int64_t dim, float *y) {
    const int64_t middle = rotary / 2;
    for (int64_t i = 0; i < middle; i++) y[i] = x[i] * cos[i] - x[i + middle] * sin[i];
    for (int64_t i = middle; i < rotary; i++) y[i] = x[i] * cos[i] + x[i - middle] * sin[i];
    for (int64_t i = rotary; i < dim; i++) y[i] = x[i];
}

static void hadamard(float *x, int64_t order, int64_t dim) {
    const float scale = (float)sqrt(1.0 / (double)order);
    for (int64_t h = 1; h < order; h *= 2)
        for (int64_t i = 0; i < dim; i += 2 * h)
            for (int64_t j = i; j < i + h; j++) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b, x[j + h] = a - b;
            }
    for (int64_t i = 0; i < dim; i++) x[i] *= scale;
}

/* The stages of a new row before its quantizer, see Codec.transform_keys; the same roundings but for the sums of a basis, which
 * are taken in float64. They take 4 dim floats and dim doubles. */
static const float *stages(const Append *a, const Side *s, int64_t b, int64_t h, float *room, double *sums) {
    const int64_t d = s->dim, rotary = a->rotary;
    float *x = room, *y = x + d, *cos = y + d, *sin = cos + rotary, *keep;
    const float *mean = s->mean ? s->mean + h * d : NULL, *middle = s->middle ? s->middle + h * d : NULL;
    load(s->row, s->type, b * s->row_b + h * s->row_h, d, x);
    if (s->rope != AS_IT_IS) {
        load(a->cos, a->angle_type, b * a->angle_b, rotary, cos);
        load(a->sin, a->angle_type, b * a->angle_b, rotary, sin);
    }
    if (s->rope == BY_BLOCK) {
        for (int64_t i = 0; i < rotary; i++) {
            const float square = cos[i] * cos[i] + sin[i] * sin[i], norm = square < 1e-12f ? 1e-12f : square;
            cos[i] = cos[i] / norm, sin[i] = -sin[i] / norm;
        }
        rope(x, cos, sin, rotary, d, y);
        for (int64_t i = 0; mean && i < d; i++) y[i] -= mean[i];
        keep = x, x = y, y = keep;
        if (s->offset_cos) {
            const int64_t position = a->position[b * a->position_b], at = (position % s->block + s->block) % s->block * rotary;
            rope(x, s->offset_cos + at, s->offset_sin + at, rotary, d, y);
            keep = x, x = y, y = keep;
        }
    } else if (s->rope == ROTATED_MEAN) {
        rope(mean, cos, sin, rotary, d, y);
        for (int64_t i = 0; i < d; i++) x[i] -= y[i];
    } else
        for (int64_t i = 0; mean && i < d; i++) x[i] -= mean[i];
    for (int64_t i = 0; middle && i < d; i++) x[i] -= middle[i];
    if (s->basis) {
        const float *basis = s->basis + h * d * d;
        for (int64_t j = 0; j < d; j++) sums[j] = 0.0;
        for (int64_t i = 0; i < d; i++)
            for (int64_t j = 0; j < d; j++) sums[j] += (double)x[i] * (double)basis[i * d + j];
        for (int64_t j = 0; j < d; j++) x[j] = (float)sums[j];
    }
    if (s->order) hadamard(x, s->order, d);
    return x;
}

static void append_row(const Append *a, const Side *s, int64_t bh, int64_t row, float *room, double *sums, uint16_t *code) {
    const int64_t b = bh / a->heads, h = bh % a->heads;
    const float *x = s->x ? s->x + (bh * a->rows + row) * s->dim : stages(a, s, b, h, room + 9 * s->dim + 4096, sums);
    uint8_t *out = s->codes + b * s->stride_b + h * s->stride_h + (a->slot + row) * s->row_bytes;
    uint16_t *scale = s->scale + b * s->scale_b + h * s->scale_h + (a->slot + row) * s->scales;
    if (s->kind == VECTORS) {
        vectors_row(s, x, s->book + h * s->book_h, room, code, scale);
        pack(code, s->dim / s->couple, s->code_bits, out);
        return;
    }
    if (s->kind == TRELLIS)
        out[s->row_bytes - 1] = trellis_row(s->dim, s->runs, s->run, s->levels, s->thresholds, x, s->sigma + h * s->dim, room, code);
    else if (s->kind == DEVIATIONS) deviations_row(s, x, s->sigma + h * s->dim, room, code, scale);
    else group_row(s, x, room, code, scale);
    for (int64_t k = 0; k < s->runs; k++) {
        const int64_t *r = s->run + 4 * k;
        pack(code + r[0], r[1] - r[0], r[3], out + r[2]);
    }
}

void kvsink_append(const Append *a) {
    const int64_t work = 2 * a->batch * a->heads * a->rows;
#pragma omp parallel if (work > 64)
    {
        const int64_t most = a->sides[0].dim > a->sides[1].dim ? a->sides[0].dim : a->sides[1].dim;
        float *room = malloc(sizeof(float) * (13 * most + 4096));
        double *sums = malloc(sizeof(double) * most);
        uint16_t *code = malloc(sizeof(uint16_t) * most);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < work; i++)
            append_row(a, &a->sides[i % 2], i / 2 / a->rows, i / 2 % a->rows, room, sums, code);
        free(room), free(sums), free(code);
    }
}

/* Place `at` of a sequence becomes place `to` before it; those between move up by one. */
static void move(const Select *s, int64_t b, int64_t at, int64_t to, uint8_t *room) {
    int32_t *slot = s->slot + b * s->places + to, moved_slot = slot[at - to];
    float *score = s->score + b * s->places + to, moved_score = score[at - to];
    memmove(score + 1, score, sizeof(float) * (at - to));
    memmove(slot + 1, slot, sizeof(int32_t) * (at - to));
    *score = moved_score, *slot = moved_slot;
    for (int64_t kv = 0; kv < 2; kv++)
        for (int64_t h = 0; h < s->heads; h++) {
            const int64_t size = s->bytes[kv];
            uint8_t *rows = s->store[kv] + ((b * s->heads + h) * s->places + to) * size;
            memcpy(room, rows + (at - to) * size, size);
            memmove(rows + size, rows, size * (at - to));
            memcpy(rows, room, size);
        }
}

/* The rule of selection.py: whether place `a` of a sequence goes before place `c`. */
static int precedes(const float *score, const int32_t *slot, int64_t a, int64_t c) {
    return score[a] > score[c] || (score[a] == score[c] && slot[a] < slot[c]);
}

/* The new row of a sequence among places from … end - 1, best first, where its score beats one that stands there. No row that
 * stands there is later than it. */
static void insert(const Select *s, int64_t b, int64_t from, int64_t end, float fresh, uint8_t *room) {
    float *score = s->score + b * s->places;
    int64_t at = end;
    while (at > from && fresh > score[at - 1]) at--;
    if (at == end) return;
    move(s, b, end - 1, at, room);
    score[at] = fresh;
    s->slot[b * s->places + at] = (int32_t)s->first;
    for (int64_t kv = 0; kv < 2; kv++)
        for (int64_t h = 0; h < s->heads; h++) {
            const int64_t size = s->bytes[kv];
            uint8_t *rows = s->store[kv] + ((b * s->heads + h) * s->places + at) * size;
            memcpy(rows, s->fresh[kv] + b * s->fresh_b[kv] + h * s->fresh_h[kv], size);
        }
}

/* One new row against the places of every segment, which it leaves in the order of the rule. */
void kvsink_select(const Select *s) {
    const int64_t e = s->places;
    uint8_t *room = malloc(s->bytes[0] > s->bytes[1] ? s->bytes[0] : s->bytes[1]);
    for (int64_t b = 0; b < s->batch; b++) {
        int32_t *slot = s->slot + b * e;
        float *score = s->score + b * e;
        for (int64_t i = 0; i < e; i++)
            if (slot[i] < -1) slot[i] = -slot[i] - 2; /* a place marked as a repeat still names its row */
        for (int64_t k = 0, from = 0; k < s->segments; from += s->capacity[k++]) {
            const int64_t end = from + s->capacity[k];
            for (int64_t at = from + 1; at < end; at++) { /* a crop leaves places empty between others, kernels an order of theirs */
                int64_t to = at;
                while (to > from && precedes(score, slot, at, to - 1)) to--;
                if (to < at) move(s, b, at, to, room);
            }
            for (int64_t i = 0; i < s->scores[k]; i++) insert(s, b, from, end, s->candidate[k][b * s->scores[k] + i], room);
        }
        for (int64_t i = 0; i < e; i++) {
            if (score[i] == -INFINITY) slot[i] = -1;
            for (int64_t j = 0; j < i && slot[i] >= 0; j++)
                if (slot[j] == slot[i] || (slot[j] < -1 && -slot[j] - 2 == slot[i])) slot[i] = -slot[i] - 2;
        }
    }
    free(room);
}

/* Everything for one new row per sequence; `s` names no places where a codec keeps no rows exact. */
void kvsink_append_one(const Append *a, const Select *s) {
    for (int64_t b = 0; b < a->batch; b++)
        a->positions[b * a->positions_b + a->slot] = (int32_t)a->position[b * a->position_b];
    if (s->places) kvsink_select(s);
    kvsink_append(a);
}

/* Versions the caller checks, so that a stale library is never called with another layout. */
int64_t kvsink_append_bytes(void) { return (int64_t)sizeof(Append); }
int64_t kvsink_select_bytes(void) { return (int64_t)sizeof(Select); }
