// Rows into packed tiles and back: `append_rows` codes new keys and values and stores them, `append_row` does so for one new row
// per sequence with a block for each (row, KV head), `decode_rows` reads slots as rows.
//
// Formula    kernels/tiles.py (transform, layout), kernels/quantize.py (codes and scales); sums in float32
// Layout     as attend.cuh, in whose translation unit this file stands: KW, VW and MODE are shared
// Shapes     half the warps of a block take the keys of one (row, KV head) each, the other half the values, 4 channels per lane;
//            append_row: KEY_WARPS warps the key, one the value, the others the product with the basis
// Exact      every product, difference and quotient is rounded on its own, as the plain operators do; only sums differ in order
#ifndef KVSINK_ROWS
#define KVSINK_ROWS

#ifndef KSTEP
#define KSTEP 1.5957691f, 0.9956867f, 0.5860194f, 0.3352006f  // spacing of 1- to 4-bit levels (kernels/levels.py)
#endif
constexpr int ROW_THREADS = 512, SEGMENTS = 4, Z_STRIDE = D + 4;
constexpr float STEPS[4] = {KSTEP}, PER_UNIT[4] = {1.0f / STEPS[0], 1.0f / STEPS[1], 1.0f / STEPS[2], 1.0f / STEPS[3]};
#ifndef LONE_FIRST
#define LONE_FIRST 4  // of a warp's 8 rows of the basis, those asked for before what depends on the length
#endif
constexpr int KEY_WARPS = MODE == 2 ? 4 : 1, PROJECT_WARPS = MODE == 2 ? 16 : 0, LONE_THREADS = 32 * (KEY_WARPS + 1 + PROJECT_WARPS);
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
// As the processor divides, but with one branch for four quotients: its own sequence, whose check for extreme exponents and
// branch after every quotient would put the four one after the other.
DEVICE bool ordinary(float a) { return (float_bits(a) >> 23 & 255u) - 67u < 120u; }   // 2^-60 <= |a| < 2^60
static __device__ __noinline__ float any_quotient(float a, float b) { return __fdiv_rn(a, b); }
DEVICE void quotients(float (&q)[4], const float (&a)[4], const float (&b)[4]) {
  float x[4];
  bool plain = true;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b[i]));
    r = __fmaf_rn(r, __fmaf_rn(-b[i], r, 1.0f), r);
    x[i] = __fmul_rn(a[i], r);
    x[i] = __fmaf_rn(r, __fmaf_rn(-b[i], x[i], a[i]), x[i]);
    plain = plain && ordinary(b[i]) && (a[i] == 0.0f || ordinary(a[i]));
  }
  if (__builtin_expect(!plain, 0))
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = any_quotient(a[i], b[i]);
#pragma unroll
  for (int i = 0; i < 4; i++) q[i] = x[i];
}
// Barrier ID among N threads of the block; who arrives does not wait.
template <int ID, int N> DEVICE void sync_part() { asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(N) : "memory"); }
template <int ID, int N> DEVICE void arrive_part() { asm volatile("bar.arrive %0, %1;" ::"n"(ID), "n"(N) : "memory"); }
DEVICE void fence_device() { __threadfence(); }
DEVICE u32 arrive_one(u32* at, u32 last) { return atomicInc(at, last); }
#else
DEVICE void quotients(float (&q)[4], const float (&a)[4], const float (&b)[4]) {
  for (int i = 0; i < 4; i++) q[i] = a[i] / b[i];
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
DEVICE void warp_sums(float& a, float& b) {       // two sums whose shuffles wait for each other's results side by side
#pragma unroll
  for (int m = 16; m; m >>= 1) {
    const float x = shfl_xor(a, m), y = shfl_xor(b, m);
    a += x;
    b += y;
  }
}

// Half-split rotations of 128 channels, 4 per lane: by a row's anchor and by the start of its block, or neither.
struct Turn {
  float anchor_cos[4], anchor_sin[4], start_cos[4], start_sin[4];
};
DEVICE void load_anchor(Turn& t, const RowParams& p, int b, int lane) {
  if (!p.start_cos) return;
  load_float4(t.anchor_cos, p.anchor_cos + (long long)b * D + 4 * lane);
  load_float4(t.anchor_sin, p.anchor_sin + (long long)b * D + 4 * lane);
}
DEVICE void load_start(Turn& t, const RowParams& p, int slot, int lane) {
  if (!p.start_cos) return;
  load_float4(t.start_cos, p.start_cos + (long long)(slot / 64) * D + 4 * lane);
  load_float4(t.start_sin, p.start_sin + (long long)(slot / 64) * D + 4 * lane);
}
DEVICE void rotate(float (&x)[4], const float (&c)[4], const float (&s)[4], int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float z = shfl_xor(x[i], 16);
    x[i] = lane < 16 ? sub(mul(x[i], c[i]), mul(z, s[i])) : add(mul(x[i], c[i]), mul(z, s[i]));
  }
}
DEVICE void invert(float (&c)[4], float (&s)[4]) {   // divides by the squared length of (cos, sin)
  float norm[4], minus[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    norm[i] = fmaxf(add(mul(c[i], c[i]), mul(s[i], s[i])), 1e-12f);
    minus[i] = -s[i];
  }
  quotients(c, c, norm);
  quotients(s, minus, norm);
}
DEVICE void turn_row(float (&x)[4], Turn& t, const RowParams& p, bool back, int lane) {
  if (!p.start_cos) return;
  if (back) {
    invert(t.start_cos, t.start_sin);
    rotate(x, t.start_cos, t.start_sin, lane);
    rotate(x, t.anchor_cos, t.anchor_sin, lane);
  } else {
    invert(t.anchor_cos, t.anchor_sin);
    rotate(x, t.anchor_cos, t.anchor_sin, lane);
    rotate(x, t.start_cos, t.start_sin, lane);
  }
}

