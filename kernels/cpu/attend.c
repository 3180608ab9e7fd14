/* Attention of one new query row per sequence over packed rows, on the CPU: see attend.py for the formula.
 *
 * Work is cut into (sequence, key-value head, run of slots). Each piece decodes tiles of TILE rows into float levels, takes the
 * logits of all query heads that share the head, and keeps a running maximum, mass and weighted sum of values. Levels stay in
 * the basis of the codec: the query moves there, once for every block of positions that a piece meets, and the sum moves back
 * when the pieces of a head are merged.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "attend.h"
#include "half.h"
#if defined(__AVX512F__) && defined(__AVX512VL__)
#include <immintrin.h>
#define PERMUTE
#endif

#define TILE 64
#define LOWEST -1e30f
/* Sixteen numbers at any address; the compiler cuts them into what the machine has. */
typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
#define LANES 16
#define AT(p) (*(const vec *)(p))
typedef int32_t ints __attribute__((vector_size(64)));

/* exp for x <= 0: 2^i times a polynomial on [-1/2, 1/2], relative error below 3e-7. */
static inline vec fast_exps(vec x) {
    const vec low = {0};
    vec t = x * 1.44269504f;
    const ints tiny = t < -126.0f;
    t = (vec)(((ints)t & ~tiny) | ((ints)(low - 126.0f) & tiny));
    const ints i = __builtin_convertvector(t - 0.5f, ints);
    const vec y = (t - __builtin_convertvector(i, vec)) * 0.693147181f;
    const vec p = 1.0f + y * (1.0f + y * (0.5f + y * (1.66666667e-1f + y * (4.16666667e-2f + y * (8.33333333e-3f + y * 1.38888889e-3f)))));
    return p * (vec)((i + 127) << 23);
}

static inline float fast_exp(float x) { return fast_exps((vec){x})[0]; }

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

/* Eight codes of at most four bits are one word of `width` bytes. */
static inline __attribute__((always_inline)) uint32_t eight(const uint8_t *in, int width) {
    uint32_t word = in[0];
    for (int b = 1; b < width; b++) word |= (uint32_t)in[b] << (8 * b);
    return word;
}

#ifdef PERMUTE
/* Runs of at most four bits: sixteen levels are one permutation, which looks at four bits of a shifted word. */
static inline __attribute__((always_inline)) void decode_narrow(
    int width, int64_t n, int64_t rows, const uint8_t *row, int64_t row_bytes, const float *levels, float *to, int64_t dim
) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i shift = _mm512_mullo_epi32(lane, _mm512_set1_epi32(width));
    const __m512 table = _mm512_loadu_ps(levels);
    for (int64_t t = 0; t < rows; t++, row += row_bytes, to += dim) {
        const uint8_t *in = row;
        int64_t i = 0;
        for (; i + 16 <= n; i += 16, in += 2 * width) {
            const __m512i low = _mm512_set1_epi32((int)eight(in, width));
            const __m512i both = _mm512_mask_set1_epi32(low, 0xff00, (int)eight(in + width, width));
            _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(_mm512_srlv_epi32(both, shift), table));
        }
        if (i < n) {
            const __m512i low = _mm512_set1_epi32((int)eight(in, width));
            const __m512 last = _mm512_permutexvar_ps(_mm512_srlv_epi32(low, shift), table);
            _mm256_storeu_ps(to + i, _mm512_castps512_ps256(last));
        }
    }
}
#endif

#ifdef PERMUTE
/* Eight codes in every 32 bits, so that code i begins at bit i times its width; other bits stand above them. */
static inline __attribute__((always_inline)) __m256i eight_everywhere(const uint8_t *in, int width) {
    int16_t two;
    int32_t four;
    switch (width) {
    case 1: return _mm256_set1_epi8((char)in[0]);
    case 2: memcpy(&two, in, 2); return _mm256_set1_epi16(two);
    default: memcpy(&four, in, 4); return _mm256_set1_epi32(four); /* of three bits too: a row ends with a byte more */
    }
}
#endif

/* Eight codes of one row in the lower half of sixteen numbers, those of another row in the upper one; other bits stand above them. */
static inline __attribute__((always_inline)) ints codes_of(int width, const uint8_t *one, const uint8_t *two) {
    const ints shift = {0, width, 2 * width, 3 * width, 4 * width, 5 * width, 6 * width, 7 * width,
                        0, width, 2 * width, 3 * width, 4 * width, 5 * width, 6 * width, 7 * width};
#ifdef PERMUTE
    const __m512i low = _mm512_castsi256_si512(eight_everywhere(one, width));
    return (ints)_mm512_srlv_epi32(_mm512_inserti64x4(low, eight_everywhere(two, width), 1), (__m512i)shift);
#else
    const int32_t a = (int32_t)eight(one, width), b = (int32_t)eight(two, width);
    return (ints){a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b} >> shift;
#endif
}

