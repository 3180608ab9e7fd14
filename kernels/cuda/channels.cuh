// A row of D channels in the registers of a warp: CH neighbouring channels a lane, on LANES lanes; the other lanes hold zeros.
#ifndef KVSINK_CHANNELS
#define KVSINK_CHANNELS

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef ROTARY
#define ROTARY HEAD_DIM       // channels that carry RoPE, from 0 on, in halves
#endif
constexpr int D = HEAD_DIM, CH = D <= 64 ? 2 : D <= 128 ? 4 : 8, LANES = D / CH;
constexpr int HALF_LANES = ROTARY / 2 / CH;          // lanes between the two channels of a rotation
static_assert(D % 16 == 0 && D <= 256 && ROTARY % 16 == 0 && ROTARY <= D, "runs of 8 channels, two runs a step");

DEVICE bool holds(int lane) { return LANES == 32 || lane < LANES; }
struct Raw { u32 w[CH / 2]; };                       // CH numbers of 16 bits
DEVICE Raw load_raw(const void* p, long long i) {    // at element i; 0 on lanes that hold nothing
  Raw r = {};
  const unsigned short* at = (const unsigned short*)p + i;
  if (!holds(TID & 31)) return r;
  if constexpr (CH == 2) {
    r.w[0] = *(const u32*)at;
  } else if constexpr (CH == 4) {
    const uint2 v = *(const uint2*)at;
    r.w[0] = v.x; r.w[1] = v.y;
  } else {
    const uint4 v = *(const uint4*)at;
    r.w[0] = v.x; r.w[1] = v.y; r.w[CH / 2 - 2] = v.z; r.w[CH / 2 - 1] = v.w;
  }
  return r;
}
DEVICE void store_raw(void* p, long long i, const Raw& r) {
  unsigned short* at = (unsigned short*)p + i;
  if (!holds(TID & 31)) return;
  if constexpr (CH == 2) *(u32*)at = r.w[0];
  else if constexpr (CH == 4) *(uint2*)at = uint2{r.w[0], r.w[1]};
  else *(uint4*)at = uint4{r.w[0], r.w[1], r.w[CH / 2 - 2], r.w[CH / 2 - 1]};
}
DEVICE void widen(float (&x)[CH], const Raw& r, int bf16) {
#pragma unroll
  for (int i = 0; i < CH / 2; i++) {
    x[2 * i] = bf16 ? bits_float(r.w[i] << 16) : half_lo(r.w[i]);
    x[2 * i + 1] = bf16 ? bits_float(r.w[i] & 0xffff0000u) : half_hi(r.w[i]);
  }
}
DEVICE Raw narrow(const float (&x)[CH], int bf16) {
  Raw r;
#pragma unroll
  for (int i = 0; i < CH / 2; i++) r.w[i] = bf16 ? pack_bf2(x[2 * i], x[2 * i + 1]) : pack_half2(x[2 * i], x[2 * i + 1]);
  return r;
}
template <int N> DEVICE void load_floats(float (&x)[N], const float* p) {   // N numbers at p, as wide as they go
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
      const float4 v = ((const float4*)p)[i];
      x[4 * i] = v.x; x[4 * i + 1] = v.y; x[4 * i + 2] = v.z; x[4 * i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      const float2 v = ((const float2*)p)[i];
      x[2 * i] = v.x; x[2 * i + 1] = v.y;
    }
  }
}
// This lane's channels of a row of `count` float32, `none` where the row has none.
DEVICE void load_channels(float (&x)[CH], const float* row, int lane, int count = D, float none = 0.0f) {
#pragma unroll
  for (int i = 0; i < CH; i++) x[i] = none;
  if (row && CH * lane < count) load_floats(x, row + CH * lane);
}
// The other channel of this lane's rotations, and its sign in the sum; lanes without a rotation get their own with sign 0.
DEVICE int partner(int lane) { return lane < HALF_LANES ? lane + HALF_LANES : lane < 2 * HALF_LANES ? lane - HALF_LANES : lane; }
DEVICE float partner_sign(int lane) { return lane < HALF_LANES ? -1.0f : lane < 2 * HALF_LANES ? 1.0f : 0.0f; }

