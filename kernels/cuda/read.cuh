// Packed tiles as operands, and products with them.
//
// Arithmetic a masked code is an fp16 subnormal (code * 2^pos * 2^-24), so nothing is converted; powers of two and the
//            levels' spacing are folded into the query (keys) or into the final scaling (values); levels of a trellis are in trellis.cuh
#ifndef KVSINK_READ
#define KVSINK_READ

template <int RUN> DEVICE u32 key_field(const u32 (&w)[K_WORDS], int row) {
  constexpr u32 m = ((1u << KF.width[RUN]) - 1u) << KF.pos[RUN];
  constexpr bool shared = KF.half && KF.bin[RUN] == KF.bins - 1;
  return (w[shared ? K_WORDS - 1 : row * (KF.bins - KF.half) + KF.bin[RUN]] >> (KF.shift[RUN] + (shared ? 8 * row : 0))) & (m | m << 16);
}
template <int RUN> DEVICE u32 value_field(const u32 (&w)[V_WORDS], int half) {
  constexpr u32 m = ((1u << VF.width[RUN]) - 1u) << VF.pos[RUN];
  constexpr bool shared = VF.half && VF.bin[RUN] == VF.bins - 1;
  return (w[shared ? V_WORDS - 1 : half * (VF.bins - VF.half) + VF.bin[RUN]] >> (VF.shift[RUN] + (shared ? 8 * half : 0))) & (m | m << 16);
}
// S^T += K Q^T of NT tiles of each of NP units, 16 components per step, and the mean's logits of the same tokens: independent chains
// side by side. `mean` are its A operands, a pair of tiles 32 * K_STEPS words of 16 bytes on.
template <int KS, int NP, int NT, bool MEAN> struct KeySteps {
  DEVICE_STATIC void run(float (&s)[NP][NT][4], float (&u)[NP][4], const u32 (&w)[NP][NT][K_WORDS], const u32 (&q)[RUNS],
                         const u32 (&rq)[RUNS], const uint4* mean) {
    KeySteps<KS - 1, NP, NT, MEAN>::run(s, u, w, q, rq, mean);
    constexpr int k = KS - 1;
#pragma unroll
    for (int j = 0; j < NP; j++) {
#pragma unroll
      for (int i = 0; i < NT; i++)
        mma(s[j][i], key_field<2 * k>(w[j][i], 0), key_field<2 * k>(w[j][i], 1), key_field<2 * k + 1>(w[j][i], 0), key_field<2 * k + 1>(w[j][i], 1),
            q[2 * k], q[2 * k + 1]);
      if (MEAN) {
        const uint4 a = mean[j * 32 * K_STEPS + k * 32];
        mma(u[j], a.x, a.y, a.z, a.w, rq[2 * k], rq[2 * k + 1]);
      }
    }
  }
};
template <int NP, int NT, bool MEAN> struct KeySteps<0, NP, NT, MEAN> {
  DEVICE_STATIC void run(float (&)[NP][NT][4], float (&)[NP][4], const u32 (&)[NP][NT][K_WORDS], const u32 (&)[RUNS], const u32 (&)[RUNS],
                         const uint4*) {}
};
// The same of a trellis, a quarter of 16 runs at a time: two steps of 16 components, which are 32 components apart.
template <int QUARTER, int NP, int NT, bool MEAN> struct KeyWalks {
  DEVICE_STATIC void run(float (&s)[NP][NT][4], float (&u)[NP][4], const u32 (&w)[NP][NT][K_WORDS], const Indices (&n)[NP][NT],
                         const u32 (&q)[RUNS], const u32 (&rq)[RUNS], const uint4* mean) {
    KeyWalks<QUARTER - 1, NP, NT, MEAN>::run(s, u, w, n, q, rq, mean);
    constexpr int r = (QUARTER - 1) / 2 * 8 + (QUARTER - 1) % 2 * 2;           // runs r, r + 1, r + 4 and r + 5
#pragma unroll
    for (int j = 0; j < NP; j++) {
#pragma unroll
      for (int i = 0; i < NT; i++) {
        u32 a[2][4];                                 // step, register
#pragma unroll
        for (int row = 0; row < 2; row++) {
          walk_levels<false, r>(a[0][row], a[1][row], n[j][i], w[j][i], row);
          walk_levels<false, r + 1>(a[0][row + 2], a[1][row + 2], n[j][i], w[j][i], row);
        }
        mma(s[j][i], a[0][0], a[0][1], a[0][2], a[0][3], q[r], q[r + 1]);
        if constexpr (r + 5 < RUNS) mma(s[j][i], a[1][0], a[1][1], a[1][2], a[1][3], q[r + 4], q[r + 5]);
      }
      if (MEAN)
#pragma unroll
      for (int h = 0; h < (r + 5 < RUNS ? 2 : 1); h++) {
        const uint4 a = mean[j * 32 * K_STEPS + (r / 2 + 2 * h) * 32];
        mma(u[j], a.x, a.y, a.z, a.w, rq[r + 4 * h], rq[r + 4 * h + 1]);
      }
    }
  }
};
template <int NP, int NT, bool MEAN> struct KeyWalks<0, NP, NT, MEAN> {
  DEVICE_STATIC void run(float (&)[NP][NT][4], float (&)[NP][4], const u32 (&)[NP][NT][K_WORDS], const Indices (&)[NP][NT], const u32 (&)[RUNS],
                         const u32 (&)[RUNS], const uint4*) {}
};
template <int QUARTER> struct ValueWalks {
  DEVICE_STATIC void run(float (&o)[K_STEPS][4], const u32 (&w)[V_WORDS], const Indices& n, u32 p0, u32 p1) {
    ValueWalks<QUARTER - 1>::run(o, w, n, p0, p1);
    constexpr int r = (QUARTER - 1) / 2 * 8 + (QUARTER - 1) % 2 * 2;
    u32 a[2][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      walk_levels<true, r>(a[0][2 * half], a[1][2 * half], n, w, half);
      walk_levels<true, r + 1>(a[0][2 * half + 1], a[1][2 * half + 1], n, w, half);
    }
    mma(o[r / 2], a[0][0], a[0][1], a[0][2], a[0][3], p0, p1);
    if constexpr (r + 5 < RUNS) mma(o[r / 2 + 2], a[1][0], a[1][1], a[1][2], a[1][3], p0, p1);
  }
};
template <> struct ValueWalks<0> { DEVICE_STATIC void run(float (&)[K_STEPS][4], const u32 (&)[V_WORDS], const Indices&, u32, u32) {} };
template <int MT> struct ValueSteps {                // O^T += V^T P^T, 16 channels per step
  DEVICE_STATIC void run(float (&o)[K_STEPS][4], const u32 (&w)[V_WORDS], u32 p0, u32 p1) {
    ValueSteps<MT - 1>::run(o, w, p0, p1);
    constexpr int m = MT - 1;
    mma(o[m], value_field<2 * m>(w, 0), value_field<2 * m + 1>(w, 0), value_field<2 * m>(w, 1), value_field<2 * m + 1>(w, 1), p0, p1);
  }
};
template <> struct ValueSteps<0> { DEVICE_STATIC void run(float (&)[K_STEPS][4], const u32 (&)[V_WORDS], u32, u32) {} };

template <int N> DEVICE void load_words(u32 (&w)[N], const u32* tile, int lane) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
      uint4 v = ((const uint4*)tile)[i * 32 + lane];
      w[4 * i] = v.x; w[4 * i + 1] = v.y; w[4 * i + 2] = v.z; w[4 * i + 3] = v.w;
    }
  } else if constexpr (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      uint2 v = ((const uint2*)tile)[i * 32 + lane];
      w[2 * i] = v.x; w[2 * i + 1] = v.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) w[i] = tile[i * 32 + lane];
  }
}
#endif
