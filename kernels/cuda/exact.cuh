// Rows that are read as they came: those kept exact beside the codes, the newest of a window, and the new ones.
#ifndef KVSINK_EXACT
#define KVSINK_EXACT

constexpr int CHUNK = 9;                             // rows that a warp has on their way at a time
struct ExactRows { Raw k[CHUNK], v[CHUNK]; bool kept; };   // kept: row `lane` of the chunk counts

DEVICE int recent_rows(const Params& p, int length) { return p.window ? (p.N ? length : length + 1) - recent_of(p, length) : 0; }

// Into L2 without waiting, one lane per 128-byte line.
DEVICE void prefetch_exact(const Params& p, int b, int kv, int lane) {
  const long long unit = (long long)b * p.Hkv + kv;
  for (int i = lane; i < p.E * D / 64; i += 32) {
    prefetch((const unsigned short*)p.exact_k + unit * p.E * D + i * 64);
    prefetch((const unsigned short*)p.exact_v + unit * p.E * D + i * 64);
  }
  for (int i = lane; i < p.window * D / 64; i += 32) {
    prefetch((const unsigned short*)p.recent_k + unit * p.window * D + i * 64);
    prefetch((const unsigned short*)p.recent_v + unit * p.window * D + i * 64);
  }
}

// Rows e0, e0 + 1, ... of exact, recent and new ones of sequence b, and whether they count: each slot does once, and obeys the mask.
DEVICE void load_exact(ExactRows& r, const Params& p, int b, int kv, int lane, int e0) {
  const int length = (int)p.length[b * p.length_row], recent = recent_of(p, length), old = p.E + recent_rows(p, length), mine = e0 + lane;
  int slot = -1, row = 0;                            // of row `lane` of the chunk, in its store
  if (lane < CHUNK && mine < old + p.N) {
    slot = mine < p.E ? p.exact_slot[b * p.E + mine] : mine < old ? recent + mine - p.E : length + mine - old;
    row = mine < p.E ? mine : mine < old ? slot % p.window : mine - old;
    if (mine < p.E && slot >= (p.window ? recent : p.N ? length : length + 1)) slot = -1;   // among the recent or the new rows too
    if (p.mask && slot >= 0 && !p.mask[b * p.mask_row + slot]) slot = -1;
  }
  r.kept = slot >= 0;
  const long long unit = (long long)b * p.Hkv + kv;
#pragma unroll
  for (int j = 0; j < CHUNK; j++) {
    r.k[j] = r.v[j] = Raw{};
    if (e0 + j >= old + p.N) continue;
    const bool side = e0 + j < p.E, held = e0 + j < old;
    const long long at = (unit * (side ? p.E : held ? p.window : p.N) + shfl_int(row, j)) * D + CH * lane;
    r.k[j] = load_raw(side ? p.exact_k : held ? p.recent_k : p.new_k, at);
    r.v[j] = load_raw(side ? p.exact_v : held ? p.recent_v : p.new_v, at);
  }
}

// All of them for one query head, in the values' own basis; `r` holds the first chunk.
DEVICE Partial attend_exact(ExactRows& r, const Raw& qv, const Params& p, int b, int kv, int lane) {
  Partial a = nothing();
  const int count = p.E + recent_rows(p, (int)p.length[b * p.length_row]) + p.N;
#pragma unroll 1
  for (int e0 = 0; e0 < count; e0 += CHUNK) {
    if (e0) load_exact(r, p, b, kv, lane, e0);
    float q[CH], d[CHUNK];
    widen(q, qv, p.q_bf16);
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
      float k[CH];
      widen(k, r.k[j], p.q_bf16);
      d[j] = 0;
#pragma unroll
      for (int i = 0; i < CH; i++) d[j] += q[i] * k[i];
    }
    // eight sums over the warp at once: every exchange halves the rows a lane holds; lane bits 16, 8, 4 end up naming the row
#pragma unroll
    for (int n = 4; n; n >>= 1) {
      const bool upper = lane & 4 * n;
#pragma unroll
      for (int j = 0; j < n; j++) {
        const float send = upper ? d[j] : d[j + n];
        d[j] = (upper ? d[j + n] : d[j]) + shfl_xor(send, 4 * n);
      }
    }
    d[0] += shfl_xor(d[0], 2);
    d[0] += shfl_xor(d[0], 1);
    d[8] = warp_sum(d[8]);
    const u32 kept = ballot_warp(r.kept);
    const float x = kept >> (lane >> 2) & 1 ? d[0] * p.scale : NEG_INF, x8 = kept >> 8 & 1 ? d[8] * p.scale : NEG_INF;
    float top = fmaxf(x, fmaxf(x8, a.m));
#pragma unroll
    for (int m = 4; m < 32; m <<= 1) top = fmaxf(top, shfl_xor(top, m));
    const float f = exp2_fast(a.m - top), w = x <= NEG_INF ? 0.0f : exp2_fast(x - top), w8 = x8 <= NEG_INF ? 0.0f : exp2_fast(x8 - top);
    float sum = w;
#pragma unroll
    for (int m = 4; m < 32; m <<= 1) sum += shfl_xor(sum, m);
    a.l = a.l * f + sum + w8;
    a.m = top;
#pragma unroll
    for (int i = 0; i < CH; i++) a.o[i] *= f;
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
      const float wj = j == 8 ? w8 : shfl_float(w, 4 * j);
      float v[CH];
      widen(v, wj > 0.0f ? r.v[j] : Raw{}, p.q_bf16);          // unused rows of the store may hold anything
#pragma unroll
      for (int i = 0; i < CH; i++) a.o[i] += wj * v[i];
    }
  }
  return a;
}
#endif
