/* What attend.c is called with: attend.py says the formula and fills it, tools/ort_ops too. */
#ifndef KVSINK_ATTEND_CPU_H
#define KVSINK_ATTEND_CPU_H
#include <stdint.h>

#define SOURCES 3

typedef struct {
    int64_t dim, row_bytes, groups, group_size, scales; /* channels, bytes of codes, scale groups, channels of one, numbers a row */
    int64_t stride_b, stride_h;                          /* of codes, in bytes */
    int64_t scale_b, scale_h;                            /* of scales, in numbers */
    int64_t kind;                                        /* 0 lloyd without gain, 1 lloyd with gain, 2 step and base, 3 step and code of zero */
    int64_t runs;                                        /* runs of equal width */
    const int64_t *run;                                  /* [runs, 4]: first channel, end channel, first byte, width */
    const float *const *tables;                          /* per run: levels of every byte (1, 2, 4, 8 bit) or of every code or, of walks, of every index */
    const float *const *levels;                          /* per run: levels of every code, over and over up to sixteen numbers */
    const uint8_t *codes;
    const uint16_t *scale; /* float16 */
    int64_t couple, code_bits, book_h; /* channels of one code when codes name vectors, else 0; numbers between books of heads */
    const float *book;                 /* [H or 1, dim / couple, 2^code_bits, couple] */
    const float *sigma;                /* [H, dim]: level times this is a number in the codec's basis, or NULL */
    const float *basis;                /* [H or 1, dim, dim]: row times this is in the codec's basis, or NULL */
    int64_t basis_h;                   /* numbers between bases of heads */
    int64_t walk;                      /* codes are walks through a trellis, with the gain in the last byte of a row */
} Side;

typedef struct { /* rows that are read as they came: k, v [B, H, count, dim] and their slots [B or 1, count], negative: none */
    const void *k, *v;
    const int32_t *slot; /* NULL: the slot is `only` */
    int64_t count, type, only, k_b, k_h, k_row, v_b, v_h, v_row, slot_b;
} Rows;

typedef struct {
    int64_t batch, heads, repeats, slots, coded, pieces, threads; /* coded: the first so many slots have codes */
    Side key, value;
    const void *q; /* [B, H R, dim], of q_type as the result */
    int64_t q_type, q_b, q_h;
    double scale;
    int64_t by_block, block, blocks, rotary;   /* keys stand at the start of their block; its positions; angles; their channels */
    const float *start_cos, *start_sin;        /* [blocks, rotary] */
    const float *mean;                         /* [H, dim, block]: calibrated mean of the keys by offset in a block, or NULL */
    const float *value_mean;                   /* [H, value dim] or NULL */
    const int32_t *positions;                  /* [B, L] */
    int64_t position_stride;
    const void *mask; /* [B or 1, 1 or H R, L] of additive float32 or of bool, or NULL */
    int64_t mask_bool, mask_b, mask_h;
    Rows rows[SOURCES]; /* a row that several name counts once, for the first of them; the last is the new one */
    void *out;          /* [B, H R, value dim] */
    float *work;        /* [B H pieces, R, 2 + value dim] */
    int64_t held;       /* rows of all sources */
    int32_t *slot;      /* [B, held]: see name_slots */
    /* Of several query rows of one sequence in pages, see kvsink_attend_pages; 0 and NULL for one row over slots side by side. */
    int64_t share;        /* query heads of one row, where `repeats` are those of all */
    int64_t limit;        /* slots that the first row sees; each later one sees one more */
    const int32_t *table; /* the page of every `page` slots: what counts sequences above counts pages */
    int64_t page, places; /* slots of a page, and its exact rows */
} Call;

void kvsink_attend(const Call *c);

typedef struct { /* neighbouring query rows of one sequence */
    int64_t token, rows, limit; /* the first of them, how many, and how many slots that one sees */
    int64_t sequence;
} Job;

typedef struct {
    int64_t jobs, rows, tables_b; /* rows: of a job at most */
    const Job *job;
    const int32_t *tables;  /* [sequences, pages] */
    const uint8_t *named;   /* [pages, places]: which slot of the page an exact row stands for, plus one; 0: none */
    int64_t named_b;
} Pages;

/* q and out [tokens, H R, dim]; slot [jobs, held]; work [jobs, H, pieces, R rows, 2 + value dim]. */
void kvsink_attend_pages(const Call *c, const Pages *p);

/* Levels [n, dim] of rows of codes of one head, as the query meets them. */
void kvsink_levels(const Side *s, const uint8_t *rows, int64_t n, int64_t head, float *out);

#endif
