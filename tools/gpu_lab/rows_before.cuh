// Rows into packed tiles and back: `append_rows` codes new keys and values and stores them, `decode_rows` reads slots as rows.
//
// Formula    kernels/tiles.py (transform, layout), kernels/quantize.py (codes and scales); sums in float32
// Layout     as attend.cuh, in whose translation unit this file stands: KW, VW and MODE are shared
// Shapes     half the warps of a block take the keys of one (row, KV head) each, the other half the values, 4 channels per lane
// Exact      every product, difference and quotient is rounded on its own, as the plain operators do; only sums differ in order
#ifndef KVSINK_ROWS
#define KVSINK_ROWS

#ifndef KSTEP
#define KSTEP 1.5957691f, 0.9956867f, 0.5860194f, 0.3352006f  // spacing of 1- to 4-bit levels (kernels/levels.py)
#endif
constexpr int ROW_THREADS = 512, SEGMENTS = 4, Z_STRIDE = D + 4;
TABLE float STEPS[4] = {KSTEP};
constexpr float HALF_MAX = 65504.0f, HALF_TINY = 6.0e-8f;

struct RowParams {
  const void *k, *v;                            // [B, Hkv, S, 128] new rows, keys after RoPE; decode_rows: where to write rows
  long long k_stride[3], v_stride[3];           // in elements: batch, head, row
  const float* table;                           // [Hkv, 64, 128] mean by slot, or null
  const float *start_cos, *start_sin;           // [P, 128] rotation of block starts, or null
  const float *anchor_cos, *anchor_sin;         // [B, 128]
  const float* basis;                           // block KLT: [Hkv, 128, 128] eigenvectors in columns; decode_rows: in rows
  const float* sigma;                           // block KLT: [Hkv, 128]
  const float* v_mean;                          // [Hkv, 128] or null
  const long long *length, *positions;          // positions [B or 1, S], rows position_row apart
  long long position_row;
  int* stored_positions;                        // [B, L]
  unsigned char *k_codes, *v_codes;
  void* k_scale;
  u32* v_scale;
  void *exact_k, *exact_v;                      // side store [B, Hkv, E, 128]; one new row per sequence may enter it
  int* exact_slot;                              // [B, E]
  float* exact_score;
  const float* score[SEGMENTS];                 // [B] score of the new row in each segment
  u32* arrived;                                 // [B] zero
  int capacity[SEGMENTS];
  int segments, E, B, Hkv, S, L, bf16, key_hadamard, value_hadamard;
  int per;                                      // (head, row) pairs of a block, at most half its warps
  int first;                                    // decode_rows: first slot, S slots are read
  float key_clip, value_clip;
};

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
DEVICE void let_next_begin() {}
DEVICE void wait_for_previous() {}
DEVICE void fence_device() { __threadfence(); }
DEVICE u32 arrive_one(u32* at, u32 last) { return atomicInc(at, last); }
#else
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
DEVICE void fence_device() {}
DEVICE u32 arrive_one(u32* at, u32 last) { u32 old = *at; *at = old >= last ? 0 : old + 1; return old; }
#endif

DEVICE float through_half(float x) {            // rounded to float16 and back
  return half_lo(pack_half2(fminf(fmaxf(x, -HALF_MAX), HALF_MAX), 0.0f));
}
DEVICE void load_float4(float (&x)[4], const float* p) {
  const float4 v = *(const float4*)p;
  x[0] = v.x; x[1] = v.y; x[2] = v.z; x[3] = v.w;
}
// Half-split rotation of 128 channels, 4 per lane; `undo` divides by the squared length of (cos, sin).
DEVICE void rotate(float (&x)[4], const float* cos, const float* sin, bool undo, int lane) {
  float c[4], s[4];
  load_float4(c, cos + 4 * lane);
  load_float4(s, sin + 4 * lane);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (undo) {
      const float norm = fmaxf(add(mul(c[i], c[i]), mul(s[i], s[i])), 1e-12f);
      c[i] = quotient(c[i], norm);
      s[i] = quotient(-s[i], norm);
    }
    const float z = shfl_xor(x[i], 16);
    x[i] = lane < 16 ? sub(mul(x[i], c[i]), mul(z, s[i])) : add(mul(x[i], c[i]), mul(z, s[i]));
  }
}
DEVICE void turn_row(float (&x)[4], const RowParams& p, int b, int slot, bool back, int lane) {
  if (!p.start_cos) return;
  const long long start = (long long)(slot / 64) * D, row = (long long)b * D;
  if (back) {
    rotate(x, p.start_cos + start, p.start_sin + start, true, lane);
    rotate(x, p.anchor_cos + row, p.anchor_sin + row, false, lane);
  } else {
    rotate(x, p.anchor_cos + row, p.anchor_sin + row, true, lane);
    rotate(x, p.start_cos + start, p.start_sin + start, false, lane);
  }
}

