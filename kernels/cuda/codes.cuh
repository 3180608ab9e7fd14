// Decode attention over codes that are rows of bytes (kernels/cuda/rows_of_bytes.py): levels are looked up in shared memory, in 16 bit.
//
// Formula    out = softmax(scale q.K^ + mean) V^ of one split of the slots of one key-value head; parts are merged by another launch
// Work       a warp takes windows of 64 slots that it copies for itself, two tiles of 16 slots at a time; four warps share a product with
//            the basis where keys are restored one by one (DENSE)
// Order      rows of an operand of 16 slots are exchanged (`slot_of`), so that rows are read without bank conflicts; channels stand in
//            the order in which a byte gives them (`channel`), and the query, the mean and the angles come in the same order
// Needs      sm_90a. No header is included, so NVRTC compiles it as it is.
#ifndef KVSINK_CODES
#define KVSINK_CODES

#ifndef HEADS_PER_KV
#define HEADS_PER_KV 4
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef KEY_RUNS
#define KEY_RUNS 0            // 1: runs of 8 components of the widths KW, by pairs; 0: a byte is KEY_COUPLE channels
#define KEY_COUPLE 4
#endif
#ifndef KW
#define KW 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2
#endif
#ifndef KEY_COUPLE
#define KEY_COUPLE 4
#endif
#ifndef KEY_BOOKS
#define KEY_BOOKS 1           // 1: every group of channels has its table; 0: one table
#endif
#ifndef KEY_SCALES
#define KEY_SCALES 0          // numbers beside a row: 0, 1 a gain, 2 step and lowest, 3 step and zero
#endif
#ifndef VALUE_COUPLE
#define VALUE_COUPLE 4
#endif
#ifndef VALUE_BOOKS
#define VALUE_BOOKS 1
#endif
#ifndef VALUE_SCALES
#define VALUE_SCALES 0
#endif
#ifndef DENSE
#define DENSE 0               // 1: keys before RoPE, restored and rotated one by one; 0: the query comes in the codes' basis
#endif
#ifndef BASIS
#define BASIS 0               // DENSE: 1 when levels go through a basis
#endif
#ifndef MEAN
#define MEAN 0                // 1: keys have a mean, whose logits come from a table of 64 offsets
#endif
#ifndef STARTS
#define STARTS 1              // 0: positions do not matter
#endif

struct Codes {
  const void* q;              // [B, Hkv * R, 128] fp16 or bf16, rotary applied
  const unsigned char* k_codes;   // rows of KEY_BYTES
  const unsigned short* k_scale;  // rows of fp16 numbers
  const unsigned char* v_codes;
  const unsigned short* v_scale;
  const int* positions;       // [B, position_row]
  const long long* new_positions; // [B, new_row] positions of the new rows, or null where `positions` has them already
  const long long* length;
  const unsigned char* mask;  // [B, mask_row] 1 where a slot is visible, or null
  const void* exact_k;        // [B, Hkv, E, 128] in the dtype of q
  const void* exact_v;
  const int* exact_slot;      // [B, E]
  const void* recent_k;       // [B, Hkv, ring, 128]
  const void* recent_v;
  const int* recent_slot;     // [ring]
  const void* new_k;          // [B, Hkv, 1, 128]
  const void* new_v;
  const void* k_levels;       // tables of fp16
  const void* v_levels;
  const u32* basis;           // DENSE: [Hkv, 128 * 64] as `wide_product` takes it; else [Hkv, 8, 8, 32, 4] A fragments of U^T, or null
  const u32* mean;            // [Hkv, 64, 64] rows of offsets, swizzled
  const u32* offsets;         // DENSE: [64, 64] cosines and sines of offsets, swizzled
  const u32* angles;          // [blocks, 64] cosines and sines of block starts; the last are NaN, for those behind them
  u32* rotated;                // [B * Hkv, blocks, 256] the query of each block in the codes' basis, B fragments
  float* part_acc;            // [B * Hkv, splits + 1, R, 128]
  float* part_top;            // [B * Hkv, splits + 1, R], powers of two
  float* part_mass;
  const float* value_mean;    // [Hkv, 128] or null
  void* out;                  // [B * Hkv, R, 128] in the dtype of q
  long long k_codes_b, k_codes_h, k_scale_b, k_scale_h, v_codes_b, v_codes_h, v_scale_b, v_scale_h;   // bytes, halves
  long long position_row, mask_row, k_levels_h, v_levels_h, basis_h, new_row;                         // elements; tables in bytes
  int Hkv, slots, splits, blocks, angle_rows, E, ring, window, strict, by_block, q_bf16, heads, value_hadamard;   // heads: B * Hkv
  int merge_warps;            // that share the parts of a query head: 1, 2, 4 or 8
  float scale;                // softmax scale times log2(e)
};

constexpr int R = HEADS_PER_KV, WINDOW = 64, THREADS = WARPS * 32;
constexpr int RUN_WIDTH[16] = {KW};
BOTH constexpr int sum_of(const int (&w)[16], int n) { int s = 0; for (int i = 0; i < n; i++) s += w[i]; return s; }
constexpr int KEY_BYTES = KEY_RUNS ? sum_of(RUN_WIDTH, 16) : D / KEY_COUPLE, VALUE_BYTES = D / VALUE_COUPLE;
constexpr int KEY_WORDS = KEY_BYTES / 4, KEY_NUMBERS = KEY_SCALES > 1 ? 2 : KEY_SCALES, VALUE_NUMBERS = VALUE_SCALES > 1 ? 2 : VALUE_SCALES;
static_assert(KEY_BYTES % 4 == 0 && R <= 4, "rows of words, at most four query heads");