/* The same of five and six bits. */
static inline __attribute__((always_inline)) ints wide_codes_of(int width, const uint8_t *one, const uint8_t *two) {
    uint64_t a = 0, b = 0;
    for (int i = 0; i < width; i++) a |= (uint64_t)one[i] << (8 * i), b |= (uint64_t)two[i] << (8 * i);
#ifdef PERMUTE
    const __m512i shift = _mm512_setr_epi64(0, width, 2 * width, 3 * width, 4 * width, 5 * width, 6 * width, 7 * width);
    const __m256i low = _mm512_cvtepi64_epi32(_mm512_srlv_epi64(_mm512_set1_epi64((int64_t)a), shift));
    const __m256i high = _mm512_cvtepi64_epi32(_mm512_srlv_epi64(_mm512_set1_epi64((int64_t)b), shift));
    return (ints)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
    ints code;
    for (int i = 0; i < 8; i++) code[i] = (int32_t)(a >> (width * i)), code[i + 8] = (int32_t)(b >> (width * i));
    return code;
#endif
}

static inline __attribute__((always_inline)) void wide_walk(
    int width, int64_t n, const uint8_t *one, const uint8_t *two, const float *levels, ints turn, ints *older, ints *newer,
    float *to, float *other
) {
    const int32_t mask = (2 << width) - 1;
    for (int64_t i = 0; i < n; i += 8, one += width, two += width) {
        const ints code = wide_codes_of(width, one, two), index = ((code ^ *older) << 1 | *newer) & mask;
        *older = *newer & turn, *newer = code & 1;
#ifdef PERMUTE
        const __m512 level = _mm512_i32gather_ps((__m512i)index, levels, 4);
        _mm256_storeu_ps(to + i, _mm512_castps512_ps256(level));
        _mm256_storeu_ps(other + i, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(level), 1)));
#else
        for (int j = 0; j < 8; j++) to[i + j] = levels[index[j]], other[i + j] = levels[index[j + 8]];
#endif
    }
}

/* One run of walks in two rows: a lane is a circle, `older` and `newer` are the lowest bits of the codes two and one steps before. */
static inline __attribute__((always_inline)) void walk(
    int width, int64_t n, const uint8_t *one, const uint8_t *two, const float *levels, ints turn, ints *older, ints *newer,
    float *to, float *other
) {
#ifdef PERMUTE /* which looks at four or five bits of an index; fewer levels are repeated */
    const __m512 low = _mm512_loadu_ps(levels), high = width == 4 ? _mm512_loadu_ps(levels + 16) : low;
#endif
    for (int64_t i = 0; i < n; i += 8, one += width, two += width) {
        const ints code = codes_of(width, one, two), index = (code ^ *older) << 1 | *newer;
        *older = *newer & turn, *newer = code & 1;
#ifdef PERMUTE
        const __m512 level = width == 4 ? _mm512_permutex2var_ps(low, (__m512i)index, high) : _mm512_permutexvar_ps((__m512i)index, low);
        _mm256_storeu_ps(to + i, _mm512_castps512_ps256(level));
        _mm256_storeu_ps(other + i, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(level), 1)));
#else
        const int32_t mask = (2 << width) - 1;
        for (int j = 0; j < 8; j++) to[i + j] = levels[index[j] & mask], other[i + j] = levels[index[j + 8] & mask];
#endif
    }
}

static ints last_codes(const uint8_t *one, const uint8_t *two, int64_t width) {
    switch (width) {
    case 1: return codes_of(1, one, two);
    case 2: return codes_of(2, one, two);
    case 3: return codes_of(3, one, two);
    case 4: return codes_of(4, one, two);
    case 5: return wide_codes_of(5, one, two);
    default: return wide_codes_of(6, one, two);
    }
}

/* Levels of `n` rows of walks, two at a time; a last odd one stands for both. */
static void decode_walks(const Side *s, const uint8_t *rows, int64_t n, float *out) {
    const int64_t *end = s->run + 4 * s->runs - 4, dim = s->dim, steps = dim / 8, last = end[3], at = s->row_bytes - 1 - last;
    const int64_t before = steps > 1 && end[0] == dim - 8 ? end[-1] : last, behind = steps > 1 ? at - before : at;
    const ints zero = {0}, turn = zero - (int32_t)(steps > 2); /* u_(t-2) of shorter walks counts as 0 */
    for (int64_t t = 0; t < n; t += 2, rows += 2 * s->row_bytes, out += 2 * dim) {
        const uint8_t *one = rows, *two = rows + (t + 1 < n) * s->row_bytes;
        float *to = out, *other = out + (t + 1 < n) * dim;
        ints newer = last_codes(one + at, two + at, last) & 1, older = last_codes(one + behind, two + behind, before) & 1 & turn;
        for (int64_t k = 0; k < s->runs; k++) {
            const int64_t *run = s->run + 4 * k, c = run[0], channels = run[1] - c;
#define RUN(w, how) case w: how(w, channels, one + run[2], two + run[2], s->levels[k], turn, &older, &newer, to + c, other + c); break
            switch (run[3]) { RUN(1, walk); RUN(2, walk); RUN(3, walk); RUN(4, walk); RUN(5, wide_walk); RUN(6, wide_walk); }
        }
    }
}