// One scale and minimum per row. Returns them as two float16.
DEVICE u32 encode_uniform(u32 (&code)[4], const float (&x)[4], float clip, int width) {
  const float top = (float)((1 << width) - 1);
  const float hi = mul(clip, warp_max(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]))));
  const float lo = mul(clip, -warp_max(fmaxf(fmaxf(-x[0], -x[1]), fmaxf(-x[2], -x[3]))));
  const float s = through_half(quotient(sub(hi, lo), top)), base = through_half(lo), step = fmaxf(s, HALF_TINY);
#pragma unroll
  for (int i = 0; i < 4; i++) code[i] = (u32)fminf(fmaxf(nearest_even(quotient(sub(x[i], base), step)), 0.0f), top);
  return pack_half2(s, base);
}

DEVICE void encode_even(u32 (&code)[4], const float (&y)[4], float g, int width) {   // number of thresholds below y / g
  const float step = STEPS[width - 1];
  const int half = 1 << (width - 1);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float x = quotient(y[i], g);
    u32 n = 0;
    for (int j = 1; j < 2 * half; j++) n += x > mul(step, (float)(j - half)) ? 1u : 0u;
    code[i] = n;
  }
}
DEVICE float even_level(u32 code, int width) { return mul(STEPS[width - 1], (float)code - 0.5f * (float)((1 << width) - 1)); }

// The gain for which gain * sigma * level comes closest to x.
DEVICE float fit(const float (&x)[4], const float (&sigma)[4], const u32 (&code)[4], int width) {
  float dot = 0, square = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float level = mul(even_level(code[i], width), sigma[i]);
    dot += x[i] * level;
    square += level * level;
  }
  dot = warp_sum(dot);
  square = warp_sum(square);
  return through_half(quotient(dot, fmaxf(square, 1e-30f)));
}

// Codes of one row, one byte each in shared memory, into the words of its slot.
template <bool KEYS> DEVICE int word_place(int slot, int word, int lane, int bins) {
  const int q = slot & 127, sub_tile = (q & 63) / 16 * 2 + q / 64, n = 2 * bins, wide = n % 4 == 0 ? 4 : 2;
  return sub_tile * 128 * n + word / wide * 128 * wide + lane * 4 * wide + word % wide * 4;
}
DEVICE void store_key_words(unsigned char* tile, const unsigned char* code, int slot, int lane) {
  constexpr int bins = KF.bins;
  for (int i = lane; i < 4 * bins; i += 32) {
    const int t = i / bins, b = i % bins, r = slot & 15;
    u32 word = 0;
#pragma unroll
    for (int k = 0; k < 16; k++)
      if (KF.bin[k] == b) word |= ((u32)code[8 * k + 2 * t] | (u32)code[8 * k + 2 * t + 1] << 16) << (KF.shift[k] + KF.pos[k]);
    *(u32*)(tile + word_place<true>(slot, (r & 1) * bins + b, (r >> 1) * 4 + t, bins)) = word;
  }
}
DEVICE void store_value_words(unsigned char* tile, const unsigned char* code, int slot, int lane) {
  constexpr int bins = VF.bins;
  for (int i = lane; i < 8 * bins; i += 32) {
    const int g = i / bins, b = i % bins, r = slot & 15;
    u32 word = 0;
#pragma unroll
    for (int k = 0; k < 16; k++)
      if (VF.bin[k] == b) word |= (u32)code[8 * k + g] << (VF.shift[k] + VF.pos[k]);
    *(unsigned short*)(tile + word_place<false>(slot, (r & 1) * bins + b, g * 4 + (r >> 2), bins) + 2 * (r >> 1 & 1)) = (unsigned short)word;
  }
}
DEVICE u32 read_key_code(const unsigned char* tile, int slot, int channel) {
  const int k = channel >> 3, t = (channel & 7) >> 1, r = slot & 15;
  const u32 word = *(const u32*)(tile + word_place<true>(slot, (r & 1) * KF.bins + KF.bin[k], (r >> 1) * 4 + t, KF.bins));
  return word >> (16 * (channel & 1) + KF.shift[k] + KF.pos[k]) & ((1u << KF.width[k]) - 1u);
}
DEVICE u32 read_value_code(const unsigned char* tile, int slot, int channel) {
  const int k = channel >> 3, g = channel & 7, r = slot & 15;
  const u32 word = *(const unsigned short*)(tile + word_place<false>(slot, (r & 1) * VF.bins + VF.bin[k], g * 4 + (r >> 2), VF.bins) + 2 * (r >> 1 & 1));
  return word >> (VF.shift[k] + VF.pos[k]) & ((1u << VF.width[k]) - 1u);
}