// One scale and minimum per row. Returns them as two float16.
DEVICE u32 encode_uniform(u32 (&code)[4], const float (&x)[4], float clip, int width) {
  const float top = (float)((1 << width) - 1);
  float most = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])), least = fmaxf(fmaxf(-x[0], -x[1]), fmaxf(-x[2], -x[3]));
#pragma unroll
  for (int m = 16; m; m >>= 1) {                   // both at a time: each waits for its shuffle
    const float a = shfl_xor(most, m), b = shfl_xor(least, m);
    most = fmaxf(most, a);
    least = fmaxf(least, b);
  }
  const float hi = mul(clip, most), lo = mul(clip, -least);
  const float s = through_half(quotient(sub(hi, lo), top)), base = through_half(lo), step = fmaxf(s, HALF_TINY);
  float y[4];
#pragma unroll
  for (int i = 0; i < 4; i++) y[i] = sub(x[i], base);
  const float under[4] = {step, step, step, step};
  quotients(y, y, under);
#pragma unroll
  for (int i = 0; i < 4; i++) code[i] = (u32)fminf(fmaxf(nearest_even(y[i]), 0.0f), top);
  return pack_half2(s, base);
}

// Numbers of 4 bits, one per run of 8 components: compile-time words, where a table indexed by lane would be a load.
BOTH constexpr u64 nibbles(const int (&x)[16], const int (&y)[16]) {
  u64 all = 0;
  for (int i = 0; i < 16; i++) all |= (u64)(x[i] + y[i]) << (4 * i);
  return all;
}
constexpr int NOTHING[16] = {};
constexpr u64 K_WIDTHS = nibbles(KF.width, NOTHING), K_PLACES = nibbles(KF.shift, KF.pos), K_BINS = nibbles(KF.bin, NOTHING);
constexpr u64 V_PLACES = nibbles(VF.shift, VF.pos), V_BINS = nibbles(VF.bin, NOTHING);
DEVICE int nibble(u64 all, int i) { return (int)(all >> (4 * i)) & 15; }
DEVICE float step_of(int width) { return width == 1 ? STEPS[0] : width == 2 ? STEPS[1] : width == 3 ? STEPS[2] : STEPS[3]; }
DEVICE float levels_per_unit(int width) {
  return width == 1 ? PER_UNIT[0] : width == 2 ? PER_UNIT[1] : width == 3 ? PER_UNIT[2] : PER_UNIT[3];
}
DEVICE float even_level(u32 code, int width) { return mul(step_of(width), (float)code - 0.5f * (float)((1 << width) - 1)); }