/* Levels of `n` rows. */
static void decode(const Side *s, const uint8_t *rows, int64_t n, int64_t head, float *out) {
    const int64_t bytes = s->row_bytes, dim = s->dim;
    int64_t coded = 0;
    if (s->walk) {
        decode_walks(s, rows, n, out);
        return;
    }
    for (int64_t k = 0; k < s->runs; k++) coded += s->run[4 * k + 1] - s->run[4 * k];
    if (coded < dim) memset(out, 0, sizeof(float) * n * dim); /* channels of no bits stand in no run */
    if (s->couple)
        for (int64_t t = 0; t < n; t++) decode_vectors(s, rows + t * bytes, s->book + head * s->book_h, out + t * dim);
    for (int64_t k = 0; k < s->runs && !s->couple; k++) {
        const int64_t *run = s->run + 4 * k, width = run[3], channels = run[1] - run[0];
        const uint8_t *in = rows + run[2];
        const float *table = s->tables[k];
        float *to = out + run[0];
#ifdef PERMUTE
        switch (width) { /* so that the compiler knows the width */
        case 1: decode_narrow(1, channels, n, in, bytes, s->levels[k], to, dim); continue;
        case 2: decode_narrow(2, channels, n, in, bytes, s->levels[k], to, dim); continue;
        case 3: decode_narrow(3, channels, n, in, bytes, s->levels[k], to, dim); continue;
        case 4: decode_narrow(4, channels, n, in, bytes, s->levels[k], to, dim); continue;
        }
#endif
        for (int64_t t = 0; t < n; t++, in += bytes, to += dim) switch (width) {
            case 1: for (int64_t i = 0; i < channels / 8; i++) memcpy(to + 8 * i, table + 8 * in[i], 32); break;
            case 2: for (int64_t i = 0; i < channels / 4; i++) memcpy(to + 4 * i, table + 4 * in[i], 16); break;
            case 4: for (int64_t i = 0; i < channels / 2; i++) memcpy(to + 2 * i, table + 2 * in[i], 8); break;
            case 8: for (int64_t i = 0; i < channels; i++) to[i] = table[in[i]]; break;
            default:
                for (int64_t i = 0; i < channels / 8; i++) {
                    uint64_t word = 0, mask = (1u << width) - 1;
                    for (int64_t b = 0; b < width; b++) word |= (uint64_t)in[i * width + b] << (8 * b);
                    for (int64_t c = 0; c < 8; c++) to[8 * i + c] = table[(word >> (c * width)) & mask];
                }
            }
    }
}

/* x = a * level + b for every group and row: a, b [groups, TILE] */
static void affine(const Side *s, const uint8_t *codes, const uint16_t *scale, int64_t n, float *a, float *b) {
    for (int64_t t = 0; s->walk && t < n; t++) a[t] = gain_of(codes[(t + 1) * s->row_bytes - 1]), b[t] = 0.0f;
    if (s->walk) return;
    for (int64_t g = 0; g < s->groups; g++, a += TILE, b += TILE)
        for (int64_t t = 0; t < n; t++) {
            const uint16_t *of = scale + t * s->scales + 2 * g;
            a[t] = s->kind ? half(of[0]) : 1.0f;
            b[t] = s->kind == 2 ? half(of[1]) : s->kind == 3 ? -a[t] * half(of[1]) : 0.0f;
        }
}

static inline float total(vec lanes) {
#ifdef PERMUTE
    return _mm512_reduce_add_ps((__m512)lanes);
#else
    float sum = 0.0f;
    for (int64_t j = 0; j < LANES; j++) sum += lanes[j];
    return sum;
#endif
}

static inline float dot(const float *a, const float *b, int64_t n) {
    vec lanes = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) lanes += AT(a + i) * AT(b + i);
    float sum = total(lanes);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* out[i][t] += w[i] . rows[t], for `queries` of them and `vecs` times sixteen channels; w is held in registers. */
static inline __attribute__((always_inline)) void score(
    int queries, int vecs, int64_t n, const float *rows, int64_t row, const float *w, int64_t step, float *out
) {
    vec held[4][4];
    for (int i = 0; i < queries; i++)
        for (int x = 0; x < vecs; x++) held[i][x] = AT(w + i * step + x * LANES);
    for (int64_t t = 0; t < n; t++, rows += row)
        for (int i = 0; i < queries; i++) {
            vec lanes = held[i][0] * AT(rows);
            for (int x = 1; x < vecs; x++) lanes += held[i][x] * AT(rows + x * LANES);
            out[i * TILE + t] += total(lanes);
        }
}