// The Hadamard rotation of D channels, orthonormal: Sylvester's butterflies, over runs of CORE channels that go through Paley's
// matrix of that order first where D is no power of two (kernels/hadamard.py). Only that is not symmetric: `back` undoes it.
constexpr int CORE = D % 3 == 0 ? 12 : D % 5 == 0 ? 20 : 1;
struct Paley { u32 row[CORE]; };                     // bit j of row i: the entry is negative
BOTH constexpr Paley make_paley() {
  Paley p = {};
  const int n = CORE - 1;
  for (int i = 0; i < CORE; i++)
    for (int j = 0; j < CORE; j++) {
      bool residue = false;
      const int d = ((j - i) % n + n) % n;
      for (int k = 1; k < n; k++) residue = residue || k * k % n == d;
      const bool positive = i == j || (i == 0 ? true : j == 0 ? false : residue);
      if (!positive) p.row[i] |= 1u << j;
    }
  return p;
}
TABLE Paley PALEY = CORE > 1 ? make_paley() : Paley{};
DEVICE void core_product(float (&x)[CH], bool back, int lane) {
  constexpr int WIDE_RUN = CORE > 1 ? CORE / CH : 1;
  const int first = lane / WIDE_RUN * WIDE_RUN, own = (lane - first) * CH;
  float y[CH] = {};
#pragma unroll 1
  for (int n = 0; n < WIDE_RUN; n++)
#pragma unroll
    for (int k = 0; k < CH; k++) {
      const float v = shfl_float(x[k], first + n);
      const int i = n * CH + k;
#pragma unroll
      for (int c = 0; c < CH; c++) {
        const bool negative = back ? PALEY.row[own + c] >> i & 1 : PALEY.row[i] >> (own + c) & 1;
        y[c] += negative ? -v : v;
      }
    }
#pragma unroll
  for (int c = 0; c < CH; c++) x[c] = y[c];
}
DEVICE void hadamard(float (&x)[CH], int lane, bool back = false) {
  if constexpr (CORE > 1) {
    core_product(x, back, lane);
#pragma unroll 1
    for (int m = 1; m < D / CORE; m <<= 1) {
      constexpr int EACH = CORE / CH;
      const int run = lane / EACH, other = (run ^ m) * EACH + lane % EACH;
      const float sign = run & m ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < CH; i++) x[i] = sign * x[i] + shfl_float(x[i], other & 31);
    }
#pragma unroll
    for (int i = 0; i < CH; i++) x[i] = holds(lane) ? x[i] * (D == 96 ? 0.10206207261596577f : 0.11180339887498948f) : 0.0f;
    return;
  }
#pragma unroll
  for (int m = 1; m < CH; m <<= 1)
#pragma unroll
    for (int i = 0; i < CH; i++)
      if (!(i & m)) {
        const float a = x[i], b = x[i + m];
        x[i] = a + b;
        x[i + m] = a - b;
      }
#pragma unroll 1                                     // small code: at short contexts fetching instructions is what takes the time
  for (int m = 1; m < LANES; m <<= 1) {
    const float sign = (lane & m) ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < CH; i++) x[i] = sign * x[i] + shfl_xor(x[i], m);
  }
  constexpr float unit = D == 256 ? 0.0625f : D == 128 ? 0.08838834764831845f : 0.125f;
#pragma unroll
  for (int i = 0; i < CH; i++) x[i] *= unit;
}
template <class S> DEVICE void begin_softmax(S& st) {   // no token yet: sums 0, and the first logit seen becomes the reference
#pragma unroll
  for (int i = 0; i < D / 16; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) st.o[i][j] = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) st.m[i] = st.l[i] = st.z[i] = 0;
  st.fresh = true;
}
#endif