constexpr int KEY_TABLE = KEY_RUNS ? 2048 : (KEY_BOOKS ? D / KEY_COUPLE : 1) * 256 * KEY_COUPLE * 2;
constexpr int VALUE_SOURCE = (VALUE_BOOKS ? D / VALUE_COUPLE : 1) * 256 * VALUE_COUPLE * 2;
constexpr int VALUE_COPIES = VALUE_COUPLE == 2 && !VALUE_BOOKS ? 32 : 1;   // one for every lane: no bank is asked twice
constexpr int VALUE_TABLE = VALUE_SOURCE * VALUE_COPIES;
constexpr int ROTATES = DENSE || MEAN;            // the raw query, rotated to block starts, is needed
constexpr int OFF_BASIS = 0, OFF_KEYS = OFF_BASIS + (DENSE && BASIS ? 32768 : 0), OFF_VALUES = OFF_KEYS + KEY_TABLE;
constexpr int OFF_MEAN = OFF_VALUES + VALUE_TABLE, OFF_OFFSETS = OFF_MEAN + (MEAN ? 16384 : 0), OFF_RAW = OFF_OFFSETS + (DENSE ? 16384 : 0);
constexpr int RAW_ROW = 80;                     // bytes of one head and lane: 64, padded against bank conflicts
constexpr int OFF_STAGES = OFF_RAW + (ROTATES ? 16 * RAW_ROW + 64 - 16 * RAW_ROW % 64 : 0);
constexpr int IN_VALUES = WINDOW * KEY_BYTES, IN_KEY_SCALES = IN_VALUES + WINDOW * VALUE_BYTES, IN_VALUE_SCALES = IN_KEY_SCALES + WINDOW * KEY_NUMBERS * 2;
constexpr int STAGE = IN_VALUE_SCALES + WINDOW * VALUE_NUMBERS * 2;
constexpr int PART = 130;                       // floats per head: channels, largest logit, sum of weights
constexpr int AT_END = WARPS * R * PART * 4;    // the warps' parts, where the stages were
constexpr int STAGES_BYTES = WARPS * STAGES * STAGE > AT_END ? WARPS * STAGES * STAGE : AT_END;
constexpr int OFF_BARRIERS = (OFF_STAGES + STAGES_BYTES + 7) / 8 * 8;
constexpr int SHARED_BYTES = OFF_BARRIERS + 8 * (WARPS * STAGES + 1);
static_assert(SHARED_BYTES <= SHARED_MOST, "more shared memory than a block can have");

constexpr float LIFT = 4.0f;                    // log2: how far a logit may pass the reference of its softmax

// Channel of half e of word i of lane t, for codes of which a byte holds `couple` channels.
BOTH constexpr int channel(int couple, int i, int t, int e) {
  return couple == 4 ? 16 * (i >> 1) + 4 * t + 2 * (i & 1) + e : couple == 8 ? 32 * (i >> 2) + 8 * t + 2 * (i & 3) + e : 8 * i + 2 * t + e;
}
constexpr int RAW_ORDER = DENSE && !BASIS && !KEY_RUNS ? KEY_COUPLE : 2;

DEVICE int slot_of(int g) { return g & 1 ? 4 + (((g >> 1) + 1) & 3) : g >> 1; }   // of row g of 8
DEVICE int slot_of_inner(int n, int t) { return 4 * n + (n & 1 ? (t + 1) & 3 : t); }   // of rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9
template <int N> DEVICE void row_words(u32 (&w)[N], const unsigned char* row) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
      const uint4 v = ((const uint4*)row)[i];
      w[4 * i] = v.x; w[4 * i + 1] = v.y; w[4 * i + 2] = v.z; w[4 * i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) w[i] = ((const u32*)row)[i];
  }
}

TABLE int RUN_TABLE[5] = {0, 1344, 1280, 1024, 0};   // where pairs of levels of each width begin: 4^width of them

// The two levels of components 2 t and 2 t + 1 of a run, by its bits in a row.
template <int RUN> DEVICE u32 run_pair(const u32 (&w)[KEY_WORDS], const unsigned char* table, int t) {
  constexpr int width = RUN_WIDTH[RUN], at = sum_of(RUN_WIDTH, RUN), word = at / 4, bit = at % 4 * 8;
  if constexpr (width == 0) {
    return 0;
  } else {
    u32 x;
    if constexpr (bit + 8 * width <= 32) x = w[word] >> (bit + 2 * width * t);
    else x = funnel_right(w[word], w[word + 1 < KEY_WORDS ? word + 1 : word], bit) >> (2 * width * t);
    return *(const u32*)(table + RUN_TABLE[width] + 4 * (x & ((1u << 2 * width) - 1)));
  }
}

// Words i = 2 KS and 2 KS + 1 of a row of keys: channels of step KS of a product.
template <int KS> DEVICE void key_pair(u32& a, u32& b, const u32 (&w)[KEY_WORDS], const unsigned char* table, int t) {
  if constexpr (KEY_RUNS) {
    a = run_pair<2 * KS>(w, table, t);
    b = run_pair<2 * KS + 1>(w, table, t);
  } else if constexpr (KEY_COUPLE == 4) {
    const u32 code = w[KS] >> 8 * t & 255;
    const uint2 v = *(const uint2*)(table + (KEY_BOOKS ? (4 * KS + t) * 2048 : 0) + 8 * code);
    a = v.x; b = v.y;
  } else if constexpr (KEY_COUPLE == 8) {
    const u32 code = w[KS / 2] >> 8 * t & 255;
    const uint2 v = *(const uint2*)(table + (KEY_BOOKS ? (4 * (KS / 2) + t) * 4096 : 0) + 16 * code + 8 * (KS & 1));
    a = v.x; b = v.y;
  } else {
    const u32 c0 = w[2 * KS] >> 8 * t & 255, c1 = w[2 * KS + 1] >> 8 * t & 255;
    a = *(const u32*)(table + (KEY_BOOKS ? (8 * KS + t) * 1024 : 0) + 4 * c0);
    b = *(const u32*)(table + (KEY_BOOKS ? (8 * KS + 4 + t) * 1024 : 0) + 4 * c1);
  }
}

