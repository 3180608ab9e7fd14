/* What walks.h says: a file of its own, since its sums and quotients are those that are written. */
#include "walks.h"

#include "trellis.h"

uint8_t kvsink_trellis_row(
    int64_t dim, int64_t runs, const int64_t *run, const float *const *levels, const float *const *edges, const float *x,
    const float *sigma, float *room, uint16_t *code
) {
    return trellis_row(dim, runs, run, levels, edges, x, sigma, room, code);
}

float kvsink_gain_of(uint8_t byte) { return gain_of(byte); }
