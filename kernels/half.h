/* float16 numbers as C without a half type knows them: to float, and back with rounding half to even. */
#ifndef KVSINK_HALF_H
#define KVSINK_HALF_H
#include <stdint.h>
#include <string.h>

static inline float half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023, bits;
    float f;
    if (e == 31) bits = sign | 0x7f800000u | (m << 13);
    else if (e) bits = sign | ((e + 112) << 23) | (m << 13);
    else { /* zero or subnormal */
        f = (float)m * 5.9604644775390625e-8f;
        return sign ? -f : f;
    }
    memcpy(&f, &bits, 4);
    return f;
}

/* x clamped to the largest finite float16 */
static inline uint16_t to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00; /* not a number */
    if (bits >= 0x477fe000u) return sign | 0x7bff; /* 65504 and above */
    if (bits < 0x38800000u) { /* below 2^-14: a multiple of 2^-24; the addition rounds */
        float f;
        memcpy(&f, &bits, 4);
        f += 0.5f;
        memcpy(&bits, &f, 4);
        return sign | (uint16_t)(bits - 0x3f000000u);
    }
    bits += 0xc8000fffu + ((bits >> 13) & 1); /* exponent bias 127 -> 15, half to even */
    return sign | (uint16_t)(bits >> 13);
}
#endif