// All levels of 16 slots as A fragments.
template <int KS> struct Levels {
  DEVICE_STATIC void run(u32 (&a)[8][4], const u32 (&lo)[KEY_WORDS], const u32 (&hi)[KEY_WORDS], const unsigned char* table, int t) {
    Levels<KS - 1>::run(a, lo, hi, table, t);
    key_pair<KS - 1>(a[KS - 1][0], a[KS - 1][2], lo, table, t);
    key_pair<KS - 1>(a[KS - 1][1], a[KS - 1][3], hi, table, t);
  }
};
template <> struct Levels<0> {
  DEVICE_STATIC void run(u32 (&)[8][4], const u32 (&)[KEY_WORDS], const u32 (&)[KEY_WORDS], const unsigned char*, int) {}
};
// Logits of two tiles, level by level.
template <int KS> struct Products {
  DEVICE_STATIC void run(float (&s)[2][4], const u32 (&w)[4][KEY_WORDS], const u32 (&q)[16], const unsigned char* table, int t) {
    Products<KS - 1>::run(s, w, q, table, t);
    constexpr int k = KS - 1;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      u32 a[4];
      key_pair<k>(a[0], a[2], w[2 * i], table, t);
      key_pair<k>(a[1], a[3], w[2 * i + 1], table, t);
      mma(s[i], a[0], a[1], a[2], a[3], q[2 * k], q[2 * k + 1]);
    }
  }
};
template <> struct Products<0> {
  DEVICE_STATIC void run(float (&)[2][4], const u32 (&)[4][KEY_WORDS], const u32 (&)[16], const unsigned char*, int) {}
};

// Words 4 n … 4 n + 3 of lane t in the row of an offset.
DEVICE uint4 offset_words(const unsigned char* table, int offset, int t, int n) {
  return *(const uint4*)(table + offset * 256 + ((n ^ (offset >> 2 & 1)) << 6) + t * 16);
}

// Rows of 16 slots, rotated by their offsets; words i and i + 8 are the two halves of rotary pairs.
DEVICE void rotate_rows(u32 (&a)[8][4], const unsigned char* table, const int (&offset)[2], int t) {
#pragma unroll
  for (int row = 0; row < 2; row++)
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const uint4 c = offset_words(table, offset[row], t, n), s = offset_words(table, offset[row], t, n + 2);
      const u32 cv[4] = {c.x, c.y, c.z, c.w}, sv[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int i = 4 * n + j;
        u32 &lo = a[i >> 1][2 * (i & 1) + row], &hi = a[(i >> 1) + 4][2 * (i & 1) + row];
        const u32 x = lo, y = hi;
        lo = hfma2(y ^ 0x80008000u, sv[j], hmul2(x, cv[j]));
        hi = hfma2(x, sv[j], hmul2(y, cv[j]));
      }
    }
}

// The raw query, rotated back to the start of a block: B fragments whose columns 0-3 and 4-7 are the heads.
DEVICE void rotate_query(u32 (&rq)[16], const Codes& p, const unsigned char* smem, int block, int lane) {
  const uint4* raw = (const uint4*)(smem + OFF_RAW + ((lane >> 2 & 3) * 4 + (lane & 3)) * RAW_ROW);
  const uint4* angle = (const uint4*)(p.angles + (long long)block * 64) + (lane & 3);
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const uint4 a = raw[n], b = raw[n + 2], c = angle[4 * n], s = angle[4 * n + 8];
    const u32 av[4] = {a.x, a.y, a.z, a.w}, bv[4] = {b.x, b.y, b.z, b.w}, cv[4] = {c.x, c.y, c.z, c.w}, sv[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      rq[4 * n + k] = hfma2(bv[k], sv[k], hmul2(av[k], cv[k]));
      rq[4 * n + k + 8] = hfma2(av[k] ^ 0x80008000u, sv[k], hmul2(bv[k], cv[k]));
    }
  }
}
DEVICE void rotated_query(u32 (&q)[16], const Codes& p, long long bh, int block, int lane) {
  const uint4* from = (const uint4*)(p.rotated + (bh * p.blocks + block) * 256) + ((lane >> 2 & 3) * 4 + (lane & 3)) * 4;
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const uint4 v = from[n];
    q[4 * n] = v.x; q[4 * n + 1] = v.y; q[4 * n + 2] = v.z; q[4 * n + 3] = v.w;
  }
}
// Sums over the channels of this lane's two heads of a logit, of 16-bit numbers.
DEVICE void query_sums(float (&sum)[2], const u32 (&q)[16], int lane) {
  float s = 0;
#pragma unroll
  for (int i = 0; i < 16; i++) s += half_lo(q[i]) + half_hi(q[i]);
  s += shfl_xor(s, 1);
  s += shfl_xor(s, 2);
  const int head = 2 * (lane & 1);
#pragma unroll
  for (int e = 0; e < 2; e++) sum[e] = bits_float((u32)shfl_int((int)float_bits(s), 4 * (head + e)));
}

// Blocks of 64 positions that a row's first slot lies behind position 0.
DEVICE int first_block(const Codes& p, int b) {
  const int first = (int)*p.length;
  const int begins = (p.new_positions ? (int)p.new_positions[b * p.new_row] : p.positions[b * p.position_row + first]) - first;
  return begins > 0 ? begins >> 6 : 0;
}

struct Softmax {                                // of one warp; columns 0-3 and 4-7 are the heads of even and odd tiles
  float o[8][4], m[2], l[2], z[2];
  bool fresh;
};

