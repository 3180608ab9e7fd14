// Rows that are read as they came: those kept exact beside the codes, the newest of a window, and the new ones.
#ifndef KVSINK_EXACT
#define KVSINK_EXACT

constexpr int CHUNK = 9;                             // rows that a warp has on their way at a time
struct ExactRows { Raw k[CHUNK], v[CHUNK]; bool kept; };   // kept: row `lane` of the chunk counts

DEVICE int recent_rows(const Params& p, int length) { return MANY && p.window ? (p.N ? length : length + 1) - recent_of(p, length) : 0; }

// Into L2 without waiting, one lane per 128-byte line.
DEVICE void prefetch_exact(const Params& p, int b, int kv, int lane) {
  const long long unit = (long long)b * p.Hkv + kv;
  for (int i = lane; i < p.E * D / 64; i += 32) {
    if (p.pages && p.exact_slot[b * p.E + i * 64 / D] < 0) continue;
    const long long at = p.pages ? in_page(p, p.exact_at[b * p.E + i * 64 / D], kv) + i * 64 % D : unit * p.E * D + i * 64;
    prefetch((const unsigned short*)p.exact_k + at);
    prefetch((const unsigned short*)p.exact_v + at);
  }
  for (int i = lane; MANY && i < p.window * D / 64; i += 32) {
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
    row = mine < p.E ? mine : MANY && mine < old ? slot % p.window : mine - old;
    if (mine < p.E && p.pages) row = slot < 0 ? 0 : p.exact_at[b * p.E + mine];
    if (mine < p.E && slot >= (MANY && p.window ? recent : p.N ? length : length + 1)) slot = -1;   // among the recent or the new rows too
    if (p.mask && slot >= 0 && slot < p.tiles * 128 && !p.mask[b * p.mask_row + slot]) slot = -1;
  }
  r.kept = slot >= 0;
  const long long unit = (long long)b * p.Hkv + kv;
#pragma unroll
  for (int j = 0; j < CHUNK; j++) {
    r.k[j] = r.v[j] = Raw{};
    if (e0 + j >= old + p.N) continue;
    const bool side = e0 + j < p.E, held = MANY && e0 + j < old;
    const int from = shfl_int(row, j);
    const long long at = side && p.pages ? in_page(p, from, kv) : (unit * (side ? p.E : held ? p.window : p.N) + from) * D;
    r.k[j] = load_raw(side ? p.exact_k : held ? p.recent_k : p.new_k, at + CH * lane);
    r.v[j] = load_raw(side ? p.exact_v : held ? p.recent_v : p.new_v, at + CH * lane);
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

// -- many of them -----------------------------------------------------------------------------------------------------------
//
// More than a service warp should see to (MANY): 16 rows at a time by the warps that compute, as products in the dtype of the rows.
// A lane loads 8 neighbouring channels of rows g and g + 8, so that word i of chunk j holds channels 32 j + 8 t + 2 i and the next:
// the query stands in the same order, and so do the rows of the output.
constexpr bool BY_WARPS = MANY && D % 32 == 0;

struct ExactRow { const unsigned short *k, *v; bool seen; };
DEVICE ExactRow exact_row(const Params& p, int b, int kv, int e, int length, int recent, int old) {
  const long long unit = (long long)b * p.Hkv + kv;
  int slot = -1;
  if (e < old + p.N) slot = e < p.E ? p.exact_slot[b * p.E + e] : e < old ? recent + e - p.E : length + e - old;
  if (e < p.E && slot >= (p.window ? recent : p.N ? length : length + 1)) slot = -1;
  if (p.mask && slot >= 0 && slot < p.tiles * 128 && !p.mask[b * p.mask_row + slot]) slot = -1;
  const long long row = e < p.E ? unit * p.E + e : e < old ? unit * p.window + slot % (p.window ? p.window : 1) : unit * p.N + e - old;
  const long long at = e < p.E && p.pages ? in_page(p, slot < 0 ? 0 : p.exact_at[b * p.E + e], kv) : row * D;
  const void *k = e < p.E ? p.exact_k : e < old ? p.recent_k : p.new_k, *v = e < p.E ? p.exact_v : e < old ? p.recent_v : p.new_v;
  return {(const unsigned short*)k + at, (const unsigned short*)v + at, slot >= 0};
}
template <bool BF16> DEVICE void product_of(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (BF16) mma_bf16(d, a0, a1, a2, a3, b0, b1);
  else mma(d, a0, a1, a2, a3, b0, b1);
}
DEVICE uint4 load_row(const unsigned short* row, bool seen, int at) { return seen ? *(const uint4*)(row + at) : uint4{0, 0, 0, 0}; }

template <bool BF16, class F>
DEVICE void attend_many(const Params& p, const Place& place, int b, int warp, int lane, float* dst, F free) {   // free: waits for `dst`
  constexpr int CHUNKS = D / 32;
  constexpr bool AHEAD = D <= 128;                   // values are asked for with the keys
  const int g = lane >> 2, t = lane & 3, head = g & (COLUMNS - 1);
  const int length = (int)p.length[b * p.length_row], recent = recent_of(p, length), old = p.E + recent_rows(p, length);
  const unsigned short* query = (const unsigned short*)p.q +
      (((long long)b * p.Hkv + place.kv) * HEADS_PER_KV + place.first + (head < place.heads ? head : place.heads - 1)) * D + 8 * t;
  uint4 q[CHUNKS];
#pragma unroll
  for (int j = 0; j < CHUNKS; j++) q[j] = *(const uint4*)(query + 32 * j);
  float o[K_STEPS][4] = {}, m[2] = {NEG_INF, NEG_INF}, l[2] = {0, 0};
#pragma unroll 1
  for (int e0 = 16 * warp; e0 < old + p.N; e0 += 16 * WARPS) {
    const ExactRow x = exact_row(p, b, place.kv, e0 + g, length, recent, old), y = exact_row(p, b, place.kv, e0 + g + 8, length, recent, old);
    uint4 k0[CHUNKS], k1[CHUNKS], v0[CHUNKS], v1[CHUNKS];
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
      k0[j] = load_row(x.k, x.seen, 32 * j + 8 * t);
      k1[j] = load_row(y.k, y.seen, 32 * j + 8 * t);
    }
    if (AHEAD)
#pragma unroll
      for (int j = 0; j < CHUNKS; j++) {
        v0[j] = load_row(x.v, x.seen, 32 * j + 8 * t);
        v1[j] = load_row(y.v, y.seen, 32 * j + 8 * t);
      }
    float s[4] = {};
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
      product_of<BF16>(s, k0[j].x, k1[j].x, k0[j].y, k1[j].y, q[j].x, q[j].y);
      product_of<BF16>(s, k0[j].z, k1[j].z, k0[j].w, k1[j].w, q[j].z, q[j].w);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) s[i] = (i < 2 ? x.seen : y.seen) ? s[i] * p.scale : NEG_INF;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float top = fmaxf(m[i], fmaxf(s[i], s[i + 2]));
#pragma unroll
      for (int mask = 4; mask < 32; mask <<= 1) top = fmaxf(top, shfl_xor(top, mask));
      const float f = exp2_fast(m[i] - top);
      m[i] = top;
      l[i] *= f;
#pragma unroll
      for (int k = 0; k < K_STEPS; k++) { o[k][i] *= f; o[k][i + 2] *= f; }
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        s[i + r] = s[i + r] <= NEG_INF ? 0.0f : exp2_fast(s[i + r] - top);
        l[i] += s[i + r];
      }
    }
    const u32 b0 = transpose8x8(BF16 ? pack_bf2(s[0], s[1]) : pack_half2(s[0], s[1]));
    const u32 b1 = transpose8x8(BF16 ? pack_bf2(s[2], s[3]) : pack_half2(s[2], s[3]));
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
      const uint4 u = AHEAD ? v0[j] : load_row(x.v, x.seen, 32 * j + 8 * t), w = AHEAD ? v1[j] : load_row(y.v, y.seen, 32 * j + 8 * t);
      product_of<BF16>(o[2 * j], transpose8x8(u.x), transpose8x8(u.y), transpose8x8(w.x), transpose8x8(w.y), b0, b1);
      product_of<BF16>(o[2 * j + 1], transpose8x8(u.z), transpose8x8(u.w), transpose8x8(w.z), transpose8x8(w.w), b0, b1);
    }
  }
  free();
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int mask = 4; mask < 32; mask <<= 1) l[i] += shfl_xor(l[i], mask);
#pragma unroll
  for (int k = 0; k < K_STEPS; k++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (2 * t + (i & 1) < R) dst[(2 * t + (i & 1)) * PART + 32 * (k >> 1) + 8 * (g >> 1) + 2 * (2 * (k & 1) + (i >> 1)) + (g & 1)] = o[k][i];
#pragma unroll
  for (int i = 0; i < 2; i++)
    if (g == 0 && 2 * t + i < R) {
      dst[(2 * t + i) * PART + D] = l[i] > 0 ? m[i] : NEG_INF;
      dst[(2 * t + i) * PART + D + 1] = l[i];
    }
}
#endif
