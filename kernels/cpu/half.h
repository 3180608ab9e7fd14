/* float16 and bfloat16 numbers as C without such types knows them: to float, and back with rounding half to even;
 * and the gain of a row in a byte, which is the upper half of a float16 (see ../trellis.py). */
#ifndef KVSINK_HALF_H
#define KVSINK_HALF_H
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

static inline float half(uint16_t h) {
#ifdef __F16C__
    return _cvtsh_ss(h);
#else
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
#endif
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

#define GAIN_BIAS (118 << 4) /* of the exponent of a gain's byte against that of a float */
#define NOT_A_NUMBER 255

static inline float gain_of(uint8_t byte) {
    const uint32_t bits = ((uint32_t)byte + GAIN_BIAS) << 19;
    float g;
    memcpy(&g, &bits, 4);
    return byte == NOT_A_NUMBER ? NAN : byte ? g : 0.0f;
}

/* The nearest gain that is a number, by half to even. */
static inline uint8_t gain_byte(float g) {
    uint32_t bits;
    memcpy(&bits, &g, 4);
    if (!(g > gain_of(1) / 2)) return 0;
    const int32_t code = (int32_t)((bits + 0x3ffff + ((bits >> 19) & 1)) >> 19) - GAIN_BIAS;
    return (uint8_t)(code < 1 ? 1 : code > NOT_A_NUMBER - 1 ? NOT_A_NUMBER - 1 : code);
}

enum { FLOAT32, BFLOAT16, FLOAT16, FLOAT64 }; /* what a caller's rows are made of */

/* n numbers of a row that begins `at` numbers behind p */
static inline void load(const void *p, int64_t type, int64_t at, int64_t n, float *to) {
    if (type == FLOAT32) memcpy(to, (const float *)p + at, sizeof(float) * n);
    else if (type == FLOAT64)
        for (int64_t i = 0; i < n; i++) to[i] = (float)((const double *)p)[at + i];
    else if (type == FLOAT16)
        for (int64_t i = 0; i < n; i++) to[i] = half(((const uint16_t *)p)[at + i]);
    else
        for (int64_t i = 0; i < n; i++) {
            const uint32_t bits = (uint32_t)((const uint16_t *)p)[at + i] << 16;
            memcpy(to + i, &bits, 4);
        }
}

/* The way back, for float32, bfloat16 and float16. */
static inline void store(void *p, int64_t type, int64_t at, int64_t n, const float *from) {
    if (type == FLOAT32) memcpy((float *)p + at, from, sizeof(float) * n);
    else
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, from + i, 4);
            const uint16_t short_float = from[i] != from[i] ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
            ((uint16_t *)p)[at + i] = type == FLOAT16 ? to_half(from[i]) : short_float;
        }
}
#endif