// Rows in 16 bit of one query head, a lane holds channels 4 lane …; into slot `splits` of the parts.
DEVICE void attend_exact(const Codes& p, int b, int head, int hq, int lane) {
  constexpr int MANY = 4;
  const long long pair = (long long)b * p.Hkv + head;
  const int first = (int)*p.length, rows = p.E + p.ring + (p.strict ? 0 : 1);
  float q[4], o[4] = {0, 0, 0, 0}, top = NEG_INF, mass = 0;
  widen(q, load_raw(p.q, (pair * R + hq) * D + 4 * lane), p.q_bf16);
  for (int r0 = 0; r0 < rows; r0 += MANY) {
    Raw k[MANY], v[MANY];
    bool seen[MANY];
#pragma unroll
    for (int j = 0; j < MANY; j++) {
      const int r = r0 + j;
      const bool exact = r < p.E, recent = !exact && r < p.E + p.ring;
      int slot = -1;
      if (r < rows) slot = exact ? p.exact_slot[b * p.E + r] : recent ? p.recent_slot[r - p.E] : first;
      seen[j] = slot >= 0;
      if (recent) seen[j] = seen[j] && slot > first - p.window && (p.strict ? slot <= first : slot < first);
      if (!exact && seen[j])
        for (int e = 0; e < p.E; e++) seen[j] = seen[j] && p.exact_slot[b * p.E + e] != slot;
      if (p.mask && seen[j]) seen[j] = p.mask[b * p.mask_row + slot];
      k[j] = v[j] = Raw{};
      if (seen[j]) {
        const long long at = (exact ? pair * p.E + r : recent ? pair * p.ring + r - p.E : pair) * D + 4 * lane;
        k[j] = load_raw(exact ? p.exact_k : recent ? p.recent_k : p.new_k, at);
        v[j] = load_raw(exact ? p.exact_v : recent ? p.recent_v : p.new_v, at);
      }
    }
#pragma unroll
    for (int j = 0; j < MANY; j++) {
      if (!seen[j]) continue;
      float x[4], y[4];
      widen(x, k[j], p.q_bf16);
      widen(y, v[j], p.q_bf16);
      const float s = warp_sum(q[0] * x[0] + q[1] * x[1] + q[2] * x[2] + q[3] * x[3]) * p.scale;
      const float peak = fmaxf(top, s), fade = exp2_fast(top - peak), w = exp2_fast(s - peak);
      mass = mass * fade + w;
      top = peak;
#pragma unroll
      for (int i = 0; i < 4; i++) o[i] = o[i] * fade + w * y[i];
    }
  }
  const long long at = (pair * (p.splits + 1) + p.splits) * R + hq;
  *(float4*)(p.part_acc + at * D + 4 * lane) = float4{o[0], o[1], o[2], o[3]};
  if (lane == 0) {
    p.part_top[at] = mass > 0 ? top : bits_float(0xff800000u);
    p.part_mass[at] = mass;
  }
}

// Where the windows of a warp come from.
struct Source {
  const unsigned char *k, *v;
  const unsigned short *ks, *vs;
};
DEVICE void request(const Codes& p, const Source& from, int window, int lane, unsigned char* stage, u64* bar) {
  if (!copies(lane)) return;
  const int left = p.slots - window * WINDOW, rows = left < WINDOW ? left : WINDOW;
  copies_begin(bar, rows * (KEY_BYTES + VALUE_BYTES + 2 * KEY_NUMBERS + 2 * VALUE_NUMBERS));
  const long long at = (long long)window * WINDOW;
  copy(stage, from.k + at * KEY_BYTES, rows * KEY_BYTES, bar, lane);
  copy(stage + IN_VALUES, from.v + at * VALUE_BYTES, rows * VALUE_BYTES, bar, lane);
  if (KEY_NUMBERS) copy(stage + IN_KEY_SCALES, from.ks + at * KEY_NUMBERS, rows * KEY_NUMBERS * 2, bar, lane);
  if (VALUE_NUMBERS) copy(stage + IN_VALUE_SCALES, from.vs + at * VALUE_NUMBERS, rows * VALUE_NUMBERS * 2, bar, lane);
  copies_end(bar);
}

// Values of 16 slots, weighted.
DEVICE void add_values(float (&o)[8][4], const unsigned char* rows, const unsigned char* table, u32 p0, u32 p1, int g, int t) {
  constexpr int MINE = VALUE_BYTES / 8, HALF = VALUE_COUPLE / 2;   // bytes of this lane in a row
  u32 w[4][(MINE + 3) / 4];
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const unsigned char* at = rows + slot_of_inner(n, t) * VALUE_BYTES + g * MINE;
    if constexpr (MINE == 2) w[n][0] = *(const unsigned short*)at;
    else if constexpr (MINE == 4) w[n][0] = *(const u32*)at;
    else { const uint2 x = *(const uint2*)at; w[n][0] = x.x; w[n][1] = x.y; }
  }
#pragma unroll
  for (int j = 0; j < MINE; j++) {
    u32 x[4][HALF];
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const u32 code = w[n][j / 4] >> 8 * (j % 4) & 255;
      const unsigned char* at = table + (VALUE_BOOKS ? (g * MINE + j) * (512 * VALUE_COUPLE) : 0) + 2 * VALUE_COUPLE * VALUE_COPIES * code +
                                (VALUE_COPIES > 1 ? 16 * g + 4 * t : 0);
      if constexpr (HALF == 1) x[n][0] = *(const u32*)at;
      else if constexpr (HALF == 2) { const uint2 y = *(const uint2*)at; x[n][0] = y.x; x[n][1] = y.y; }
      else { const uint4 y = *(const uint4*)at; x[n][0] = y.x; x[n][1] = y.y; x[n][2] = y.z; x[n][3] = y.w; }
    }
#pragma unroll
    for (int i = 0; i < HALF; i++)
      mma(o[j * HALF + i], pick_bytes(x[0][i], x[1][i], 0x5410), pick_bytes(x[0][i], x[1][i], 0x7632), pick_bytes(x[2][i], x[3][i], 0x5410),
          pick_bytes(x[2][i], x[3][i], 0x7632), p0, p1);
  }
}

