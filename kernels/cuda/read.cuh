// Packed tiles as operands: where the codes of a run of 8 channels stand, and products with them (kernels/layout.py has the layout).
//
// Arithmetic a masked code is an fp16 subnormal (code * 2^pos * 2^-24), so nothing is converted; powers of two and the
//            levels' spacing are folded into the query (keys) or into the final scaling (values)
#ifndef KVSINK_READ
#define KVSINK_READ

#ifndef KW
#define KW 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2  // key bits of each run of 8 components
#endif
#ifndef VW
#define VW 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2  // value bits of each run of 8 channels
#endif
constexpr int RUNS = D / 8, K_STEPS = D / 16;        // a product takes 16 channels, or gives 16, at a time

struct Fields {             // where the w-bit field of each run sits inside 16-bit bins; half: the last has 8 bits at most, for two slots
  int width[RUNS], bin[RUNS], shift[RUNS], pos[RUNS], bins, half;
};
BOTH constexpr Fields make_fields(const int (&w)[RUNS]) {
  Fields f = {};
  int fill[RUNS] = {}, cut[RUNS] = {};
  bool open[RUNS] = {};
  for (int r = 0; r < RUNS; r++) {                  // first fit, widest runs come first
    int b = 0;
    while (fill[b] + w[r] > 16) b++;
    f.width[r] = w[r]; f.bin[r] = b;
    if (fill[b] + w[r] > 11 && !open[b]) { open[b] = true; cut[b] = fill[b]; }   // patterns up to 2047 are linear in fp16
    f.shift[r] = open[b] ? cut[b] : 0;
    f.pos[r] = fill[b] - f.shift[r];
    fill[b] += w[r];
    if (b + 1 > f.bins) f.bins = b + 1;
  }
  f.half = fill[f.bins - 1] <= 8;
  return f;
}
constexpr int K_WIDTH[RUNS] = {KW}, V_WIDTH[RUNS] = {VW};
TABLE Fields KF = make_fields(K_WIDTH);
TABLE Fields VF = make_fields(V_WIDTH);
constexpr int K_WORDS = 2 * KF.bins - KF.half, V_WORDS = 2 * VF.bins - VF.half;                   // 32-bit words per lane and tile of 16 tokens
constexpr int K_TILE = 32 * K_WORDS, V_TILE = 32 * V_WORDS;                   // words per tile
constexpr int K_BYTES = 8 * K_TILE * 4, V_BYTES = 8 * V_TILE * 4;             // per superblock of 128 tokens

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
template <int KS, int NP, int NT> struct KeySteps {
  DEVICE_STATIC void run(float (&s)[NP][NT][4], float (&u)[NP][4], const u32 (&w)[NP][NT][K_WORDS], const u32 (&q)[RUNS],
                         const u32 (&rq)[RUNS], const uint4* mean) {
    KeySteps<KS - 1, NP, NT>::run(s, u, w, q, rq, mean);
    constexpr int k = KS - 1;
#pragma unroll
    for (int j = 0; j < NP; j++) {
#pragma unroll
      for (int i = 0; i < NT; i++)
        mma(s[j][i], key_field<2 * k>(w[j][i], 0), key_field<2 * k>(w[j][i], 1), key_field<2 * k + 1>(w[j][i], 0), key_field<2 * k + 1>(w[j][i], 1),
            q[2 * k], q[2 * k + 1]);
      if (MODE != 0) {
        const uint4 a = mean[j * 32 * K_STEPS + k * 32];
        mma(u[j], a.x, a.y, a.z, a.w, rq[2 * k], rq[2 * k + 1]);
      }
    }
  }
};
template <int NP, int NT> struct KeySteps<0, NP, NT> {
  DEVICE_STATIC void run(float (&)[NP][NT][4], float (&)[NP][4], const u32 (&)[NP][NT][K_WORDS], const u32 (&)[RUNS], const u32 (&)[RUNS],
                         const uint4*) {}
};
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
