/* Rows of trellis codes, by the C of the cache's own path: see kernels/cpu/trellis.h. */
#ifndef KVSINK_WALKS_H
#define KVSINK_WALKS_H
#include <stdint.h>

/* As trellis_row: codes of x [dim] in units of sigma, and the byte of their gain. room: 10 numbers a channel. */
uint8_t kvsink_trellis_row(
    int64_t dim, int64_t runs, const int64_t *run, const float *const *levels, const float *const *edges, const float *x,
    const float *sigma, float *room, uint16_t *code
);

float kvsink_gain_of(uint8_t byte);

#endif