// The 32 slots at `half` of a window into the running softmax. live: of these slots; place: of slot 32 half + lane.
DEVICE void half_window(Softmax& st, const Codes& p, const unsigned char* stage, const unsigned char* smem, u32 (&q)[16], u32 (&rq)[16],
                        float (&sums)[2], int& current, long long bh, int base, int half, u32 live, int place, bool has, int lane) {
  const int g = lane >> 2, t = lane & 3, odd = t >> 1, mine = slot_of(g);
  const unsigned char* keys = stage + 32 * half * KEY_BYTES;
  int offset[2][2], block[2][2];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int x = STARTS ? shfl_int(place, 16 * i + 8 * row + mine) : 0;
      offset[i][row] = x & 63;
      block[i][row] = x >> 6;
    }
  float s[2][4], u[2][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) { s[i][e] = bits_float(0x7fc00000u); u[i][e] = 0; }   // where no query stands
  const bool visible = live >> lane & 1;
  const int low = STARTS ? (int)least_in_warp(visible ? place >> 6 : 0x7fffffff) : 0;
  int high = STARTS ? (int)most_in_warp(visible ? place >> 6 : 0) : 0;
  high = high < p.blocks ? high : p.blocks - 1;
  const auto come_to = [&](int at) {              // the query of another block
    if (at == current) return;
    current = at;
    const int row = base + at;
    if (ROTATES) rotate_query(rq, p, smem, row < p.angle_rows ? row : p.angle_rows - 1, lane);
    if (!DENSE) rotated_query(q, p, bh, at, lane);
    if (!DENSE && KEY_SCALES > 1) query_sums(sums, q, lane);
  };
  const auto mean_logits = [&](float (&m)[4], const int (&offset)[2]) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const uint4 lo = offset_words(smem + OFF_MEAN, offset[0], t, n), hi = offset_words(smem + OFF_MEAN, offset[1], t, n);
      mma(m, lo.x, hi.x, lo.y, hi.y, rq[4 * n], rq[4 * n + 1]);
      mma(m, lo.z, hi.z, lo.w, hi.w, rq[4 * n + 2], rq[4 * n + 3]);
    }
  };
  const auto keep = [&](int i, int at, const float (&x)[4], const float (&m)[4]) {
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (block[i][e >> 1] == at) { s[i][e] = x[e]; u[i][e] = m[e]; }
  };
  if constexpr (DENSE) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      u32 a[8][4];
      {
        u32 lo[KEY_WORDS], hi[KEY_WORDS];
        row_words(lo, keys + (16 * i + mine) * KEY_BYTES);
        row_words(hi, keys + (16 * i + mine + 8) * KEY_BYTES);
        Levels<8>::run(a, lo, hi, smem + OFF_KEYS, t);
      }
      if constexpr (BASIS) {
        float y[16][4];
        wide_product(y, a, smem + OFF_BASIS);
#pragma unroll
        for (int n = 0; n < 16; n++)
#pragma unroll
          for (int row = 0; row < 2; row++) a[n >> 1][2 * (n & 1) + row] = pack_half2(y[n][2 * row], y[n][2 * row + 1]);
      }
      if (!has || !live) continue;
      rotate_rows(a, smem + OFF_OFFSETS, offset[i], t);
#pragma unroll 1
      for (int at = low; at <= high; at++) {
        come_to(at);
        float x[2][4] = {}, m[4] = {};             // two chains
#pragma unroll
        for (int k = 0; k < 8; k++) mma(x[k & 1], a[k][0], a[k][1], a[k][2], a[k][3], rq[2 * k], rq[2 * k + 1]);
        if (MEAN) mean_logits(m, offset[i]);
#pragma unroll
        for (int e = 0; e < 4; e++) x[0][e] += x[1][e];
        keep(i, at, x[0], m);
      }
    }
    if (!has || !live) return;
  } else {
    if (!live) return;
#pragma unroll 1
    for (int at = low; at <= high; at++) {
      come_to(at);
      float x[2][4] = {}, m[2][4] = {};
      u32 w[4][KEY_WORDS];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        row_words(w[i], keys + (8 * i + mine) * KEY_BYTES);
#pragma unroll
        for (int j = 0; j < KEY_WORDS; j++) in_place(w[i][j]);   // else all levels of all rows are prepared first, and registers run out
      }
      Products<8>::run(x, w, q, smem + OFF_KEYS, t);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (MEAN) mean_logits(m[i], offset[i]);
        keep(i, at, x[i], m[i]);
      }
    }
  }
  // this lane's numbers: rows g and g + 8 of the tile `odd`, two heads
  float x[4];
  const unsigned char* scales = stage + IN_KEY_SCALES + (32 * half + 16 * odd + mine) * KEY_NUMBERS * 2;
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float gain = 1, shift = 0;
    if (KEY_SCALES == 1) gain = half_lo(*(const unsigned short*)(scales + row * 8 * 2));
    if (KEY_SCALES > 1) {
      const u32 v = *(const u32*)(scales + row * 8 * 4);
      gain = half_lo(v);
      shift = KEY_SCALES == 3 ? -half_hi(v) * gain : half_hi(v);
    }
    const bool seen = live >> (16 * odd + mine + 8 * row) & 1;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int n = 2 * row + e;
      x[n] = gain * (odd ? s[1][n] : s[0][n]) + (odd ? u[1][n] : u[0][n]);
      if (KEY_SCALES > 1) x[n] += sums[e] * shift;
      x[n] = seen ? x[n] - st.m[e] : NEG_INF;
    }
  }
  float top[2] = {fmaxf(x[0], x[2]), fmaxf(x[1], x[3])};
  if (st.fresh || any_lane(fmaxf(top[0], top[1]) > LIFT)) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
#pragma unroll
      for (int mask = 2; mask < 32; mask <<= 1) top[e] = fmaxf(top[e], shfl_xor(top[e], mask));
      const bool moves = st.fresh || top[e] > LIFT;
      const float by = moves ? top[e] : 0.0f, fade = st.fresh ? 0.0f : exp2_fast(-by);
      st.m[e] += by;
      st.l[e] *= fade;
      st.z[e] *= fade;
      x[e] -= by;
      x[e + 2] -= by;
