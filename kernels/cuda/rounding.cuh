// Arithmetic in the definition's steps: every product, difference and quotient is rounded on its own.
#ifndef KVSINK_ROUNDING
#define KVSINK_ROUNDING

constexpr float HALF_MAX = 65504.0f, HALF_TINY = 6.0e-8f;
#ifndef KVSINK_EMULATE
DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
DEVICE float sub(float a, float b) { return __fsub_rn(a, b); }
DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float root(float a) { return __fsqrt_rn(a); }
DEVICE float nearest_even(float a) { return rintf(a); }
DEVICE float warp_max(float v) {
#pragma unroll
  for (int m = 16; m; m >>= 1) v = fmaxf(v, shfl_xor(v, m));
  return v;
}
// As the processor divides, but with one branch for all quotients: its own sequence, whose check for extreme exponents and
// branch after every quotient would put them one after the other.
DEVICE bool ordinary(float a) { return (float_bits(a) >> 23 & 255u) - 67u < 120u; }   // 2^-60 <= |a| < 2^60
static __device__ __noinline__ float any_quotient(float a, float b) { return __fdiv_rn(a, b); }
template <int N> DEVICE void quotients(float (&q)[N], const float (&a)[N], const float (&b)[N]) {
  float x[N];
  bool plain = true;
#pragma unroll
  for (int i = 0; i < N; i++) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b[i]));
    r = __fmaf_rn(r, __fmaf_rn(-b[i], r, 1.0f), r);
    x[i] = __fmul_rn(a[i], r);
    x[i] = __fmaf_rn(r, __fmaf_rn(-b[i], x[i], a[i]), x[i]);
    plain = plain && ordinary(b[i]) && (a[i] == 0.0f || ordinary(a[i]));
  }
  if (__builtin_expect(!plain, 0))
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = any_quotient(a[i], b[i]);
#pragma unroll
  for (int i = 0; i < N; i++) q[i] = x[i];
}
#else
template <int N> DEVICE void quotients(float (&q)[N], const float (&a)[N], const float (&b)[N]) {
  for (int i = 0; i < N; i++) q[i] = a[i] / b[i];
}
DEVICE float mul(float a, float b) { return a * b; }
DEVICE float add(float a, float b) { return a + b; }
DEVICE float sub(float a, float b) { return a - b; }
DEVICE float quotient(float a, float b) { return a / b; }
DEVICE float root(float a) { return sqrtf(a); }
DEVICE float nearest_even(float a) { return nearbyintf(a); }
DEVICE float warp_max(float v) {
  for (int m = 16; m; m >>= 1) v = fmaxf(v, shfl_xor(v, m));
  return v;
}
#endif

DEVICE float through_half(float x) {            // rounded to float16 and back
  return half_lo(pack_half2(fminf(fmaxf(x, -HALF_MAX), HALF_MAX), 0.0f));
}
DEVICE void warp_sums(float& a, float& b) {       // two sums whose shuffles wait for each other's results side by side
#pragma unroll
  for (int m = 16; m; m >>= 1) {
    const float x = shfl_xor(a, m), y = shfl_xor(b, m);
    a += x;
    b += y;
  }
}
#endif