// The number of thresholds step * m, |m| < half, below x. They rise with m, so the one next to x decides.
DEVICE u32 even_code(float x, int width) {
  const float last = (float)((1 << (width - 1)) - 1);
  const float m = fminf(fmaxf(nearest_even(mul(x, levels_per_unit(width))), -last), last);   // in this order a NaN has the code 0
  return (u32)(m + last) + (x > mul(step_of(width), m) ? 1u : 0u);
}
DEVICE void encode_even(u32 (&code)[4], const float (&y)[4], float g, int width) {
  const float under[4] = {g, g, g, g};
  float x[4];
  quotients(x, y, under);
#pragma unroll
  for (int i = 0; i < 4; i++) code[i] = even_code(x[i], width);
}

// The gain for which gain * sigma * level comes closest to x.
DEVICE float fit(const float (&x)[4], const float (&sigma)[4], const u32 (&code)[4], int width) {
  float dot = 0, square = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float level = mul(even_level(code[i], width), sigma[i]);
    dot += x[i] * level;
    square += level * level;
  }
  warp_sums(dot, square);
  return through_half(quotient(dot, fmaxf(square, 1e-30f)));
}

// Codes of one row, 4 channels per lane, into the words of its slot: word t * bins + b holds the runs of bin b, of each the
// codes of channels 2 t and 2 t + 1 in its halves. Lane i gets word i.
template <int BINS> DEVICE u32 gather_words(const u32 (&c)[4], int place, int bin, int lane) {
  const u32 pair[2] = {(c[0] | c[1] << 16) << place, (c[2] | c[3] << 16) << place};
  u32 mine = 0;
#pragma unroll
  for (int i = 0; i < 4 * BINS; i++) {
    const int t = i / BINS, b = i % BINS;
    const u32 word = or_in_warp((lane & 1) == t >> 1 && bin == b ? pair[t & 1] : 0u);
    if (lane == i) mine = word;
  }
  return mine;
}
template <bool KEYS> DEVICE int word_place(int slot, int word, int lane, int bins) {
  const int q = slot & 127, sub_tile = (q & 63) / 16 * 2 + q / 64, n = 2 * bins, wide = n % 4 == 0 ? 4 : 2;
  return sub_tile * 128 * n + word / wide * 128 * wide + lane * 4 * wide + word % wide * 4;
}
DEVICE void store_key_words(unsigned char* tile, const u32 (&c)[4], int slot, int lane) {
  constexpr int bins = KF.bins;
  const u32 word = gather_words<bins>(c, nibble(K_PLACES, lane >> 1), nibble(K_BINS, lane >> 1), lane);
  const int t = lane / bins, b = lane % bins, r = slot & 15;
  if (lane < 4 * bins) *(u32*)(tile + word_place<true>(slot, (r & 1) * bins + b, (r >> 1) * 4 + t, bins)) = word;
}
DEVICE void store_value_words(unsigned char* tile, const u32 (&c)[4], int slot, int lane) {
  constexpr int bins = VF.bins;
  const u32 word = gather_words<bins>(c, nibble(V_PLACES, lane >> 1), nibble(V_BINS, lane >> 1), lane);
  const int t = lane / bins, b = lane % bins, r = slot & 15;
  if (lane >= 4 * bins) return;
#pragma unroll
  for (int hi = 0; hi < 2; hi++)                   // channels 2 t and 2 t + 1 of a run
    *(unsigned short*)(tile + word_place<false>(slot, (r & 1) * bins + b, (2 * t + hi) * 4 + (r >> 2), bins) + 2 * (r >> 1 & 1)) =
        (unsigned short)(word >> (16 * hi));
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
  if (first == last) {
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
    const u32 late = inside && score <= low ? (u32)(named + 2) : 0u, last = most_in_warp(late);
    const u32 lowest = ballot_warp(late == last);              // of equally low rows the latest leaves (kernels/selection.py)
    const int at = popcount((lowest & (0u - lowest)) - 1u);
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

constexpr int ROW_SMEM = ROW_THREADS / 64 * Z_STRIDE * 4 * (MODE == 2 ? 1 + ROW_THREADS / 128 : 0) + 16;
constexpr int LONE_STRIDE = 40, LONE_PART = 4 * LONE_STRIDE;   // sums of one warp; two banks of its columns never meet
constexpr int LONE_SMEM = MODE == 2 ? (D + PROJECT_WARPS * LONE_PART + 5 * KEY_WARPS) * 4 : 16;

DEVICE void code_value(float (&x)[4], const float (&mean)[4], const RowParams& p, long long unit, int slot, int lane) {
  u32 c[4];
  if (p.v_mean)
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = sub(x[i], mean[i]);
  if (p.value_hadamard) hadamard(x, lane);
  const u32 scale = encode_uniform(c, x, p.value_clip, VF.width[0]);
  if (lane == 0) p.v_scale[unit * p.L + slot] = scale;
  store_value_words(p.v_codes + (unit * (p.L / 128) + slot / 128) * V_BYTES, c, slot, lane);
}
DEVICE void code_key(float (&x)[4], float (&sigma)[4], const RowParams& p, long long unit, int slot, int lane) {
  u32 c[4];
  unsigned char* tile = p.k_codes + (unit * (p.L / 128) + slot / 128) * K_BYTES;
  if (MODE == 2) {
    float y[4], square = 0;
    const int width = nibble(K_WIDTHS, lane >> 1);
#pragma unroll
    for (int i = 0; i < 4; i++) sigma[i] = fmaxf(sigma[i], HALF_TINY);
    quotients(y, x, sigma);
#pragma unroll
    for (int i = 0; i < 4; i++) square += y[i] * y[i];
    float gain = root(warp_sum(square) / (float)D);
#pragma unroll 1                                       // small code: fetching instructions takes longer than the branch
    for (int n = 0; n < 2; n++) {
      encode_even(c, y, fmaxf(gain, HALF_TINY), width);
      gain = fit(x, sigma, c, width);
    }
    if (lane == 0) ((unsigned short*)p.k_scale)[unit * p.L + slot] = (unsigned short)pack_half2(gain, 0.0f);
  } else {
    if (p.key_hadamard) hadamard(x, lane);
    const u32 scale = encode_uniform(c, x, p.key_clip, KF.width[0]);
    if (lane == 0) ((u32*)p.k_scale)[unit * p.L + slot] = scale;
  }
  store_key_words(tile, c, slot, lane);
}
// The key of a row less the mean of its slot, in the basis of its block.
DEVICE void center_key(float (&x)[4], float (&t)[4], Turn& turn, const RowParams& p, int lane) {
  if (MODE == 0) return;
  if (MODE == 2) turn_row(x, turn, p, true, lane);
  else turn_row(t, turn, p, false, lane);
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = sub(x[i], t[i]);
}
DEVICE const float* mean_of_slot(const RowParams& p, int head, int slot, int lane) {
  return p.table + ((long long)head * 64 + (slot & 63)) * D + 4 * lane;
}

// Codes and stores as many (head, row) as half the warps of a block of N threads.
template <int N> DEVICE void append_unit(const RowParams& p, int unit, unsigned char* smem) {
  constexpr int ROWS = N / 64;
  const int lane = TID & 31, warp = TID >> 5, r = warp % ROWS, rows = p.B * p.S, index = unit * p.per + r;
  const bool values = warp >= ROWS, inside = r < p.per && index < p.Hkv * rows;
  const int head = inside ? index / rows : 0, row_index = inside ? index - head * rows : 0;
  const int b = row_index / p.S, s = row_index - b * p.S, slot = (int)*p.length + s;
  const bool live = inside && slot < p.L;         // what does not fit is dropped; the cache says so beforehand
  float *xs = (float*)smem, *sums = xs + ROWS * Z_STRIDE;
  uint2 row = {0, 0};
  float x[4] = {0, 0, 0, 0}, t[4] = {0, 0, 0, 0};
  Turn turn = {};
  if (live) {
    const long long* st = values ? p.v_stride : p.k_stride;
    row = load4(values ? p.v : p.k, b * st[0] + head * st[1] + s * st[2] + 4 * lane);
    if (values) {
      if (p.v_mean) load_float4(t, p.v_mean + head * D + 4 * lane);
    } else if (MODE != 0) {
      load_anchor(turn, p, b, lane);
      load_start(turn, p, slot, lane);
      load_float4(t, mean_of_slot(p, head, slot, lane));
    }
    widen(x, row, p.bf16);
  }
  if (live && !values) center_key(x, t, turn, p, lane);
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
  const long long stored = (long long)b * p.Hkv + head;
  if (values) {
    code_value(x, t, p, stored, slot, lane);
    return;
  }
  float sigma[4];
  if (MODE == 2) load_float4(sigma, p.sigma + head * D + 4 * lane);
  code_key(x, sigma, p, stored, slot, lane);
  if (head == 0 && lane == 0) p.stored_positions[(long long)b * p.L + slot] = (int)p.positions[b * p.position_row + s];
  if (p.segments) {
    const uint2 v = load4(p.v, b * p.v_stride[0] + head * p.v_stride[1] + s * p.v_stride[2] + 4 * lane);
    enter_exact(p, row, v, b, head, slot, lane);
  }
}

// Block KLT: sums of N numbers over the key's warps. `part` is written once between two barriers of other uses.
template <int N> DEVICE void key_sums(float (&v)[N], float* part, int warp, int lane) {
#pragma unroll
  for (int m = 16; m; m >>= 1)
#pragma unroll
    for (int n = 0; n < N; n++) v[n] += shfl_xor(v[n], m);
  if (lane == 0)
#pragma unroll
    for (int n = 0; n < N; n++) part[n * KEY_WARPS + warp] = v[n];
  sync_part<2, 32 * KEY_WARPS>();
#pragma unroll
  for (int n = 0; n < N; n++) {
    float sums[4];
    load_float4(sums, part + n * KEY_WARPS);
    v[n] = sums[0] + sums[1] + (sums[2] + sums[3]);
  }
}

// Block KLT: the key by four warps with one channel per lane, 8 (lane / 2) + 2 warp + lane % 2, so that a warp's words are its own.
DEVICE void append_key(const RowParams& p, int head, int b, int slot, bool live, float* xs, float* sums, int warp, int lane) {
  constexpr int BOTH_SIDES = 32 * (KEY_WARPS + PROJECT_WARPS), BINS = KF.bins;
  const int c = 8 * (lane >> 1) + 2 * warp + (lane & 1), width = nibble(K_WIDTHS, lane >> 1);
  const u32 bits = ((const unsigned short*)p.k)[b * p.k_stride[0] + head * p.k_stride[1] + c];
  const float sigma = fmaxf(p.sigma[head * D + c], HALF_TINY);
  const bool turns = p.start_cos != 0;
  float ac = 1, as = 0, sc = 1, ss = 0, mean = 0;
  if (turns) {
    ac = p.anchor_cos[b * D + c];
    as = p.anchor_sin[b * D + c];
  }
  if (live) {
    mean = p.table[((long long)head * 64 + (slot & 63)) * D + c];
    if (turns) {
      sc = p.start_cos[(long long)(slot / 64) * D + c];
      ss = p.start_sin[(long long)(slot / 64) * D + c];
    }
  }
  arrive_part<3, BOTH_SIDES>();                      // all of this is asked for: the rest of the basis may follow
  float x = p.bf16 ? bits_float(bits << 16) : half_lo(bits);
  if (turns) {
    const float norm = fmaxf(add(mul(sc, sc), mul(ss, ss)), 1e-12f), side = lane < 16 ? -1.0f : 1.0f;
    sc = quotient(sc, norm);
    ss = quotient(-ss, norm);
    x = add(mul(x, sc), mul(side * shfl_xor(x, 16), ss));
    x = add(mul(x, ac), mul(side * shfl_xor(x, 16), as));
  }
  xs[c] = sub(x, mean);
  sync_part<1, BOTH_SIDES>();
  sync_part<1, BOTH_SIDES>();
  float some[4] = {0, 0, 0, 0};
#pragma unroll
  for (int part = 0; part < PROJECT_WARPS; part++) some[part & 3] += sums[part * LONE_PART + warp * LONE_STRIDE + lane];
  if (!live) return;
  x = some[0] + some[1] + (some[2] + some[3]);
  float* over = sums + PROJECT_WARPS * LONE_PART;
  const float y = quotient(x, sigma);
  float square[1] = {y * y};
  key_sums(square, over, warp, lane);
  float gain = root(square[0] / (float)D);
  u32 code = 0;
#pragma unroll 1                                       // small code: fetching instructions takes longer than the branch
  for (int n = 0; n < 2; n++) {
    code = even_code(quotient(y, fmaxf(gain, HALF_TINY)), width);
    const float level = mul(even_level(code, width), sigma);
    float fitted[2] = {x * level, level * level};
    over += KEY_WARPS * (n + 1);
    key_sums(fitted, over, warp, lane);
    gain = through_half(quotient(fitted[0], fmaxf(fitted[1], 1e-30f)));
  }
  const long long unit = (long long)b * p.Hkv + head;
  if (warp == 0 && lane == 0) ((unsigned short*)p.k_scale)[unit * p.L + slot] = (unsigned short)pack_half2(gain, 0.0f);
  const int bin = nibble(K_BINS, lane >> 1), r = slot & 15;
  u32 mine = 0;
  code <<= nibble(K_PLACES, lane >> 1) + 16 * (lane & 1);
#pragma unroll
  for (int i = 0; i < BINS; i++) {
    const u32 word = or_in_warp(bin == i ? code : 0u);
    if (lane == i) mine = word;
  }
  unsigned char* tile = p.k_codes + (unit * (p.L / 128) + slot / 128) * K_BYTES;
  if (lane < BINS) *(u32*)(tile + word_place<true>(slot, (r & 1) * BINS + lane, (r >> 1) * 4 + warp, BINS)) = mine;
}

// Its product with the basis: rows 8 i … 8 i + 7 by warp i, four columns per lane, into the order of `append_key`.
DEVICE void project_lone(const float* matrix, const float* xs, float* sums, int warp, int lane) {
  constexpr int EACH = PROJECT_WARPS ? D / PROJECT_WARPS : 1, BOTH_SIDES = 32 * (KEY_WARPS + PROJECT_WARPS);
  const int from = warp * EACH;
  float u[EACH][4], acc[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    if (i == LONE_FIRST) sync_part<3, BOTH_SIDES>();
    load_float4(u[i], matrix + (from + i) * D + 4 * lane);
  }
  if (LONE_FIRST >= EACH) sync_part<3, BOTH_SIDES>();
  sync_part<1, BOTH_SIDES>();
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const float at = xs[from + i];
#pragma unroll
    for (int j = 0; j < 4; j++) acc[j] += at * u[i][j];
  }
  float2* to = (float2*)(sums + warp * LONE_PART + 2 * (lane & 1) * LONE_STRIDE + 2 * (lane >> 1));
  to[0] = float2{acc[0], acc[1]};
  to[LONE_STRIDE / 2] = float2{acc[2], acc[3]};
  sync_part<1, BOTH_SIDES>();
}

// The only new row of sequence CTA_Y, head CTA_X, by one block. Latency is all: what depends on nothing is asked for first, then
// what depends on the length; the basis, 64 KB, is on its way while the key is turned.
DEVICE void append_lone(const RowParams& p, unsigned char* smem) {
  const int lane = TID & 31, warp = TID >> 5, head = CTA_X, b = CTA_Y;
  float *xs = (float*)smem, *sums = xs + D;
  if (MODE == 2 && warp > KEY_WARPS) {
    project_lone(p.basis + (long long)head * D * D, xs, sums, warp - KEY_WARPS - 1, lane);
    return;
  }
  const int slot = (int)*p.length;
  const bool live = slot < p.L;                      // what does not fit is dropped; the cache says so beforehand
  const long long stored = (long long)b * p.Hkv + head;
  const auto fresh = [&](const void* rows, const long long* stride) { return load4(rows, b * stride[0] + head * stride[1] + 4 * lane); };
  float x[4], t[4] = {0, 0, 0, 0};
  if (warp == KEY_WARPS) {
    const uint2 row = fresh(p.v, p.v_stride);
    if (p.v_mean) load_float4(t, p.v_mean + head * D + 4 * lane);
    widen(x, row, p.bf16);
    if (!live) return;
    code_value(x, t, p, stored, slot, lane);
    if (head == 0 && lane == 0) p.stored_positions[(long long)b * p.L + slot] = (int)p.positions[b * p.position_row];
    return;
  }
  if (MODE == 2) {
    append_key(p, head, b, slot, live, xs, sums, warp, lane);
    if (!live || warp) return;
  } else {
    Turn turn = {};
    const uint2 row = fresh(p.k, p.k_stride);
    if (MODE != 0) load_anchor(turn, p, b, lane);
    if (!live) return;
    if (MODE != 0) {
      load_start(turn, p, slot, lane);
      load_float4(t, mean_of_slot(p, head, slot, lane));
    }
    widen(x, row, p.bf16);
    center_key(x, t, turn, p, lane);
    code_key(x, t, p, stored, slot, lane);
  }
  if (p.segments) enter_exact(p, fresh(p.k, p.k_stride), fresh(p.v, p.v_stride), b, head, slot, lane);
}

#ifndef KVSINK_EMULATE
extern "C" __device__ const int kvsink_launch[4] = {THREADS, SMEM_BYTES, ROW_THREADS, LONE_THREADS};   // what the host must ask for
#endif
KERNEL(LONE_THREADS) append_row(ARGUMENT(RowParams) p) {
  BLOCK_MEMORY(LONE_SMEM)
  append_lone(p, smem);
}

KERNEL(ROW_THREADS, 2) append_rows(ARGUMENT(RowParams) p) {
  BLOCK_MEMORY(ROW_SMEM)
  append_unit<ROW_THREADS>(p, CTA_X, smem);
}

KERNEL(ROW_THREADS, 2) decode_rows(ARGUMENT(RowParams) p) {
  BLOCK_MEMORY(ROW_SMEM)
  constexpr int ROWS = ROW_THREADS / 64;
  const int lane = TID & 31, warp = TID >> 5, head = CTA_Y, r = warp % ROWS, index = CTA_X * ROWS + r;
  const bool values = warp >= ROWS, live = index < p.B * p.S;
  const int b = live ? index / p.S : 0, s = live ? index - b * p.S : 0, slot = p.first + s;
  float *xs = (float*)smem, *sums = xs + ROWS * Z_STRIDE;
  const long long at = ((long long)b * p.Hkv + head) * p.L + slot, tile = ((long long)b * p.Hkv + head) * (p.L / 128) + slot / 128;
  float x[4], t[4] = {0, 0, 0, 0};
  Turn turn = {};
  if (values) {
    const u32 scale = p.v_scale[at];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = add(mul((float)read_value_code(p.v_codes + tile * V_BYTES, slot, 4 * lane + i), half_lo(scale)), half_hi(scale));
    if (p.value_hadamard) hadamard(x, lane);
    if (p.v_mean) load_float4(t, p.v_mean + head * D + 4 * lane);
  } else {
    if (MODE != 0) {
      load_float4(t, mean_of_slot(p, head, slot, lane));
      if (MODE == 1) {
        load_anchor(turn, p, b, lane);
        load_start(turn, p, slot, lane);
      }
    }
    if (MODE == 2) {
      const float gain = half_lo(((const unsigned short*)p.k_scale)[at]);
      float sigma[4];
      load_float4(sigma, p.sigma + head * D + 4 * lane);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 code = read_key_code(p.k_codes + tile * K_BYTES, slot, 4 * lane + i);
        xs[r * Z_STRIDE + 4 * lane + i] = mul(mul(even_level(code, nibble(K_WIDTHS, lane >> 1)), sigma[i]), gain);
      }
    } else {
      const u32 scale = ((const u32*)p.k_scale)[at];
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = add(mul((float)read_key_code(p.k_codes + tile * K_BYTES, slot, 4 * lane + i), half_lo(scale)), half_hi(scale));
      if (p.key_hadamard) hadamard(x, lane);
      if (MODE == 1) turn_row(t, turn, p, false, lane);
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
  if (MODE == 2 && !values) {
    load_anchor(turn, p, b, lane);
    load_start(turn, p, slot, lane);
    turn_row(x, turn, p, false, lane);
  }
  if (live) {
    const long long* st = values ? p.v_stride : p.k_stride;
    write4((void*)(values ? p.v : p.k), b * st[0] + head * st[1] + s * st[2] + 4 * lane, x, p.bf16);
  }
}
#endif