#pragma unroll
      for (int i = 0; i < 8; i++) { st.o[i][e] *= fade; st.o[i][e + 2] *= fade; }
    }
    st.fresh = false;
  }
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float gain = 1, shift = 0;
    const unsigned char* at = stage + IN_VALUE_SCALES + (32 * half + 16 * odd + mine + 8 * row) * VALUE_NUMBERS * 2;
    if (VALUE_SCALES == 1) gain = half_lo(*(const unsigned short*)at);
    if (VALUE_SCALES > 1) {
      const u32 v = *(const u32*)at;
      gain = half_lo(v);
      shift = VALUE_SCALES == 3 ? -half_hi(v) * gain : half_hi(v);
    }
    if (!(live >> (16 * odd + mine + 8 * row) & 1)) gain = shift = 0;   // what was never written may be anything
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float w = exp2_fast(x[2 * row + e]);
      st.l[e] += w;
      if (VALUE_SCALES > 1) st.z[e] += w * shift;
      x[2 * row + e] = w * gain;
    }
  }
  const u32 b0 = transpose8x8(pack_half2(x[0], x[1])), b1 = transpose8x8(pack_half2(x[2], x[3]));
  const u32 even = g < 4 ? 0xffffffffu : 0u;     // columns 0-3 belong to the even tile, 4-7 to the odd one
  const unsigned char* values = stage + IN_VALUES + 32 * half * VALUE_BYTES;
  add_values(st.o, values, smem + OFF_VALUES, b0 & even, b1 & even, g, t);
  add_values(st.o, values + 16 * VALUE_BYTES, smem + OFF_VALUES, b0 & ~even, b1 & ~even, g, t);
}

KERNEL(THREADS, 1) attend_codes(ARGUMENT(Codes) p) {
  LAUNCH_MEMORY
  const int lane = TID & 31, warp = TID >> 5, split = CTA_X, b = CTA_Y / p.Hkv, head = CTA_Y % p.Hkv;
  const long long bh = CTA_Y;
  u64* tables = (u64*)(smem + OFF_BARRIERS);
  u64* full = tables + 1 + warp * STAGES;
  if (TID == 0) {
    barrier_init(tables, COPIERS);
    for (int i = 0; i < WARPS * STAGES; i++) barrier_init(tables + 1 + i, COPIERS);
    barrier_init_fence();
  }
  const int first = (int)*p.length, past = p.strict ? first + 1 : first;
  const int windows = (past + WINDOW - 1) / WINDOW, per = (windows + p.splits - 1) / p.splits;
  const int from = split * per, to = from + per < windows ? from + per : windows;
  sync_cta();
  const Source source = {p.k_codes + b * p.k_codes_b + head * p.k_codes_h, p.v_codes + b * p.v_codes_b + head * p.v_codes_h,
                         p.k_scale + b * p.k_scale_b + head * p.k_scale_h, p.v_scale + b * p.v_scale_b + head * p.v_scale_h};
  unsigned char* stages = smem + OFF_STAGES + warp * STAGES * STAGE;
  for (int i = 0; i < STAGES; i++)
    if (from + warp + WARPS * i < to) request(p, source, from + warp + WARPS * i, lane, stages + i * STAGE, full + i);
  if (warp == 0 && from < to && copies(lane)) {
    copies_begin(tables, KEY_TABLE + (VALUE_COPIES == 1 ? VALUE_SOURCE : 0) + (DENSE && BASIS ? 32768 : 0) + (MEAN ? 16384 : 0) + (DENSE ? 16384 : 0));
    copy(smem + OFF_KEYS, (const char*)p.k_levels + head * p.k_levels_h, KEY_TABLE, tables, lane);
    if (VALUE_COPIES == 1) copy(smem + OFF_VALUES, (const char*)p.v_levels + head * p.v_levels_h, VALUE_SOURCE, tables, lane);
    if (DENSE && BASIS) copy(smem + OFF_BASIS, p.basis + head * p.basis_h, 32768, tables, lane);
    if (MEAN) copy(smem + OFF_MEAN, p.mean + head * 4096, 16384, tables, lane);
    if (DENSE) copy(smem + OFF_OFFSETS, p.offsets, 16384, tables, lane);
    copies_end(tables);
  }
  if (VALUE_COPIES > 1 && from < to)
    for (int i = TID; i < VALUE_TABLE / 16; i += THREADS) {
      const u32 v = ((const u32*)p.v_levels)[i >> 3];
      ((uint4*)(smem + OFF_VALUES))[i] = uint4{v, v, v, v};
    }
  if (ROTATES)
    for (int i = TID; i < 4 * 64; i += THREADS) {  // words of head i / 64
      const int hq = i >> 6, word = i >> 2 & 15, t = i & 3, from_head = hq < R ? hq : R - 1;
      float x[2];
      for (int e = 0; e < 2; e++) {
        const u32 v = ((const unsigned short*)p.q)[(bh * R + from_head) * D + channel(RAW_ORDER, word, t, e)];
        x[e] = (p.q_bf16 ? bits_float(v << 16) : half_lo(v)) * p.scale;
      }
      *(u32*)(smem + OFF_RAW + (hq * 4 + t) * RAW_ROW + word * 4) = pack_half2(x[0], x[1]);
    }
  if (split == 0)
    for (int hq = warp; hq < R; hq += WARPS) attend_exact(p, b, head, hq, lane);
  const int base = STARTS ? first_block(p, b) : 0, last = p.new_positions ? (first ? first - 1 : 0) : first;
  int exact[2];
  for (int i = 0; i < 2; i++) exact[i] = lane + 32 * i < p.E ? p.exact_slot[b * p.E + lane + 32 * i] : -1;
  sync_cta();
  if (from < to) barrier_wait(tables, 0);

  Softmax st;
  begin_softmax(st);
  u32 q[16], rq[16];
  float sums[2] = {0, 0};
  int current = -1, stage = 0;
  u32 parity = 0;
  const int rounds = from < to ? (to - from + WARPS - 1) / WARPS : 0;
  for (int i = 0; i < rounds; i++) {              // as often in every warp: four of them share a product
    const int window = from + warp + WARPS * i, base_slot = window * WINDOW;
    const bool has = window < to;
    u32 live[2] = {0, 0};
    int place[2] = {0, 0};
    unsigned char* here = stages + stage * STAGE;
    if (has) {
      u32 out[2] = {0, 0};
      if (p.E) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int d = exact[e] - base_slot;
          if (exact[e] >= 0 && d >= 0 && d < WINDOW) (d < 32 ? out[0] : out[1]) |= 1u << (d & 31);
        }
        if (any_lane(out[0] || out[1])) { out[0] = or_in_warp(out[0]); out[1] = or_in_warp(out[1]); }
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int slot = base_slot + 32 * half + lane, held = slot < last ? slot : last;
        bool seen = slot < past && (p.window == 0 || slot <= first - p.window);
        if (STARTS) {
          const int x = p.positions[b * p.position_row + held] - base * 64;
          place[half] = x & 0x7fffffff;          // before the first block, where no query stands, as far behind the last
        }
        if (p.mask && seen) seen = p.mask[b * p.mask_row + slot];
        live[half] = ballot_warp(seen) & ~out[half];
      }
      barrier_wait(full + stage, parity >> stage & 1);
      parity ^= 1u << stage;
    }
