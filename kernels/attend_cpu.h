/* What attend_cpu.c is called with: attend_cpu.py says the formula and fills it, tools/ort_ops too. */
#ifndef KVSINK_ATTEND_CPU_H
#define KVSINK_ATTEND_CPU_H
#include <stdint.h>

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

void kvsink_attend(const Call *c);

#endif