// y[r] = x[r] M for the rows in shared memory: every thread one column, a part of the inner sum. Rows may be of several heads,
// `first` being that of row 0; `index` counts (head, row).
template <int N> DEVICE void project_rows(float* xs, float* sums, const float* matrices, int index, int rows, int heads, int per) {
  constexpr int ROWS = N / 64, PARTS = N / 128, LENGTH = (D + PARTS - 1) / PARTS;
  const int c = TID & 127, part = TID >> 7, from = part * LENGTH, to = from + LENGTH < D ? from + LENGTH : D;
  const int first = index / rows, last = (index + per - 1) / rows;
  float acc[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) acc[r] = 0;
  if (per == 1) {                                  // latency is all: every load is asked for before the first is used
    const float* matrix = matrices + (long long)first * D * D;
    float u[LENGTH];
#pragma unroll
    for (int i = 0; i < LENGTH; i++) u[i] = from + i < to ? matrix[(from + i) * D + c] : 0.0f;
#pragma unroll
    for (int i = 0; i < LENGTH; i++)
      if (from + i < to) acc[0] += xs[from + i] * u[i];
  } else if (first == last) {
    const float* matrix = matrices + (long long)first * D * D;
#pragma unroll 8
    for (int d = from; d < to; d++) {
      const float u = matrix[d * D + c];
#pragma unroll
      for (int r = 0; r < ROWS; r++) acc[r] += xs[r * Z_STRIDE + d] * u;
    }
  } else {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int head = (index + r) / rows;
      if (r < per && head < heads) {
        const float* matrix = matrices + (long long)head * D * D;
#pragma unroll 16
        for (int d = from; d < to; d++) acc[r] += xs[r * Z_STRIDE + d] * matrix[d * D + c];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) sums[(part * ROWS + r) * Z_STRIDE + c] = acc[r];
}
template <int N> DEVICE void collect_row(float (&x)[4], const float* sums, int r, int lane) {
  constexpr int ROWS = N / 64, PARTS = N / 128;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[i] = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++) x[i] += sums[(part * ROWS + r) * Z_STRIDE + 4 * lane + i];
  }
}

DEVICE void write4(void* base, long long at, const float (&x)[4], int bf16) {
  const uint2 v = {bf16 ? pack_bf2(x[0], x[1]) : pack_half2(x[0], x[1]), bf16 ? pack_bf2(x[2], x[3]) : pack_half2(x[2], x[3])};
  *(uint2*)((unsigned short*)base + at) = v;
}

// Whether the new row of sequence b is better than the worst exact row of some segment.
DEVICE bool may_enter(const RowParams& p, int b, int lane) {
  const float score = lane < p.E ? p.exact_score[b * p.E + lane] : 0.0f;
  bool better = false;
  for (int i = 0, from = 0; i < p.segments; from += p.capacity[i], i++)
    better = better || (lane >= from && lane < from + p.capacity[i] && p.score[i][b] > score);
  return any_lane(better);
}

// The new row of sequence b takes the place of a segment's worst exact row if it is better. Every head decides alike; the
// last one to come writes slots and scores, when no other reads them any more.
DEVICE void enter_exact(const RowParams& p, uint2 k, uint2 v, int b, int head, int slot, int lane) {
  const int held = lane < p.E ? p.exact_slot[b * p.E + lane] : -1;
  int named = held < -1 ? -held - 2 : held;
  float score = lane < p.E ? p.exact_score[b * p.E + lane] : 0.0f;
  bool changed = false;
  unsigned short *rows_k = (unsigned short*)p.exact_k + ((long long)b * p.Hkv + head) * p.E * D + 4 * lane;
  unsigned short *rows_v = (unsigned short*)p.exact_v + ((long long)b * p.Hkv + head) * p.E * D + 4 * lane;
  for (int i = 0, from = 0; i < p.segments; from += p.capacity[i], i++) {
    const float mine = p.score[i][b];
    const bool inside = lane >= from && lane < from + p.capacity[i];
    const float low = -warp_max(inside ? -score : -3.4e38f);
    if (!(mine > low)) continue;
    const u32 lowest = ballot_warp(inside && score <= low);
    const int at = popcount((lowest & (0u - lowest)) - 1u);    // the first of them
    changed = true;
    if (lane == at) { named = slot; score = mine; }
    *(uint2*)(rows_k + at * D) = k;
    *(uint2*)(rows_v + at * D) = v;
  }
  if (!changed) return;
  bool repeat = false;
  for (int e = 0; e < p.E; e++) {
    const int other = shfl_int(named, e);
    repeat = repeat || (e < lane && other == named && named >= 0);
  }
  fence_device();
  int last = 0;
  sync_warp();
  if (lane == 0) last = arrive_one(p.arrived + b, p.Hkv - 1) == (u32)p.Hkv - 1;
  if (shfl_int(last, 0) && lane < p.E) {
    p.exact_slot[b * p.E + lane] = repeat ? -named - 2 : named;
    p.exact_score[b * p.E + lane] = score;
  }
}