/* out[i] += sum over t of weight[i][t] * rows[t], for `queries` of them and `vecs` times sixteen channels, held in registers. */
static inline __attribute__((always_inline)) void gather(
    int queries, int vecs, int64_t n, const float *rows, int64_t row, const float *weight, int64_t each, float *out, int64_t step
) {
    vec sum[4][4];
    for (int i = 0; i < queries; i++)
        for (int x = 0; x < vecs; x++) sum[i][x] = AT(out + i * step + x * LANES);
    for (int64_t t = 0; t < n; t++, rows += row)
        for (int i = 0; i < queries; i++) {
            const float w = weight[i * each + t];
            for (int x = 0; x < vecs; x++) sum[i][x] += AT(rows + x * LANES) * w;
        }
    for (int i = 0; i < queries; i++)
        for (int x = 0; x < vecs; x++) *(vec *)(out + i * step + x * LANES) = sum[i][x];
}

#define CASE(f, q, v, ...) case 4 * (q) + (v): f(q, v, __VA_ARGS__); break
#define CASES(f, q, ...) CASE(f, q, 1, __VA_ARGS__); CASE(f, q, 2, __VA_ARGS__); CASE(f, q, 3, __VA_ARGS__); CASE(f, q, 4, __VA_ARGS__)
#define ANY(f, ...) CASES(f, 1, __VA_ARGS__); CASES(f, 2, __VA_ARGS__); CASES(f, 3, __VA_ARGS__); CASES(f, 4, __VA_ARGS__)

/* Both for any number of queries and channels. */
static void score_all(
    int64_t queries, int64_t channels, int64_t n, const float *rows, int64_t row, const float *w, int64_t step, float *out
) {
    int64_t x = 0;
    for (int64_t vecs; (vecs = (channels - x) / LANES) > 0; x += vecs * LANES) {
        vecs = vecs < 4 ? vecs : 4;
        for (int64_t i = 0; i < queries; i += 4)
            switch (4 * (queries - i < 4 ? queries - i : 4) + vecs) {
                ANY(score, n, rows + x, row, w + i * step + x, step, out + i * TILE);
            }
    }
    for (int64_t i = 0; i < queries && x < channels; i++)
        for (int64_t t = 0; t < n; t++)
            for (int64_t y = x; y < channels; y++) out[i * TILE + t] += w[i * step + y] * rows[t * row + y];
}

static void gather_all(
    int64_t queries, int64_t channels, int64_t n, const float *rows, int64_t row, const float *weight, int64_t each, float *out,
    int64_t step
) {
    int64_t x = 0;
    for (int64_t vecs; (vecs = (channels - x) / LANES) > 0; x += vecs * LANES) {
        vecs = vecs < 4 ? vecs : 4;
        for (int64_t i = 0; i < queries; i += 4)
            switch (4 * (queries - i < 4 ? queries - i : 4) + vecs) {
                ANY(gather, n, rows + x, row, weight + i * each, each, out + i * step + x, step);
            }
    }
    for (int64_t i = 0; i < queries && x < channels; i++)
        for (int64_t t = 0; t < n; t++)
            for (int64_t y = x; y < channels; y++) out[i * step + y] += weight[i * each + t] * rows[t * row + y];
}

/* What one piece of work holds. */
typedef struct {
    float *q, *rotated, *w, *sums, *mean; /* [R, dim] three times; sums of w by group [R, groups]; share of the mean [R, block] */
    float *rows, *p, *part, *a, *z, *base;
    int64_t held; /* the block of the last three */
} Room;

static Room room_for(const Call *c, float *from, int64_t *numbers) {
    const int64_t r = c->repeats, d = c->key.dim, dv = c->value.dim, kg = c->key.groups, vg = c->value.groups;
    const int64_t most = kg > vg ? kg : vg, sizes[11] = {
        r * d, r * d, r * d, r * kg, c->mean ? r * c->block : 0, TILE * (d > dv ? d : dv), r * TILE, r * TILE * kg, TILE * most, TILE * most, r * vg,
    };
    float *at[11];
    int64_t sum = 0;
    for (int64_t i = 0; i < 11; sum += sizes[i++]) at[i] = from ? from + sum : NULL;
    if (numbers) *numbers = sum;
    return (Room){at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10], -1};
}

/* Where things stand: of a sequence in pages, `start` names its page, and x counts the exact rows of all its pages. */
static const uint8_t *codes_at(const Call *c, const Side *s, int64_t b, int64_t h, int64_t start) {
    const int64_t of = c->table ? c->table[start / c->page] : b, at = c->table ? start % c->page : start;
    return s->codes + of * s->stride_b + h * s->stride_h + at * s->row_bytes;
}