#pragma unroll 1
    for (int half = 0; half < 2; half++)
      if (has || (DENSE && BASIS))
        half_window(st, p, here, smem, q, rq, sums, current, bh, base, half, half ? live[1] : live[0], half ? place[1] : place[0], has, lane);
    sync_warp();
    if (window + WARPS * STAGES < to) request(p, source, window + WARPS * STAGES, lane, here, full + stage);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }

  // one part of the block: [R, 128], in the order of channels
  sync_cta();                                     // the stages are free
  float* parts = (float*)(smem + OFF_STAGES);
  float* part = parts + warp * R * PART;
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int mask = 2; mask < 32; mask <<= 1)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      st.l[e] += shfl_xor(st.l[e], mask);
      st.z[e] += shfl_xor(st.z[e], mask);
    }
#pragma unroll
  for (int m = 0; m < 8; m++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float v = st.o[m][e] + shfl_xor(st.o[m][e], 2);
      const int hq = 2 * t + (e & 1);
      if (hq < R) part[hq * PART + 16 * g + 2 * m + (e >> 1)] = v + st.z[e & 1];
    }
  if (lane < 2)
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (2 * lane + e < R) {
        part[(2 * lane + e) * PART + D] = st.fresh ? NEG_INF : st.m[e];
        part[(2 * lane + e) * PART + D + 1] = st.l[e];
      }
  sync_cta();
  for (int i = TID; i < R * D; i += THREADS) {
    const int hq = i / D, c = i % D;
    float top = NEG_INF, mass = 0, sum = 0;
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, parts[(w * R + hq) * PART + D]);
    for (int w = 0; w < WARPS; w++) {
      const float* x = parts + (w * R + hq) * PART;
      const float f = exp2_fast(x[D] - top);
      mass += f * x[D + 1];
      sum += f * x[c];
    }
    const long long at = (bh * (p.splits + 1) + split) * R + hq;
    p.part_acc[at * D + c] = sum;
    if (c == 0) {
      p.part_top[at] = mass > 0 || mass != mass ? top : bits_float(0xff800000u);
      p.part_mass[at] = mass;
    }
  }
}

// The query of every block of 64 positions in the codes' basis, as `rotated_query` reads it. A launched block takes a share of all runs of
// ROTATE_BLOCKS blocks: of each a warp rotates two, and takes all to 16 components, whose rows of the basis it holds.
constexpr int ROTATE_PAIRS = 8, ROTATE_BLOCKS = 2 * ROTATE_PAIRS, ROTATE_THREADS = 32 * ROTATE_PAIRS;
constexpr int ROTATE_ROW = 18;                    // words: 16, padded against bank conflicts
constexpr int OFF_RESULTS = ROTATE_PAIRS * 2048, ROTATE_BYTES = OFF_RESULTS + ROTATE_BLOCKS * 16 * ROTATE_ROW * 4;
KERNEL(ROTATE_THREADS, 3) rotate_queries(ARGUMENT(Codes) p) {
  BLOCK_MEMORY(ROTATE_BYTES)
  const int lane = TID & 31, warp = TID >> 5, g = lane >> 2, t = lane & 3, hq = g & 3;
  uint4* queries = (uint4*)smem + lane;         // [pair, 4, lane]
  u32* results = (u32*)(smem + OFF_RESULTS);    // [block, 16, ROTATE_ROW]
  const int runs = (p.blocks + ROTATE_BLOCKS - 1) / ROTATE_BLOCKS;
  const long long all = (long long)p.heads * runs, per = (all + GRID_X - 1) / GRID_X, end = (CTA_X + 1) * per < all ? (CTA_X + 1) * per : all;
  long long held = -1;
  int base = 0;
  uint4 basis[8];
  u32 raw[16];
  for (long long at = CTA_X * per; at < end; at++) {
    const long long bh = at / runs;
    const int block0 = (int)(at - bh * runs) * ROTATE_BLOCKS;
    if (bh != held) {
      const int head = (int)(bh % p.Hkv);
      base = STARTS ? first_block(p, (int)(bh / p.Hkv)) : 0;
#pragma unroll
      for (int k = 0; k < 8; k++) basis[k] = ((const uint4*)(p.basis + head * p.basis_h))[(warp * 8 + k) * 32 + lane];
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const u32 v = ((const u32*)p.q)[((bh * R + (hq < R ? hq : R - 1)) * D + 8 * i + 2 * t) / 2];
        const float lo = p.q_bf16 ? bits_float(v << 16) : half_lo(v), hi = p.q_bf16 ? bits_float(v & 0xffff0000u) : half_hi(v);
        raw[i] = pack_half2(lo * p.scale, hi * p.scale);
      }
      held = bh;
    }
    int row = base + block0 + 2 * warp + (g >> 2);
    row = row < p.angle_rows ? row : p.angle_rows - 1;
    const uint4* angle = (const uint4*)(p.angles + (long long)row * 64) + t;
#pragma unroll
    for (int n = 0; n < 2; n++) {
      uint4 c = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u}, s = {0, 0, 0, 0};
      if (p.by_block) { c = angle[4 * n]; s = angle[4 * n + 8]; }
      const u32 cv[4] = {c.x, c.y, c.z, c.w}, sv[4] = {s.x, s.y, s.z, s.w};
      u32 lo[4], hi[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int i = 4 * n + j;
        lo[j] = hfma2(raw[i + 8], sv[j], hmul2(raw[i], cv[j]));
        hi[j] = hfma2(raw[i] ^ 0x80008000u, sv[j], hmul2(raw[i + 8], cv[j]));
      }
      queries[(4 * warp + n) * 32] = uint4{lo[0], lo[1], lo[2], lo[3]};
      queries[(4 * warp + n + 2) * 32] = uint4{hi[0], hi[1], hi[2], hi[3]};
    }
    sync_cta();
