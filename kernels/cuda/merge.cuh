// Parts of a row from the warps of a block and from other blocks, and the row's output.
#ifndef KVSINK_MERGE
#define KVSINK_MERGE

// What a warp has of R heads, in the values' own unit.
DEVICE void write_warp_partial(State& st, float* dst, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int mask = ROWS_FROM; mask < 32; mask <<= 1)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      st.l[i] += shfl_xor(st.l[i], mask);
      st.z[i] += shfl_xor(st.z[i], mask);
    }
#pragma unroll
  for (int m = 0; m < K_STEPS; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float v = st.o[m][i];
      if (!WIDE) v += shfl_xor(v, 2);
      const float unit = VALUE_TRELLIS ? walk_unit(VF.width[2 * m + (i >> 1)]) : (float)(1 << (24 - VF.pos[2 * m + (i >> 1)]));
      const int head = 2 * t + (i & 1);
      if (head < R) dst[head * PART + m * 16 + (i >> 1) * 8 + g] = v * unit + st.z[i & 1];
    }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int head = 2 * lane + i;
    if (lane >= 4 || head >= R) continue;
    dst[head * PART + D] = st.fresh ? NEG_INF : st.m[i];
    dst[head * PART + D + 1] = st.l[i];
  }
}

template <int N = WARPS> DEVICE Partial merge_warps(const float* parts, int hq, int lane) {
  Partial a = nothing();
  if (hq >= R) return a;                             // a spare column
  const float* mine = parts + ((lane < N ? lane : 0) * R + hq) * PART;
  const float m = mine[D], l = lane < N ? mine[D + 1] : 0.0f;
  a.m = m;
#pragma unroll
  for (int i = 16; i; i >>= 1) a.m = fmaxf(a.m, shfl_xor(a.m, i));
  const float f = exp2_fast(m - a.m);
  a.l = warp_sum(f * l);
#pragma unroll
  for (int w = 0; w < N; w++) {
    const float e = shfl_float(f, w);
    float v[CH];
    load_channels(v, parts + (w * R + hq) * PART, lane);
#pragma unroll
    for (int i = 0; i < CH; i++) a.o[i] += e * v[i];
  }
  return a;
}

// The output of a query head; packed tokens come in the values' transform and without their mean.
DEVICE void finish(const Params& p, int b, int kv, int head, int lane, Partial a, const Partial& e) {
  if (VALUE_TRELLIS) {
    float sigma[CH];
    load_channels(sigma, p.value_sigma + kv * D, lane);
#pragma unroll
    for (int i = 0; i < CH; i++) a.o[i] *= sigma[i];
  }
  if (p.value_hadamard) hadamard(a.o, lane, true);
  const float n = fmaxf(a.m, e.m), f0 = exp2_fast(a.m - n), f1 = exp2_fast(e.m - n), inv = 1.0f / fmaxf(a.l * f0 + e.l * f1, 1e-30f);   // a row that sees nothing gives 0
  const float f = f0 * inv, fe = f1 * inv;
  float x[CH], mean[CH];
  load_channels(mean, p.value_mean ? p.value_mean + kv * D : 0, lane);
#pragma unroll
  for (int i = 0; i < CH; i++) x[i] = f * (a.o[i] + mean[i] * a.l) + fe * e.o[i];
  store_raw(p.out, (((long long)b * p.Hkv + kv) * HEADS_PER_KV + head) * D + CH * lane, narrow(x, p.q_bf16));
}

// Words that other blocks poll, four at a time: every one is valid once it differs from 0xffffffff. A lane's channels stand in
// words of its own, so that both sides see to the same.
constexpr u32 EMPTY = 0xffffffffu;
DEVICE bool missing(uint4 v) { return v.x == EMPTY || v.y == EMPTY || v.z == EMPTY || v.w == EMPTY; }
DEVICE void send_partial(float* slot, const Partial& a, int lane) {
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    u32 w[4];
#pragma unroll
    for (int j = 0; j < 4; j++) w[j] = 4 * i + j < CH ? float_bits(a.o[4 * i + j < CH ? 4 * i + j : 0]) : 0;
    store_polled(slot + 4 * (lane + 32 * i), uint4{w[0], w[1], w[2], w[3]});
  }
  if (lane == 0) store_polled(slot + SLOT - 4, uint4{float_bits(a.m), float_bits(a.l), 0, 0});
}

// Takes n partials, `stride` floats apart, waits for those not there yet and leaves the slots empty for the next launch.
DEVICE void receive_partials(Partial& a, float* slots, long long stride, int n, int lane) {
  constexpr int AHEAD = 8 / QUADS;
  const uint4 empty = {EMPTY, EMPTY, EMPTY, EMPTY};
  for (int base = 0; base < n; base += 32) {         // one lane per partial for largest logit and sum
    float* slot = slots + base * stride;
    const int count = n - base < 32 ? n - base : 32;
    uint4 s = {float_bits(NEG_INF), 0, 0, 0};
    do {
      if (lane < count) s = load_polled(slot + lane * stride + SLOT - 4);
    } while (any_lane(missing(s)));
    if (lane < count) store_polled(slot + lane * stride + SLOT - 4, empty);
    float top = fmaxf(a.m, bits_float(s.x));
#pragma unroll
    for (int m = 16; m; m >>= 1) top = fmaxf(top, shfl_xor(top, m));
    const float f = exp2_fast(bits_float(s.x) - top), own = exp2_fast(a.m - top);
    a.l = a.l * own + warp_sum(f * bits_float(s.y));
    a.m = top;
#pragma unroll
    for (int i = 0; i < CH; i++) a.o[i] *= own;
#pragma unroll 1
    for (int i0 = 0; i0 < count; i0 += AHEAD) {
      uint4 v[AHEAD][QUADS];
      bool bad;
      do {
        bad = false;
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
#pragma unroll
          for (int i = 0; i < QUADS; i++) {
            v[j][i] = uint4{0, 0, 0, 0};
            if (i0 + j < count) v[j][i] = load_polled(slot + (i0 + j) * stride + 4 * (lane + 32 * i));
          }
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
#pragma unroll
          for (int i = 0; i < QUADS; i++) bad = bad || missing(v[j][i]);
      } while (any_lane(bad));
#pragma unroll
      for (int j = 0; j < AHEAD; j++) {
        const float w = shfl_float(f, (i0 + j) & 31);
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
          const u32 x[4] = {v[j][i].x, v[j][i].y, v[j][i].z, v[j][i].w};
#pragma unroll
          for (int k = 0; k < 4 && k < CH; k++) a.o[4 * i + k] += w * bits_float(x[k]);
          if (i0 + j < count) store_polled(slot + (i0 + j) * stride + 4 * (lane + 32 * i), empty);
        }
      }
    }
  }
}
#endif