static const uint16_t *scales_at(const Call *c, const Side *s, int64_t b, int64_t h, int64_t start) {
    const int64_t of = c->table ? c->table[start / c->page] : b, at = c->table ? start % c->page : start;
    return s->scale + of * s->scale_b + h * s->scale_h + at * s->scales;
}

static int64_t row_at(const Call *c, int64_t b, int64_t h, int64_t x, int64_t of_b, int64_t of_h, int64_t of_row) {
    return c->table ? c->table[x / c->places] * of_b + h * of_h + x % c->places * of_row : b * of_b + h * of_h + x * of_row;
}

static inline int64_t share_of(const Call *c) { return c->share ? c->share : c->repeats; }

static int64_t query_at(const Call *c, int64_t b, int64_t h, int64_t i) {
    const int64_t share = share_of(c);
    return (b + i / share) * c->q_b + (h * share + i % share) * c->q_h;
}

/* Slots that query i may see. */
static inline int64_t seen_by(const Call *c, int64_t i) { return c->limit ? c->limit + i / share_of(c) : INT64_MAX; }

/* The query of a head in the basis of the key codec, as rows of block m see it, and what the mean of the keys adds. */
static void rotate(const Call *c, int64_t h, int64_t m, Room *o) {
    const Side *k = &c->key;
    const int64_t r = c->repeats, d = k->dim, rotary = c->rotary, middle = rotary / 2;
    const int64_t first = o->held < 0;
    if (c->by_block || c->mean)
        for (int64_t i = 0; i < r; i++) {
            const float *q = o->q + i * d, *cos = c->start_cos + m * rotary, *sin = c->start_sin + m * rotary;
            float *restrict t = o->rotated + i * d;
            for (int64_t x = 0; x < middle; x++) t[x] = q[x] * cos[x] + q[x + middle] * sin[x + middle];
            for (int64_t x = middle; x < rotary; x++) t[x] = q[x] * cos[x] - q[x - middle] * sin[x - middle];
            for (int64_t x = rotary; x < d; x++) t[x] = q[x];
        }
    if (c->mean) {
        memset(o->mean, 0, sizeof(float) * r * c->block);
        gather_all(r, c->block, d, c->mean + h * d * c->block, c->block, o->rotated, d, o->mean, c->block);
    }
    o->held = m;
    if (!c->by_block && !first) return; /* the query in the basis is the same for all */
    const float *from = c->by_block ? o->rotated : o->q;
    if (k->basis) {
        memset(o->w, 0, sizeof(float) * r * d);
        gather_all(r, d, d, k->basis + h * k->basis_h, d, from, d, o->w, d);
    } else memcpy(o->w, from, sizeof(float) * r * d);
    for (int64_t i = 0; i < r; i++) {
        float *w = o->w + i * d;
        for (int64_t x = 0; k->sigma && x < d; x++) w[x] *= k->sigma[h * d + x];
        for (int64_t g = 0; k->kind >= 2 && g < k->groups; g++) {
            float sum = 0.0f;
            for (int64_t x = 0; x < k->group_size; x++) sum += w[g * k->group_size + x];
            o->sums[i * k->groups + g] = sum;
        }
    }
}

/* Logits of the n rows from `start`, [R, TILE] into o->p, without a mask. */
static void logits(const Call *c, int64_t b, int64_t h, int64_t start, int64_t n, Room *o) {
    const Side *k = &c->key;
    const int64_t r = c->repeats, d = k->dim, span = c->block, each = r * TILE;
    const int32_t *positions = c->positions + b * c->position_stride + start;
    const uint8_t *codes = codes_at(c, k, b, h, start);
    decode(k, codes, n, h, o->rows);
    affine(k, codes, scales_at(c, k, b, h, start), n, o->a, o->z);
    memset(o->p, 0, sizeof(float) * each), memset(o->part, 0, sizeof(float) * each * k->groups);
    for (int64_t t = 0, end; t < n; t = end) { /* a run of rows of one block, at consecutive offsets where there is a mean */
        const int64_t of = positions[t] > 0 ? positions[t] / span : 0, m = of < c->blocks ? of : c->blocks - 1;
        const int64_t low = m ? m * span : INT64_MIN, high = m + 1 < c->blocks ? (m + 1) * span : INT64_MAX;
        const int64_t first = positions[t] - m * span, at = first >= 0 && first < span ? first : (first % span + span) % span;
        for (end = t + 1; end < n && positions[end] >= low && positions[end] < high; end++)
            if (c->mean && (positions[end] != positions[t] + end - t || at + end - t >= span)) break;
        if (m != o->held) rotate(c, h, m, o);
        for (int64_t g = 0; g < k->groups; g++)
            score_all(r, k->group_size, end - t, o->rows + t * d + g * k->group_size, d, o->w + g * k->group_size, d,
                      o->part + g * each + t);
        for (int64_t i = 0; i < r; i++) {
            float *restrict p = o->p + i * TILE + t;
            const float *mean = c->mean ? o->mean + i * span + at : NULL, *z = o->z + t;
            for (int64_t x = 0; c->mean && x < end - t; x++) p[x] += mean[x];
            for (int64_t g = 0; k->kind >= 2 && g < k->groups; g++)
                for (int64_t x = 0; x < end - t; x++) p[x] += z[g * TILE + x] * o->sums[i * k->groups + g];
        }
    }
    for (int64_t g = 0; g < k->groups; g++)
        for (int64_t i = 0; i < r; i++) {
            float *restrict p = o->p + i * TILE;
            const float *a = o->a + g * TILE, *part = o->part + g * each + i * TILE;
            for (int t = 0; t < TILE; t++) p[t] += a[t] * part[t];
        }
}