constexpr int ROW_SMEM = ROW_THREADS / 64 * (Z_STRIDE * 4 * (MODE == 2 ? 1 + ROW_THREADS / 128 : 0) + 2 * D);

// Codes and stores as many (head, row) as half the warps of a block of N threads.
template <int N> DEVICE void append_unit(const RowParams& p, int unit, unsigned char* smem) {
  constexpr int ROWS = N / 64;
  const int lane = TID & 31, warp = TID >> 5, r = warp % ROWS, rows = p.B * p.S, index = unit * p.per + r;
  const bool values = warp >= ROWS, inside = r < p.per && index < p.Hkv * rows;
  const int head = inside ? index / rows : 0, row_index = inside ? index - head * rows : 0;
  const int b = row_index / p.S, s = row_index - b * p.S, slot = (int)*p.length + s;
  const bool live = inside && slot < p.L;         // what does not fit is dropped; the cache says so beforehand
  unsigned char* code = smem + warp * D;
  float *xs = (float*)(smem + 2 * ROWS * D), *sums = xs + ROWS * Z_STRIDE;
  uint2 row = {0, 0};
  float x[4] = {0, 0, 0, 0};
  if (live) {
    const long long* st = values ? p.v_stride : p.k_stride;
    row = load4(values ? p.v : p.k, b * st[0] + head * st[1] + s * st[2] + 4 * lane);
    widen(x, row, p.bf16);
  }
  if (live && !values && MODE != 0) {
    float t[4];
    load_float4(t, p.table + ((long long)head * 64 + (slot & 63)) * D + 4 * lane);
    if (MODE == 2) turn_row(x, p, b, slot, true, lane);
    else turn_row(t, p, b, slot, false, lane);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = sub(x[i], t[i]);
  }
  if (MODE == 2) {
    if (!values)
#pragma unroll
      for (int i = 0; i < 4; i++) xs[r * Z_STRIDE + 4 * lane + i] = x[i];
    sync_cta();
    project_rows<N>(xs, sums, p.basis, unit * p.per, rows, p.Hkv, p.per);
    sync_cta();
    if (!values) collect_row<N>(x, sums, r, lane);
  }
  if (!live) return;
  u32 c[4];
  const long long at = ((long long)b * p.Hkv + head) * p.L + slot, tile = ((long long)b * p.Hkv + head) * (p.L / 128) + slot / 128;
  if (values) {
    if (p.v_mean) {
      float mean[4];
      load_float4(mean, p.v_mean + head * D + 4 * lane);
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = sub(x[i], mean[i]);
    }
    if (p.value_hadamard) hadamard(x, lane);
    const u32 scale = encode_uniform(c, x, p.value_clip, VF.width[0]);
    if (lane == 0) p.v_scale[at] = scale;
  } else if (MODE == 2) {
    float sigma[4], y[4], square = 0;
    const int width = KF.width[lane >> 1];
    load_float4(sigma, p.sigma + head * D + 4 * lane);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      sigma[i] = fmaxf(sigma[i], HALF_TINY);
      y[i] = quotient(x[i], sigma[i]);
      square += y[i] * y[i];
    }
    encode_even(c, y, fmaxf(root(warp_sum(square) / (float)D), HALF_TINY), width);
    encode_even(c, y, fmaxf(fit(x, sigma, c, width), HALF_TINY), width);
    const float gain = fit(x, sigma, c, width);
    if (lane == 0) ((unsigned short*)p.k_scale)[at] = (unsigned short)pack_half2(gain, 0.0f);
  } else {
    if (p.key_hadamard) hadamard(x, lane);
    const u32 scale = encode_uniform(c, x, p.key_clip, KF.width[0]);
    if (lane == 0) ((u32*)p.k_scale)[at] = scale;
  }
  *(u32*)(code + 4 * lane) = c[0] | c[1] << 8 | c[2] << 16 | c[3] << 24;
  sync_warp();
  if (values) {
    store_value_words(p.v_codes + tile * V_BYTES, code, slot, lane);
    return;
  }
  store_key_words(p.k_codes + tile * K_BYTES, code, slot, lane);
  if (head == 0 && lane == 0) p.stored_positions[(long long)b * p.L + slot] = (int)p.positions[b * p.position_row + s];
  if (p.segments) {
    const uint2 v = load4(p.v, b * p.v_stride[0] + head * p.v_stride[1] + s * p.v_stride[2] + 4 * lane);
    enter_exact(p, row, v, b, head, slot, lane);
  }
}