#pragma unroll 2
    for (int n = 0; n < ROTATE_PAIRS; n++) {
      float y[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const uint4 q = queries[(4 * n + k) * 32], u = basis[2 * k], v = basis[2 * k + 1];
        mma(y[0], u.x, u.y, u.z, u.w, q.x, q.y);
        mma(y[1], v.x, v.y, v.z, v.w, q.z, q.w);
      }
      const u32 even = transpose8x8(pack_half2(y[0][0] + y[1][0], y[0][1] + y[1][1]));
      const u32 odd = transpose8x8(pack_half2(y[0][2] + y[1][2], y[0][3] + y[1][3]));
      *(uint2*)(results + ((2 * n + (g >> 2)) * 16 + hq * 4 + t) * ROTATE_ROW + 2 * warp) = uint2{even, odd};
    }
    sync_cta();
    const int blocks = p.blocks - block0 < ROTATE_BLOCKS ? p.blocks - block0 : ROTATE_BLOCKS;
    uint2* out = (uint2*)(p.rotated + (bh * p.blocks + block0) * 256);
    for (int i = TID; i < blocks * 128; i += ROTATE_THREADS) out[i] = *(const uint2*)(results + (i >> 3) * ROTATE_ROW + 2 * (i & 7));
  }
}

// The parts of one query head, by `merge_warps` warps: decoded ones through the values' Hadamard matrix, exact rows as they are.
constexpr int MERGE_WARPS = 8, MERGE_BYTES = MERGE_WARPS * 5 * 32 * 4;
KERNEL(32 * MERGE_WARPS) merge_codes(ARGUMENT(Codes) p) {
  BLOCK_MEMORY(MERGE_BYTES)
  constexpr int MANY = 4;
  const int lane = TID & 31, warp = TID >> 5, share = warp % p.merge_warps, row = (CTA_X * MERGE_WARPS + warp) / p.merge_warps, hq = row % R;
  const long long bh = row / R;
  const bool inside = bh < p.heads;
  const auto part = [&](int split) { return (bh * (p.splits + 1) + split) * R + hq; };
  const float none = bits_float(0xff800000u);
  float exact_top = none, top = 0, x[4] = {0, 0, 0, 0}, mass = 0;
  float4 exact = {0, 0, 0, 0};
  if (inside) {
    exact_top = top = p.part_top[part(p.splits)];
    exact = *(const float4*)(p.part_acc + part(p.splits) * D + 4 * lane);
    for (int s = lane; s < p.splits; s += 32) top = fmaxf(top, p.part_top[part(s)]);
#pragma unroll
    for (int m = 16; m; m >>= 1) top = fmaxf(top, shfl_xor(top, m));
    if (top == none) top = 0;
    for (int s0 = share * MANY; s0 < p.splits; s0 += MANY * p.merge_warps) {
      float4 v[MANY];
      float w[MANY], l[MANY];
#pragma unroll
      for (int j = 0; j < MANY; j++) {
        const bool is = s0 + j < p.splits;
        const long long at = part(is ? s0 + j : 0);
        v[j] = *(const float4*)(p.part_acc + at * D + 4 * lane);
        w[j] = is ? p.part_top[at] : none;
        l[j] = p.part_mass[at];
      }
#pragma unroll
      for (int j = 0; j < MANY; j++) {
        w[j] = exp2_fast(w[j] - top);
        mass += w[j] * l[j];
        x[0] += w[j] * v[j].x; x[1] += w[j] * v[j].y; x[2] += w[j] * v[j].z; x[3] += w[j] * v[j].w;
      }
    }
  }
  if (p.merge_warps > 1) {
    float* sums = (float*)smem + lane;          // [warp, 5, lane]
#pragma unroll
    for (int i = 0; i < 4; i++) sums[(warp * 5 + i) * 32] = x[i];
    sums[(warp * 5 + 4) * 32] = mass;
    sync_cta();
    if (share == 0)
      for (int w = warp + 1; w < warp + p.merge_warps; w++) {
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] += sums[(w * 5 + i) * 32];
        mass += sums[(w * 5 + 4) * 32];
      }
  }
  if (!inside || share) return;
  const float share_exact = exp2_fast(exact_top - top), inverse = 1.0f / fmaxf(mass + share_exact * p.part_mass[part(p.splits)], 1e-30f);
  if (p.value_hadamard) hadamard(x, lane);
  if (p.value_mean) {
    const float4 mean = *(const float4*)(p.value_mean + bh % p.Hkv * D + 4 * lane);
    x[0] += mass * mean.x; x[1] += mass * mean.y; x[2] += mass * mean.z; x[3] += mass * mean.w;
  }
  x[0] = (x[0] + share_exact * exact.x) * inverse; x[1] = (x[1] + share_exact * exact.y) * inverse;
  x[2] = (x[2] + share_exact * exact.z) * inverse; x[3] = (x[3] + share_exact * exact.w) * inverse;
  const uint2 v = {p.q_bf16 ? pack_bf2(x[0], x[1]) : pack_half2(x[0], x[1]), p.q_bf16 ? pack_bf2(x[2], x[3]) : pack_half2(x[2], x[3])};
  *(uint2*)((unsigned short*)p.out + (bh * R + hq) * D + 4 * lane) = v;
}

#ifndef KVSINK_EMULATE
extern "C" __device__ const int kvsink_launch[2] = {THREADS, SHARED_BYTES};
#endif
#endif