static void hide(const Call *c, int64_t b, int64_t query, int64_t start, int64_t n, float *p) {
    const int64_t from = b * c->mask_b + query * c->mask_h + start;
    if (!c->mask) return;
    for (int64_t t = 0; t < n; t++)
        if (c->mask_bool) p[t] = ((const uint8_t *)c->mask)[from + t] ? p[t] : LOWEST;
        else p[t] += ((const float *)c->mask)[from + t];
}

/* Logits [R, TILE], LOWEST behind the last row, become weights of rows; the running state of each query follows. */
static void online_softmax(const Call *c, Room *o, float *work) {
    const int64_t dv = c->value.dim, vg = c->value.groups, state = 2 + dv;
    for (int64_t i = 0; i < c->repeats; i++) {
        float *restrict p = o->p + i * TILE, *held = work + i * state, peak = held[0], high[LANES];
        vec mass = {0};
        for (int j = 0; j < LANES; j++) high[j] = peak;
        for (int t = 0; t < TILE; t += LANES)
            for (int j = 0; j < LANES; j++) {
                p[t + j] = p[t + j] < LOWEST ? LOWEST : p[t + j];
                high[j] = p[t + j] > high[j] ? p[t + j] : high[j];
            }
        for (int j = 0; j < LANES; j++) peak = high[j] > peak ? high[j] : peak;
        for (int t = 0; t < TILE; t += LANES) {
            const ints seen = ~(AT(p + t) <= LOWEST); /* and what is no number */
            const vec e = (vec)((ints)fast_exps(AT(p + t) - peak) & seen);
            *(vec *)(p + t) = e;
            mass += e;
        }
        const float fade = fast_exp(held[0] - peak);
        held[0] = peak;
        held[1] = held[1] * fade + total(mass);
        if (fade == 1.0f) continue;
        for (int64_t x = 0; x < dv; x++) held[2 + x] *= fade;
        for (int64_t g = 0; g < vg; g++) o->base[i * vg + g] *= fade;
    }
}

/* Weights of the levels of one group of values [R, TILE] into o->part, and what the zero of their scale adds. A row that is not
 * read may hold codes and scales of nothing. */
static void weigh(const Call *c, int64_t g, Room *o) {
    const float *a = o->a + g * TILE, *z = o->z + g * TILE;
    for (int64_t i = 0; i < c->repeats; i++) {
        const float *p = o->p + i * TILE;
        float *restrict weight = o->part + i * TILE, shift[TILE];
        vec sum = {0};
        for (int t = 0; t < TILE; t++) weight[t] = p[t] != 0.0f ? p[t] * a[t] : 0.0f;
        for (int t = 0; t < TILE; t++) shift[t] = p[t] != 0.0f ? p[t] * z[t] : 0.0f;
        for (int t = 0; t < TILE; t += LANES) sum += AT(shift + t);
        o->base[i * c->value.groups + g] += total(sum);
    }
}

/* Slots of the rows that are read as they came; -1 where one names none, or one that an earlier source names. */
static void name_slots(const Call *c, int32_t *slots) {
    for (int64_t b = 0; b < c->batch; b++, slots += c->held)
        for (int64_t s = 0, earlier = 0, at = 0; s < SOURCES; s++, earlier = at) {
            const Rows *rows = c->rows + s;
            for (int64_t x = 0; x < rows->count; x++, at++) {
                const int64_t slot = rows->slot ? rows->slot[b * rows->slot_b + x] : rows->only;
                slots[at] = slot < c->slots ? (int32_t)slot : -1;
                for (int64_t y = 0; y < earlier; y++) slots[at] = slots[y] == slot ? -1 : slots[at];
            }
        }
}