#ifndef KVSINK_EMULATE
extern "C" __device__ const int kvsink_launch[4] = {THREADS, SMEM_BYTES, ROW_THREADS, 32};
extern "C" __global__ void append_row(const __grid_constant__ RowParams p) {}   // not there yet
extern "C" __global__ void __launch_bounds__(ROW_THREADS) append_rows(const __grid_constant__ RowParams p) {
  __shared__ __align__(16) unsigned char smem[ROW_SMEM];
#else
static void append_rows(const RowParams& p) {
  unsigned char* smem = EMULATED_SMEM;
#endif
  append_unit<ROW_THREADS>(p, CTA_X, smem);
}

#ifndef KVSINK_EMULATE
extern "C" __global__ void __launch_bounds__(ROW_THREADS) decode_rows(const __grid_constant__ RowParams p) {
  __shared__ __align__(16) unsigned char smem[ROW_SMEM];
#else
static void decode_rows(const RowParams& p) {
  unsigned char* smem = EMULATED_SMEM;
#endif
  constexpr int ROWS = ROW_THREADS / 64;
  const int lane = TID & 31, warp = TID >> 5, head = CTA_Y, r = warp % ROWS, index = CTA_X * ROWS + r;
  const bool values = warp >= ROWS, live = index < p.B * p.S;
  const int b = live ? index / p.S : 0, s = live ? index - b * p.S : 0, slot = p.first + s;
  float *xs = (float*)(smem + 2 * ROWS * D), *sums = xs + ROWS * Z_STRIDE;
  const long long at = ((long long)b * p.Hkv + head) * p.L + slot, tile = ((long long)b * p.Hkv + head) * (p.L / 128) + slot / 128;
  float x[4], t[4] = {0, 0, 0, 0};
  if (values) {
    const u32 scale = p.v_scale[at];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = add(mul((float)read_value_code(p.v_codes + tile * V_BYTES, slot, 4 * lane + i), half_lo(scale)), half_hi(scale));
    if (p.value_hadamard) hadamard(x, lane);
    if (p.v_mean) load_float4(t, p.v_mean + head * D + 4 * lane);
  } else {
    if (MODE != 0) load_float4(t, p.table + ((long long)head * 64 + (slot & 63)) * D + 4 * lane);
    if (MODE == 2) {
      const float gain = half_lo(((const unsigned short*)p.k_scale)[at]);
      float sigma[4];
      load_float4(sigma, p.sigma + head * D + 4 * lane);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 code = read_key_code(p.k_codes + tile * K_BYTES, slot, 4 * lane + i);
        xs[r * Z_STRIDE + 4 * lane + i] = mul(mul(even_level(code, KF.width[lane >> 1]), sigma[i]), gain);
      }
    } else {
      const u32 scale = ((const u32*)p.k_scale)[at];
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = add(mul((float)read_key_code(p.k_codes + tile * K_BYTES, slot, 4 * lane + i), half_lo(scale)), half_hi(scale));
      if (p.key_hadamard) hadamard(x, lane);
      if (MODE == 1) turn_row(t, p, b, slot, false, lane);
    }
  }
  if (MODE == 2) {
    sync_cta();
    project_rows<ROW_THREADS>(xs, sums, p.basis + (long long)head * D * D, 0, ROWS, 1, ROWS);
    sync_cta();
    if (!values) collect_row<ROW_THREADS>(x, sums, r, lane);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = add(x[i], t[i]);
  if (MODE == 2 && !values) turn_row(x, p, b, slot, false, lane);
  if (live) {
    const long long* st = values ? p.v_stride : p.k_stride;
    write4((void*)(values ? p.v : p.k), b * st[0] + head * st[1] + s * st[2] + 4 * lane, x, p.bf16);
  }
}
#endif
