// The query of a row as B operands: as it is rotated to the start of each block of 64 tokens, and in the basis of the codes.
#ifndef KVSINK_QUERY
#define KVSINK_QUERY

// Query head `hq` of row b, by one service warp: the scaled query for the mean's table and its transform, into buffer `at`.
template <class Q = Queries>
DEVICE void prepare_query(const Params& p, const Raw& q, int b, int hq, int lane, unsigned char* smem, int at) {
  float x[CH];
  widen(x, q, p.q_bf16);
#pragma unroll
  for (int i = 0; i < CH; i++) x[i] *= p.scale;
  if (MODE != 0) {
    // Tables are cut by slot: the query is rotated to where slot 0 is position -origin.
    float c[CH], s[CH], y[CH];
    load_channels(c, p.origin_cos ? p.origin_cos + b * ROTARY : 0, lane, ROTARY, 1.0f);
    load_channels(s, p.origin_sin ? p.origin_sin + b * ROTARY : 0, lane, ROTARY);
#pragma unroll
    for (int i = 0; i < CH; i++) y[i] = x[i] * c[i] + partner_sign(lane) * shfl_float(x[i], partner(lane)) * s[i];
    u32* raw = (u32*)(smem + Q::RAW + at * Q::RAW_STEP);
    if (holds(lane))
#pragma unroll
      for (int i = 0; i < CH / 2; i++) {             // channels CH lane + 2 i, + 1
        const int d = CH * lane + 2 * i, run = d >> 3, t = (d & 7) >> 1;
        raw[(hq * 4 + t) * RAW_ROW + run] = pack_half2(y[2 * i], y[2 * i + 1]);
      }
  }
  if (MODE != 2) {
    if (p.key_hadamard) hadamard(x, lane);
    u32* qt = (u32*)(smem + Q::QT + at * Q::QT_STEP) + hq * (D / 2) + CH / 2 * lane;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CH / 2; i++) {
      const u32 v = pack_half2(x[2 * i], x[2 * i + 1]);
      if (holds(lane)) qt[i] = v;
      sum += half_lo(v) + half_hi(v);
    }
    sum = warp_sum(sum);
    if (lane == 0) ((float*)(smem + Q::SUM))[at * Q::HEADS + hq] = sum;
  }
}

template <int N> DEVICE void load_u32(u32 (&x)[N], const u32* p) {
  if constexpr (N == 4) {
    const uint4 v = *(const uint4*)p;
    x[0] = v.x; x[1] = v.y; x[2] = v.z; x[3] = v.w;
  } else if constexpr (N == 2) {
    const uint2 v = *(const uint2*)p;
    x[0] = v.x; x[1] = v.y;
  } else {
    x[0] = *p;
  }
}
constexpr int AT_ONCE = HALF_RUNS % 4 == 0 ? 4 : HALF_RUNS % 2 == 0 ? 2 : 1;
struct Rotation { u32 c[HALF_RUNS ? HALF_RUNS : 1], s[HALF_RUNS ? HALF_RUNS : 1]; };   // of a block of 64 tokens, as a lane needs it
DEVICE void load_rotation(Rotation& r, const void* table, int block, int lane) {
  const u32* at = (const u32*)table + block * 8 * HALF_RUNS + (lane & 3) * HALF_RUNS;
#pragma unroll
  for (int i = 0; i < HALF_RUNS; i += AT_ONCE) {
    u32 c[AT_ONCE], s[AT_ONCE];
    load_u32(c, at + i);
    load_u32(s, at + 4 * HALF_RUNS + i);
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) { r.c[i + k] = c[k]; r.s[i + k] = s[k]; }
  }
}
template <class Q = Queries>
DEVICE void rotate_query(u32 (&rq)[RUNS], const Rotation& rot, const unsigned char* smem, int lane, int at) {
  const u32* raw = (const u32*)(smem + Q::RAW + at * Q::RAW_STEP) + (((lane >> 2) & (Q::HEADS - 1)) * 4 + (lane & 3)) * RAW_ROW;
#pragma unroll
  for (int i = 0; i < HALF_RUNS; i += AT_ONCE) {     // runs with their partners half the rotary channels on
    u32 a[AT_ONCE], b[AT_ONCE];
    load_u32(a, raw + i);
    load_u32(b, raw + HALF_RUNS + i);
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      const u32 c = rot.c[i + k], s = rot.s[i + k];
      rq[i + k] = hfma2(b[k], s, hmul2(a[k], c));
      rq[HALF_RUNS + i + k] = hfma2(a[k] ^ 0x80008000u, s, hmul2(b[k], c));
    }
  }