static void piece(const Call *c, int64_t b, int64_t h, int64_t begin, int64_t end, float *work) {
    const Side *v = &c->value;
    const int64_t r = c->repeats, d = c->key.dim, dv = v->dim, state = 2 + dv, vg = v->groups;
    int64_t numbers;
    room_for(c, NULL, &numbers);
    float *all = malloc(sizeof(float) * numbers);
    Room room = room_for(c, all, NULL), *o = &room;
    uint8_t *skip = calloc((size_t)(end - begin) + 1, 1);
    for (int64_t x = 0; x < c->held; x++) {
        const int64_t slot = c->slot[b * c->held + x];
        if (slot >= begin && slot < end) skip[slot - begin] = 1;
    }
    for (int64_t i = 0; i < r; i++) {
        load(c->q, c->q_type, query_at(c, b, h, i), d, o->q + i * d);
        for (int64_t x = 0; x < d; x++) o->q[i * d + x] *= (float)c->scale;
        work[i * state] = LOWEST;
        memset(work + i * state + 1, 0, sizeof(float) * (1 + dv));
    }
    memset(o->base, 0, sizeof(float) * r * vg);
    for (int64_t start = begin; start < end; start += TILE) {
        const int64_t n = end - start < TILE ? end - start : TILE;
        logits(c, b, h, start, n, o);
        for (int64_t i = 0; i < r; i++) {
            float *p = o->p + i * TILE;
            const int64_t left = seen_by(c, i) - start, seen = left < 0 ? 0 : left < n ? left : n;
            hide(c, b, h * r + i, start, n, p);
            for (int64_t t = seen; t < TILE; t++) p[t] = LOWEST;
            if (memchr(skip + start - begin, 1, n))
                for (int64_t t = 0; t < n; t++) p[t] = skip[start - begin + t] ? LOWEST : p[t];
        }
        online_softmax(c, o, work);
        const uint8_t *codes = codes_at(c, v, b, h, start);
        decode(v, codes, n, h, o->rows);
        affine(v, codes, scales_at(c, v, b, h, start), n, o->a, o->z);
        for (int64_t g = 0; g < vg; g++) {
            weigh(c, g, o);
            const int64_t x = g * v->group_size;
            gather_all(r, v->group_size, n, o->rows + x, dv, o->part, TILE, work + 2 + x, state);
        }
    }
    for (int64_t i = 0; i < r; i++)
        for (int64_t g = 0; g < vg; g++)
            for (int64_t x = 0; x < v->group_size; x++) work[i * state + 2 + g * v->group_size + x] += o->base[i * vg + g];
    free(all), free(skip);
}

/* The pieces of a head and the rows that are read as they came, on one common maximum; then back into the basis of the model. */
static void merge(const Call *c, int64_t b, int64_t h) {
    const Side *v = &c->value;
    const int64_t r = c->repeats, d = c->key.dim, dv = v->dim, width = 2 + dv, bh = b * c->heads + h, each = share_of(c);
    float *logit = malloc(sizeof(float) * (c->held + 2 * d + 3 * dv)), *q = logit + c->held, *row = q + d;
    float *decoded = row + d, *held = decoded + dv, *of_value = held + dv;
    for (int64_t i = 0; i < r; i++) {
        const float *pieces = c->work + (bh * c->pieces * r + i) * width;
        float peak = LOWEST, mass = 0.0f, exact_mass = 0.0f;
        load(c->q, c->q_type, query_at(c, b, h, i), d, q);
        for (int64_t s = 0; s < c->pieces; s++) peak = pieces[s * r * width] > peak ? pieces[s * r * width] : peak;
        for (int64_t s = 0, at = 0; s < SOURCES; s++)
            for (int64_t x = 0; x < c->rows[s].count; x++, at++) {
                const Rows *rows = c->rows + s;
                const int64_t slot = c->slot[b * c->held + at];
                logit[at] = LOWEST;
                if (slot < 0 || slot >= seen_by(c, i)) continue;
                load(rows->k, rows->type, row_at(c, b, h, x, rows->k_b, rows->k_h, rows->k_row), d, row);
                logit[at] = dot(q, row, d) * (float)c->scale;
                hide(c, b, h * r + i, slot, 1, logit + at);
                logit[at] = logit[at] < LOWEST ? LOWEST : logit[at];
                peak = logit[at] > peak ? logit[at] : peak;
            }
        memset(decoded, 0, sizeof(float) * dv), memset(held, 0, sizeof(float) * dv);
        for (int64_t s = 0; s < c->pieces; s++) {
            const float *state = pieces + s * r * width, fade = fast_exp(state[0] - peak);
            mass += fade * state[1];
            for (int64_t x = 0; x < dv; x++) decoded[x] += fade * state[2 + x];
        }
        for (int64_t s = 0, at = 0; s < SOURCES; s++)
            for (int64_t x = 0; x < c->rows[s].count; x++, at++) {
                const Rows *rows = c->rows + s;
                if (logit[at] <= LOWEST) continue;
                const float p = fast_exp(logit[at] - peak);
                load(rows->v, rows->type, row_at(c, b, h, x, rows->v_b, rows->v_h, rows->v_row), dv, of_value);
                exact_mass += p;
                for (int64_t y = 0; y < dv; y++) held[y] += p * of_value[y];
            }
        for (int64_t x = 0; v->sigma && x < dv; x++) decoded[x] *= v->sigma[h * dv + x];
        const float all = mass + exact_mass, share = 1.0f / (all < 1e-30f ? 1e-30f : all);
        for (int64_t x = 0; x < dv; x++) {
            held[x] += v->basis ? dot(decoded, v->basis + h * v->basis_h + x * dv, dv) : decoded[x];
            if (c->value_mean) held[x] += mass * c->value_mean[h * dv + x];
            held[x] *= share;
        }
        store(c->out, c->q_type, (((b + i / each) * c->heads + h) * each + i % each) * dv, dv, held);
    }
    free(logit);
}