#pragma unroll
  for (int i = 2 * HALF_RUNS; i < RUNS; i += 2) {
    u32 a[2];
    load_u32(a, raw + i);
    rq[i] = a[0]; rq[i + 1] = a[1];
  }
}

// Modes 0 and 1: the transformed query as B fragments, and what a token's zero adds to its logit in this lane's columns.
template <class Q = Queries> DEVICE void load_query(u32 (&q)[RUNS], float (&shift)[2], const unsigned char* smem, int lane, int at) {
  const int g = lane >> 2, t = lane & 3;
  const u32* qt = (const u32*)(smem + Q::QT + at * Q::QT_STEP) + (g & (Q::HEADS - 1)) * (D / 2) + t;
#pragma unroll
  for (int r = 0; r < RUNS; r++) {
    constexpr u32 one = 0x3c00u;
    const u32 f = one + ((u32)Q_SHIFT << 10) - ((u32)KF.pos[r] << 10);
    q[r] = hmul2(qt[4 * r], f | f << 16);
  }
  const float* qs = (const float*)(smem + Q::SUM) + at * Q::HEADS;
#pragma unroll
  for (int i = 0; i < 2; i++) shift[i] = qs[(2 * t + i) & (Q::HEADS - 1)];
}

template <int RUN> struct Center {                   // 2^pos * (2^w - 1) / 2 of a run, twice, as fp16 bits
  BOTH static constexpr u32 value() {
    int n = (1 << KF.width[RUN]) - 1, e = KF.pos[RUN] - 1, top = KF.width[RUN] - 1;   // n * 2^e, n has its leading bit at `top`
    u32 h = (u32)(15 + e + top) << 10 | ((u32)(n - (1 << top)) << (10 - top));
    return h | h << 16;
  }
};
template <int KS> struct CenterSteps {
  DEVICE_STATIC void run(float (&s)[4], const u32 (&q)[RUNS]) {
    CenterSteps<KS - 1>::run(s, q);
    constexpr int k = KS - 1;
    constexpr u32 lo = Center<2 * k>::value(), hi = Center<2 * k + 1>::value();
    mma(s, lo, lo, hi, hi, q[2 * k], q[2 * k + 1]);
  }
};
template <> struct CenterSteps<0> { DEVICE_STATIC void run(float (&)[4], const u32 (&)[RUNS]) {} };

// AHEAD: the query of this lane's column at a block, which stands at `from`.
DEVICE void load_turned(u32 (&q)[RUNS], const unsigned char* from, int lane) {
#pragma unroll
  for (int i = 0; i < RUNS / 4; i++) {
    u32 x[4];
    load_u32(x, (const u32*)from + ((i * HELD + (lane >> 2 & (HELD - 1))) * 4 + (lane & 3)) * 4);
#pragma unroll
    for (int k = 0; k < 4; k++) q[4 * i + k] = x[k];
  }
}

constexpr float SUBNORMAL = 5.9604644775390625e-08f;   // 2^-24, the unit of a subnormal code

DEVICE void transform_query(u32 (&q)[RUNS], const u32 (&rq)[RUNS], const unsigned char* smem, int lane) {
  constexpr int CHAINS = K_STEPS % 4 == 0 ? 4 : K_STEPS % 3 == 0 ? 3 : 1;      // side by side
  const uint4* basis = (const uint4*)(smem + OFF_BASIS) + lane;
#pragma unroll
  for (int m = 0; m < K_STEPS; m += CHAINS) {
    float y[CHAINS][4] = {};
#pragma unroll
    for (int k = 0; k < K_STEPS; k++)
#pragma unroll
      for (int i = 0; i < CHAINS; i++) {
        const uint4 a = basis[((m + i) * K_STEPS + k) * 32];
        mma(y[i], a.x, a.y, a.z, a.w, rq[2 * k], rq[2 * k + 1]);
      }
#pragma unroll
    for (int i = 0; i < CHAINS; i++) {
      q[2 * (m + i)] = transpose8x8(pack_half2(y[i][0], y[i][1]));
      q[2 * (m + i) + 1] = transpose8x8(pack_half2(y[i][2], y[i][3]));
    }
  }
}
DEVICE void center_query(float (&shift)[2], const u32 (&q)[RUNS]) {
  if (KEY_TRELLIS) return;                           // its levels have no centre to take off
  float c[4] = {0, 0, 0, 0};
  CenterSteps<K_STEPS>::run(c, q);
  shift[0] = -c[0] * SUBNORMAL;
  shift[1] = -c[1] * SUBNORMAL;
}
#endif