void kvsink_attend(const Call *c) {
    const int64_t heads = c->batch * c->heads, pieces = heads * c->pieces, run = (c->coded + c->pieces - 1) / c->pieces;
    name_slots(c, c->slot);
#pragma omp parallel num_threads((int)c->threads) if (c->threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t x = 0; x < pieces; x++) {
            const int64_t bh = x / c->pieces, begin = (x % c->pieces) * run;
            int64_t end = begin + run < c->coded ? begin + run : c->coded;
            if (end < begin) end = begin;
            piece(c, bh / c->heads, bh % c->heads, begin, end, c->work + x * c->repeats * (2 + c->value.dim));
        }
#pragma omp for schedule(static)
        for (int64_t bh = 0; bh < heads; bh++) merge(c, bh / c->heads, bh % c->heads);
    }
}

/* One job as a sequence of its own: the slots and exact rows of its pages, and all its query rows as query heads. */
static Call one_job(const Call *c, const Pages *p, int64_t j) {
    const Job *job = p->job + j;
    const int64_t size = c->q_type == FLOAT32 ? 4 : 2, width = c->heads * c->repeats;
    Call one = *c;
    one.batch = 1, one.share = c->repeats, one.repeats = c->repeats * job->rows;
    one.limit = job->limit, one.coded = one.slots = job->limit + job->rows - 1;
    one.table = p->tables + job->sequence * p->tables_b;
    one.held = (one.coded + c->page - 1) / c->page * c->places;
    one.rows[0].count = one.held;
    one.q = (const char *)c->q + job->token * c->q_b * size;
    one.out = (char *)c->out + job->token * width * c->value.dim * size;
    one.slot = c->slot + j * c->held;
    one.work = c->work + j * width * p->rows * c->pieces * (2 + c->value.dim);
    return one;
}

static void name_places(const Call *one, const Pages *p) {
    for (int64_t x = 0; x < one->held; x++) {
        const int64_t page = x / one->places, named = p->named[one->table[page] * p->named_b + x % one->places];
        const int64_t slot = page * one->page + named - 1;
        one->slot[x] = named && slot < one->slots ? (int32_t)slot : -1;
    }
}

void kvsink_attend_pages(const Call *c, const Pages *p) {
    const int64_t each = c->heads * c->pieces;
#pragma omp parallel num_threads((int)c->threads) if (c->threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t j = 0; j < p->jobs; j++) {
            const Call one = one_job(c, p, j);
            name_places(&one, p);
        }
#pragma omp for schedule(dynamic)
        for (int64_t x = 0; x < p->jobs * each; x++) {
            const Call one = one_job(c, p, x / each);
            const int64_t at = x % each, pages = (one.coded + c->page - 1) / c->page, s = at % c->pieces;
            const int64_t run = (pages + c->pieces - 1) / c->pieces * c->page, begin = s * run < one.coded ? s * run : one.coded;
            const int64_t end = begin + run < one.coded ? begin + run : one.coded;
            piece(&one, 0, at / c->pieces, begin, end, one.work + at * one.repeats * (2 + c->value.dim));
        }
#pragma omp for schedule(static)
        for (int64_t x = 0; x < p->jobs * c->heads; x++) {
            const Call one = one_job(c, p, x / c->heads);
            merge(&one, 0, x % c->heads);
        }
    }
}

void kvsink_levels(const Side *s, const uint8_t *rows, int64_t n, int64_t head, float *out) { decode(s, rows, n, head, out); }

/* A version the caller checks, so that a stale library is never called with another layout. */
int64_t kvsink_attend_call_bytes(void) { return (int64_t)sizeof(Call); }
int64_t kvsink_attend_pages_bytes(void) { return (int64_t)sizeof(Pages); }
