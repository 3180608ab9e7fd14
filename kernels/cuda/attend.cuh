// Decode attention over packed keys and values: one query row per sequence, split over tokens, merged in the same launch.
//
// Formula    out = softmax(scale * q.K^ + mean) V^ over packed tokens, exact rows and the new row (kernels/attend.py, kernels/tiles.py)
// Layout     token tiles of 16 are stored in the order of mma.m16n8k16 A fragments; a superblock is 128 tokens (kernels/tiles.py)
// Arithmetic a masked code is an fp16 subnormal (code * 2^pos * 2^-24), so nothing is converted; powers of two and the
//            levels' spacing are folded into the query (keys) or into the final scaling (values)
// Needs      sm_80 instructions plus the bulk copy engine (sm_90). No header is included, so NVRTC compiles it as it is.
#ifndef KVSINK_ATTEND_PACKED
#define KVSINK_ATTEND_PACKED

#ifndef KW
#define KW 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2  // key bits of each run of 8 components
#endif
#ifndef VW
#define VW 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2  // value bits of each run of 8 channels
#endif
#ifndef MODE
#define MODE 1  // 0 plain scale and zero, 1 the same plus the mean's logit (centred), 2 block KLT with one gain per token
#endif
#ifndef STEP_PAIRS
#define STEP_PAIRS 2  // tile pairs (32 tokens each) whose logits are computed before one softmax step
#endif
#ifndef ITEM_PAIRS
#define ITEM_PAIRS 4  // tile pairs that one warp loads at a time: 4 (a superblock), 2 or 1, not fewer than STEP_PAIRS
#endif
#ifndef COMPUTE_REGISTERS
#define COMPUTE_REGISTERS 200
#define SERVICE_REGISTERS 104
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef HEADS_PER_KV
#define HEADS_PER_KV 4
#endif

struct Params {
  const void* q;            // [B, Hkv * R, 128] fp16 or bf16, rotary applied
  const u32* k_codes;       // [B, Hkv, tiles, K_BYTES / 4]
  const void* k_scale;      // [B, Hkv, tiles * 128, 2] fp16 scale, zero; block KLT: [B, Hkv, tiles * 128] fp16 gain
  const u32* v_codes;       // [B, Hkv, tiles, V_BYTES / 4]
  const u32* v_scale;       // [B, Hkv, tiles * 128, 2] fp16 scale, zero
  const u32* mean;          // [Hkv, 4, 8, 32, 4] A fragments of the [64, 128] table of the mean's logit
  const u32* rotation;      // [2 * tiles, 4, 4, 4] cos and sin of 64 * block, B-fragment order
  const u32* basis;         // block KLT: [Hkv, 8, 8, 32, 4] A fragments of diag(step * sigma * 2^(8 - pos)) U^T
  const float* anchor_cos;  // [B, 128] rotation by each row's anchor (slot minus position), or null
  const float* anchor_sin;
  const long long* length;  // one past the last slot of every row
  const unsigned char* mask;  // [B, mask_row] 1 where a slot is visible, or null: all are
  const void* exact_k;      // [B, Hkv, E, 128] same dtype as q
  const void* exact_v;
  const int* exact_slot;    // [B, E] slot of each exact row, negative when the entry is empty
  const void* new_k;        // [B, Hkv, N, 128] rows that are not packed or not to be read packed
  const void* new_v;
  const float* value_mean;  // [Hkv, 128] or null
  void* out;                // [B, Hkv * R, 128]
  float* partial;           // [Hkv, grid_x, 4 * PART], every word 0xffffffff before the first launch and left so
  long long mask_row;       // bytes between the masks of two rows, 0 when all rows share one
  int B, Hkv, share, tiles, E, N, extra;  // share: blocks of a KV head; extra: packed slots from `length` on that are to be read (strict), else 0
  int q_bf16, key_hadamard, value_hadamard;
  float scale;              // softmax scale times log2(e)
};

constexpr int D = 128, R = HEADS_PER_KV, SERVICE = 4, THREADS = (WARPS + SERVICE) * 32;

struct Fields {             // where the w-bit field of each of 16 runs sits inside 16-bit bins
  int width[16], bin[16], shift[16], pos[16], bins;
};
BOTH constexpr Fields make_fields(const int (&w)[16]) {
  Fields f = {};
  int fill[16] = {}, cut[16] = {};
  bool open[16] = {};
  for (int r = 0; r < 16; r++) {                  // first fit, widest runs come first
    int b = 0;
    while (fill[b] + w[r] > 16) b++;
    f.width[r] = w[r]; f.bin[r] = b;
    if (fill[b] + w[r] > 11 && !open[b]) { open[b] = true; cut[b] = fill[b]; }   // patterns up to 2047 are linear in fp16
    f.shift[r] = open[b] ? cut[b] : 0;
    f.pos[r] = fill[b] - f.shift[r];
    fill[b] += w[r];
    if (b + 1 > f.bins) f.bins = b + 1;
  }
  return f;
}
constexpr int K_WIDTH[16] = {KW}, V_WIDTH[16] = {VW};
TABLE Fields KF = make_fields(K_WIDTH);
TABLE Fields VF = make_fields(V_WIDTH);
constexpr int K_WORDS = 2 * KF.bins, V_WORDS = 2 * VF.bins;                   // 32-bit words per lane and tile of 16 tokens
constexpr int K_TILE = 32 * K_WORDS, V_TILE = 32 * V_WORDS;                   // words per tile
constexpr int K_BYTES = 8 * K_TILE * 4, V_BYTES = 8 * V_TILE * 4;             // per superblock of 128 tokens
constexpr int KS_BYTES = MODE == 2 ? 256 : 512, VS_BYTES = 512, ROT_BYTES = MODE == 0 ? 0 : 512;
constexpr int KI_BYTES = K_BYTES * ITEM_PAIRS / 4, VI_BYTES = V_BYTES * ITEM_PAIRS / 4;   // codes of one item
constexpr int PAIR_K = K_BYTES / 4, PAIR_V = V_BYTES / 4, K_SCALE = KS_BYTES / 128, V_SCALE = VS_BYTES / 128;   // bytes per tile pair, per token
constexpr int IN_VALUES = KI_BYTES + KS_BYTES + VS_BYTES, IN_ROT = IN_VALUES + VI_BYTES, IN_MASK = IN_ROT + ROT_BYTES;   // offsets inside a stage
constexpr int STAGE_BYTES = IN_MASK + 128;
constexpr int PART = 132;                                                      // floats per head of a partial: 128 channels, max, sum

constexpr int OFF_MEAN = WARPS * STAGES * STAGE_BYTES;
constexpr int OFF_BASIS = OFF_MEAN + (MODE == 0 ? 0 : 16384);
constexpr int OFF_PART = OFF_BASIS + (MODE == 2 ? 32768 : 0);
constexpr int RAW_BYTES = 16 * 20 * 4, QT_BYTES = MODE == 2 ? 0 : 4 * D * 2;
constexpr int OFF_RAW = OFF_PART + WARPS * 4 * PART * 4;                       // query, B-fragment order, 16 rows of 20 words; two rows of the batch
constexpr int OFF_QT = OFF_RAW + 2 * RAW_BYTES;                                // transformed query, 4 x 128 fp16; two rows of the batch
constexpr int OFF_SUM = OFF_QT + 2 * QT_BYTES;                                 // sums of the transformed query, 2 x 4
struct Queries { static constexpr int HEADS = 4, RAW = OFF_RAW, QT = OFF_QT, SUM = OFF_SUM, RAW_STEP = RAW_BYTES, QT_STEP = QT_BYTES; };
constexpr int OFF_BAR = OFF_SUM + 64;
constexpr int SMEM_BYTES = OFF_BAR + 8 * (WARPS * STAGES + 8);
static_assert(SMEM_BYTES <= 232448, "more shared memory than a block can have");

// The block owns what it was launched with; asking for more than that waits for ever.
static_assert(WARPS * 32 * COMPUTE_REGISTERS + SERVICE * 32 * SERVICE_REGISTERS <= 65536 / THREADS / 8 * 8 * THREADS, "registers");
static_assert(WARPS % 4 == 0, "register counts change per four warps");

constexpr float LAZY_LOW = 4.0f, LAZY_HIGH = 8.0f;   // log2: a new reference puts the largest weight at 2^4; it moves when one passes 2^8
constexpr int Q_SHIFT = 8;                           // the query carries 2^8, the rest of 2^24 goes to the token's scale

template <int RUN> DEVICE u32 key_field(const u32 (&w)[K_WORDS], int row) {
  constexpr u32 m = ((1u << KF.width[RUN]) - 1u) << KF.pos[RUN];
  return (w[row * KF.bins + KF.bin[RUN]] >> KF.shift[RUN]) & (m | m << 16);
}
template <int RUN> DEVICE u32 value_field(const u32 (&w)[V_WORDS], int half) {
  constexpr u32 m = ((1u << VF.width[RUN]) - 1u) << VF.pos[RUN];
  return (w[half * VF.bins + VF.bin[RUN]] >> VF.shift[RUN]) & (m | m << 16);
}
// S^T += K Q^T of the two tiles of each pair, 16 components per step, and the mean's logits of the same tokens: independent chains side by side.
template <int KS, int NP> struct KeySteps {
  DEVICE_STATIC void run(float (&s)[NP][2][4], float (&u)[NP][4], const u32 (&w)[NP][2][K_WORDS], const u32 (&q)[16],
                         const u32 (&rq)[16], const uint4* mean) {
    KeySteps<KS - 1, NP>::run(s, u, w, q, rq, mean);
    constexpr int k = KS - 1;
#pragma unroll
    for (int j = 0; j < NP; j++) {
#pragma unroll
      for (int i = 0; i < 2; i++)
        mma(s[j][i], key_field<2 * k>(w[j][i], 0), key_field<2 * k>(w[j][i], 1), key_field<2 * k + 1>(w[j][i], 0), key_field<2 * k + 1>(w[j][i], 1),
            q[2 * k], q[2 * k + 1]);
      if (MODE != 0) {
        const uint4 a = mean[j * 256 + k * 32];
        mma(u[j], a.x, a.y, a.z, a.w, rq[2 * k], rq[2 * k + 1]);
      }
    }
  }
};
template <int NP> struct KeySteps<0, NP> {
  DEVICE_STATIC void run(float (&)[NP][2][4], float (&)[NP][4], const u32 (&)[NP][2][K_WORDS], const u32 (&)[16], const u32 (&)[16],
                         const uint4*) {}
};
template <int MT> struct ValueSteps {                // O^T += V^T P^T, 16 channels per step
  DEVICE_STATIC void run(float (&o)[8][4], const u32 (&w)[V_WORDS], u32 p0, u32 p1) {
    ValueSteps<MT - 1>::run(o, w, p0, p1);
    constexpr int m = MT - 1;
    mma(o[m], value_field<2 * m>(w, 0), value_field<2 * m + 1>(w, 0), value_field<2 * m>(w, 1), value_field<2 * m + 1>(w, 1), p0, p1);
  }
};
template <> struct ValueSteps<0> { DEVICE_STATIC void run(float (&)[8][4], const u32 (&)[V_WORDS], u32, u32) {} };

template <int N> DEVICE void load_words(u32 (&w)[N], const u32* tile, int lane) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
      uint4 v = ((const uint4*)tile)[i * 32 + lane];
      w[4 * i] = v.x; w[4 * i + 1] = v.y; w[4 * i + 2] = v.z; w[4 * i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      uint2 v = ((const uint2*)tile)[i * 32 + lane];
      w[2 * i] = v.x; w[2 * i + 1] = v.y;
    }
  }
}

struct Work {                                        // walks the items of one warp: superblocks (or parts of them) of the CTA's rows
  int row, last, first, shift, items, i;             // first: superblock of the row at which this block's share begins
  bool valid;
};

struct Range { int u0, u1; };
DEVICE constexpr int halvings(int pairs) { return pairs == 4 ? 0 : pairs == 2 ? 1 : 2; }

struct Rows { int each; Range range; };              // superblocks of every row, and this block's share of all of them

DEVICE void enter_row(Work& w, const Rows& r, int warp) {
  const int a = w.row * r.each, b = a + r.each;
  const int u0 = r.range.u0 > a ? r.range.u0 : a, u1 = r.range.u1 < b ? r.range.u1 : b, n = u1 - u0;
  w.first = u0 - a;
  w.shift = halvings(n * (4 / STEP_PAIRS) <= WARPS ? STEP_PAIRS : ITEM_PAIRS);   // few superblocks: smaller items, more warps
  w.items = n << w.shift;
  w.i = warp;
}
DEVICE void settle(Work& w, const Rows& r, int warp) {
  while (w.i >= w.items) {
    if (w.row >= w.last) { w.valid = false; return; }
    w.row++;
    enter_row(w, r, warp);
  }
}

DEVICE void request(const Params& p, Work& w, const Rows& r, int head, int warp, int lane,
                    unsigned char* stage, u64* bar) {
  if (!w.valid) return;
  if (lane == 0) {
    long long tile = (long long)(w.row * p.Hkv + head) * p.tiles + w.first + (w.i >> w.shift);
    const int parts = 1 << w.shift, part = w.i & (parts - 1);
    const u32 kb = K_BYTES >> w.shift, vb = V_BYTES >> w.shift, ks = KS_BYTES >> w.shift, vs = VS_BYTES >> w.shift;
    unsigned char* scales = stage + KI_BYTES;
    barrier_expect(bar, kb + vb + ks + vs + ROT_BYTES + (p.mask ? 128 : 0));
    bulk_load(stage, (const char*)p.k_codes + tile * K_BYTES + part * kb, kb, bar);
    bulk_load(stage + IN_VALUES, (const char*)p.v_codes + tile * V_BYTES + part * vb, vb, bar);
    if (parts == 1) {
      bulk_load(scales, (const char*)p.k_scale + tile * KS_BYTES, KS_BYTES, bar);
      bulk_load(scales + KS_BYTES, (const char*)p.v_scale + tile * VS_BYTES, VS_BYTES, bar);
    } else {                                         // the even tiles' tokens, then the odd tiles'
      for (int half = 0; half < 2; half++) {
        const int ka = half * (KS_BYTES / 2) + part * (ks / 2), va = half * (VS_BYTES / 2) + part * (vs / 2);
        bulk_load(scales + ka, (const char*)p.k_scale + tile * KS_BYTES + ka, ks / 2, bar);
        bulk_load(scales + KS_BYTES + va, (const char*)p.v_scale + tile * VS_BYTES + va, vs / 2, bar);
      }
    }
    if (p.mask) bulk_load(stage + IN_MASK, p.mask + w.row * p.mask_row + (w.first + (w.i >> w.shift)) * 128, 128, bar);
    if (MODE != 0) bulk_load(stage + IN_ROT, p.rotation + (long long)(w.first + (w.i >> w.shift)) * 128, ROT_BYTES, bar);
  }
  w.i += WARPS;
  settle(w, r, warp);
}

// Query head `hq` of row b, by one service warp: the scaled query for the mean's table and its transform, into buffer `at`.
template <class Q = Queries>
DEVICE void prepare_query(const Params& p, uint2 q, const float4& tc, const float4& ts, int hq, int lane, unsigned char* smem, int at) {
  float x[4], y[4];
  widen(x, q, p.q_bf16);
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = y[i] = x[i] * p.scale;
  if (MODE != 0) {
    // Tables are cut by slot: the query is turned to where slot 0 is position -anchor.
    const float c4[4] = {tc.x, tc.y, tc.z, tc.w}, s4[4] = {ts.x, ts.y, ts.z, ts.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float z = shfl_xor(x[i], 16);
      y[i] = x[i] * c4[i] + (lane < 16 ? -z : z) * s4[i];
    }
    u32* raw = (u32*)(smem + Q::RAW + at * Q::RAW_STEP);
#pragma unroll
    for (int i = 0; i < 2; i++) {                    // channels 4 lane + 2 i, + 1
      const int d = 4 * lane + 2 * i, run = d >> 3, t = (d & 7) >> 1;
      raw[(hq * 4 + t) * 20 + run] = pack_half2(y[2 * i], y[2 * i + 1]);
    }
  }
  if (MODE != 2) {
    if (p.key_hadamard) hadamard(x, lane);
    u32* qt = (u32*)(smem + Q::QT + at * Q::QT_STEP) + hq * (D / 2) + 2 * lane;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 v = pack_half2(x[2 * i], x[2 * i + 1]);
      qt[i] = v;
      sum += half_lo(v) + half_hi(v);
    }
    sum = warp_sum(sum);
    if (lane == 0) ((float*)(smem + Q::SUM))[at * Q::HEADS + hq] = sum;
  }
}

struct Partial { float o[4], m, l; };                // one head: this lane's 4 channels (4 lane ..), largest logit, sum of weights

constexpr int CHUNK = 9;
struct ExactRows { uint2 k[CHUNK], v[CHUNK]; int kept; };

// Into L2 without waiting: 256 bytes per row, one lane per 128-byte line.
DEVICE void prefetch_exact(const Params& p, int b, int head, int lane) {
  const long long pair = b * p.Hkv + head;
  for (int i = lane; i < 2 * p.E; i += 32) {
    prefetch((const unsigned short*)p.exact_k + pair * p.E * D + i * 64);
    prefetch((const unsigned short*)p.exact_v + pair * p.E * D + i * 64);
  }
}

DEVICE void load_exact(ExactRows& r, const Params& p, int b, int head, int lane, int e0) {
  if (!e0) {                                         // new rows follow the side store; both obey the mask
    const int length = (int)*p.length;
    r.kept = lane < p.E ? p.exact_slot[b * p.E + lane] : lane < p.E + p.N ? length + lane - p.E : -1;
    if (lane < p.E && p.N && r.kept >= length) r.kept = -1;   // the new row, already among the exact ones: it counts once
    if (p.mask && r.kept >= 0 && !p.mask[b * p.mask_row + r.kept]) r.kept = -1;
  }
  const long long pair = b * p.Hkv + head;
#pragma unroll
  for (int j = 0; j < CHUNK; j++) {
    const int e = e0 + j;
    const bool side = e < p.E;
    const long long at = (side ? pair * p.E + e : pair * p.N + e - p.E) * D + 4 * lane;
    r.k[j] = r.v[j] = uint2{0, 0};
    if (e < p.E + p.N) {
      r.k[j] = load4(side ? p.exact_k : p.new_k, at);
      r.v[j] = load4(side ? p.exact_v : p.new_v, at);
    }
  }
}

// Exact and new rows of row b for one query head, in the values' own basis; `r` holds the first chunk.
DEVICE Partial attend_exact(ExactRows& r, uint2 qv, const Params& p, int b, int head, int lane) {
  Partial a = {{0, 0, 0, 0}, NEG_INF, 0};
  float q[4];
  for (int e0 = 0; e0 < p.E + p.N; e0 += CHUNK) {
    if (e0) load_exact(r, p, b, head, lane, e0);
    widen(q, qv, p.q_bf16);
    float d[CHUNK];
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
      float k[4];
      widen(k, r.k[j], p.q_bf16);
      d[j] = q[0] * k[0] + q[1] * k[1] + q[2] * k[2] + q[3] * k[3];
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
    const int mine = e0 + (lane >> 2);
    const bool kept = shfl_int(r.kept, mine & 31) >= 0, kept8 = shfl_int(r.kept, (e0 + 8) & 31) >= 0;
    const float x = mine < p.E + p.N && kept ? d[0] * p.scale : NEG_INF;
    const float x8 = e0 + 8 < p.E + p.N && kept8 ? d[8] * p.scale : NEG_INF;
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
    for (int i = 0; i < 4; i++) a.o[i] *= f;
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
      const float wj = j == 8 ? w8 : bits_float((u32)shfl_int((int)float_bits(w), 4 * j));
      float v[4];
      widen(v, wj > 0.0f ? r.v[j] : uint2{0, 0}, p.q_bf16);   // unused rows of the store may hold anything
#pragma unroll
      for (int i = 0; i < 4; i++) a.o[i] += wj * v[i];
    }
  }
  return a;
}

DEVICE void finish(const Params& p, int b, int head, int hq, int lane, Partial a, const Partial& e, uint4 mean) {
  if (p.value_hadamard) hadamard(a.o, lane);
  const float n = fmaxf(a.m, e.m), f0 = exp2_fast(a.m - n), f1 = exp2_fast(e.m - n), inv = 1.0f / fmaxf(a.l * f0 + e.l * f1, 1e-30f);   // a row that sees nothing gives 0
  const float f = f0 * inv, fe = f1 * inv;
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float mu = bits_float(i == 0 ? mean.x : i == 1 ? mean.y : i == 2 ? mean.z : mean.w) * a.l;
    x[i] = f * (a.o[i] + mu) + fe * e.o[i];
  }
  uint2 v = {p.q_bf16 ? pack_bf2(x[0], x[1]) : pack_half2(x[0], x[1]), p.q_bf16 ? pack_bf2(x[2], x[3]) : pack_half2(x[2], x[3])};
  *(uint2*)((unsigned short*)p.out + ((long long)(b * p.Hkv + head) * R + hq) * D + 4 * lane) = v;
}

// Sends a partial to the block that finishes the row: every word is valid once it differs from 0xffffffff.
DEVICE void send_partial(float* slot, const Partial& a, int lane) {
  store_polled(slot + 4 * lane, uint4{float_bits(a.o[0]), float_bits(a.o[1]), float_bits(a.o[2]), float_bits(a.o[3])});
  if (lane == 0) store_polled(slot + 128, uint4{float_bits(a.m), float_bits(a.l), 0, 0});
}
DEVICE bool missing(uint4 v) { return v.x == 0xffffffffu || v.y == 0xffffffffu || v.z == 0xffffffffu || v.w == 0xffffffffu; }

// Takes n partials, `stride` floats apart, waits for those not there yet and leaves the slots empty for the next launch.
DEVICE void receive_partials(Partial& a, float* slots, long long stride, int n, int lane) {
  constexpr int CHUNK = 8;
  const uint4 empty = {0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu};
  for (int base = 0; base < n; base += 32) {         // one lane per partial for largest logit and sum
    float* slot = slots + base * stride;
    const int count = n - base < 32 ? n - base : 32;
    uint4 s = {float_bits(NEG_INF), 0, 0, 0};
    do {
      if (lane < count) s = load_polled(slot + lane * stride + 128);
    } while (any_lane(missing(s)));
    if (lane < count) store_polled(slot + lane * stride + 128, empty);
    float top = fmaxf(a.m, bits_float(s.x));
#pragma unroll
    for (int m = 16; m; m >>= 1) top = fmaxf(top, shfl_xor(top, m));
    const float f = exp2_fast(bits_float(s.x) - top), own = exp2_fast(a.m - top);
    a.l = a.l * own + warp_sum(f * bits_float(s.y));
    a.m = top;
#pragma unroll
    for (int i = 0; i < 4; i++) a.o[i] *= own;
#pragma unroll 1
    for (int i0 = 0; i0 < count; i0 += CHUNK) {
      uint4 v[CHUNK];
      bool bad;
      do {
        bad = false;
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
          v[j] = uint4{0, 0, 0, 0};
          if (i0 + j < count) v[j] = load_polled(slot + (i0 + j) * stride + 4 * lane);
        }
#pragma unroll
        for (int j = 0; j < CHUNK; j++) bad = bad || missing(v[j]);
      } while (any_lane(bad));
#pragma unroll
      for (int j = 0; j < CHUNK; j++) {
        const float w = bits_float((u32)shfl_int((int)float_bits(f), (i0 + j) & 31));
        a.o[0] += w * bits_float(v[j].x); a.o[1] += w * bits_float(v[j].y); a.o[2] += w * bits_float(v[j].z); a.o[3] += w * bits_float(v[j].w);
        if (i0 + j < count) store_polled(slot + (i0 + j) * stride + 4 * lane, empty);
      }
    }
  }
}

// Which of this lane's eight tokens of the superblock at `base` are seen: those before `end` that are not among the exact rows.
DEVICE u32 seen_tokens(int excluded, int base, int end, int lane) {
  const int at = excluded - base, rest = end - base - (lane & 2) * 32, g = lane >> 2;
  u32 hidden[4];
#pragma unroll
  for (int i = 0; i < 4; i++) hidden[i] = or_in_warp(at >= 32 * i && at < 32 * i + 32 ? 1u << (at & 31) : 0u);
  u32 lo = lane & 2 ? hidden[2] : hidden[0], hi = lane & 2 ? hidden[3] : hidden[1];
  if (rest < 32) lo |= rest <= 0 ? 0xffffffffu : 0xffffffffu << rest;
  if (rest < 64) hi |= rest <= 32 ? 0xffffffffu : 0xffffffffu << (rest - 32);
  lo >>= 2 * g;
  hi >>= 2 * g;
  return ((lo & 3) | (lo >> 14 & 12) | (hi & 3) << 4 | (hi >> 14 & 12) << 4) ^ 0xff;
}

struct State {                                       // online softmax of one warp; columns 0-3 and 4-7 are the heads of even and odd tiles
  float o[8][4], m[2], l[2], z[2];
  bool fresh;
};

constexpr int LAST = R == 1 ? 0 : 1;                 // of this lane's two columns the last that holds a head of its own: one head fills all

// One softmax step over NP tile pairs starting at pair pr of the superblock in `stage`.
template <bool MASKED, int NP = STEP_PAIRS>
DEVICE void step(State& st, const unsigned char* stage, const unsigned char* smem, const u32 (&q)[16], const u32 (&rq)[16],
                 const float (&shift)[2], int pr0, int pr, u32 valid, int lane) {
  const int g = lane >> 2, t = lane & 3, half = t >> 1;
  const int token = half * 64 + 16 * pr + 2 * g;     // this lane's rows of pair pr + j are tokens token + 16 j and the next
  const unsigned char *keys[NP], *values[NP], *key_scales[NP], *value_scales[NP];
#pragma unroll
  for (int j = 0; j < NP; j++) {
    keys[j] = stage + (pr + j - pr0) * PAIR_K;
    values[j] = stage + IN_VALUES + (pr + j - pr0) * PAIR_V;
    key_scales[j] = stage + KI_BYTES + (token + 16 * j) * K_SCALE;
    value_scales[j] = stage + KI_BYTES + KS_BYTES + (token + 16 * j) * V_SCALE;
  }
  float x[NP][4], s[NP][2][4], u[NP][4];
  u32 w[NP][2][K_WORDS];
#pragma unroll
  for (int j = 0; j < NP; j++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      load_words(w[j][i], (const u32*)keys[j] + i * K_TILE, lane);
#pragma unroll
      for (int e = 0; e < 4; e++) s[j][i][e] = MODE == 2 ? shift[e & 1] : 0.0f;
    }
#pragma unroll
  for (int j = 0; j < NP; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) u[j][e] = -st.m[e & LAST];
  KeySteps<8, NP>::run(s, u, w, q, rq, (const uint4*)(smem + OFF_MEAN) + pr * 256 + lane);
#pragma unroll
  for (int j = 0; j < NP; j++) {
    float sa, sb, za = 0, zb = 0;
    if (MODE == 2) {
      const u32 a = *(const u32*)key_scales[j];
      sa = half_lo(a); sb = half_hi(a);
    } else {
      const uint2 a = *(const uint2*)key_scales[j];
      sa = half_lo(a.x); za = half_hi(a.x); sb = half_lo(a.y); zb = half_hi(a.y);
    }
    constexpr float unit = (float)(1 << (24 - Q_SHIFT));
    sa *= unit; sb *= unit;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (R == 1 && (i & 1)) { x[j][i] = x[j][i - 1]; continue; }
      if (MODE != 2) u[j][i] += (i < 2 ? za : zb) * shift[i & 1];
      x[j][i] = (i < 2 ? sa : sb) * (half ? s[j][1][i] : s[j][0][i]) + u[j][i];
      if (MASKED && !(valid >> (2 * (pr + j) + (i >> 1)) & 1)) x[j][i] = NEG_INF;
    }
  }
  float top0 = x[0][0], top1 = x[0][1];
#pragma unroll
  for (int j = 0; j < NP; j++) {
    top0 = fmaxf(top0, fmaxf(x[j][0], x[j][2]));
    top1 = fmaxf(top1, fmaxf(x[j][1], x[j][3]));
  }
  if (st.fresh || any_lane(fmaxf(top0, top1) > LAZY_HIGH)) {
#pragma unroll
    for (int mask = 2; mask < 32; mask <<= 1) {
      top0 = fmaxf(top0, shfl_xor(top0, mask));
      top1 = R == 1 ? top0 : fmaxf(top1, shfl_xor(top1, mask));
    }
    float d0 = (st.fresh || top0 > LAZY_HIGH) ? top0 - LAZY_LOW : 0.0f, d1 = (st.fresh || top1 > LAZY_HIGH) ? top1 - LAZY_LOW : 0.0f;
    float f0 = exp2_fast(-d0), f1 = exp2_fast(-d1);
    bool empty = MASKED && top0 < -1e29f;            // nothing visible yet: stay fresh
    if (empty) d0 = d1 = 0.0f;
    if (st.fresh) f0 = f1 = 0.0f;
    st.fresh = st.fresh && empty;
    st.m[0] += d0; st.m[1] += d1;
    st.l[0] *= f0; st.l[1] *= f1; st.z[0] *= f0; st.z[1] *= f1;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      st.o[i][0] *= f0; st.o[i][2] *= f0;
      if (R > 1) { st.o[i][1] *= f1; st.o[i][3] *= f1; }
    }
#pragma unroll
    for (int j = 0; j < NP; j++) { x[j][0] -= d0; x[j][1] -= d1; x[j][2] -= d0; x[j][3] -= d1; }
  }
#pragma unroll
  for (int j = 0; j < NP; j++) {
    u32 w0[V_WORDS], w1[V_WORDS];
    load_words(w0, (const u32*)values[j], lane);
    load_words(w1, (const u32*)values[j] + V_TILE, lane);
    const uint2 a = *(const uint2*)value_scales[j];
    float sa = half_lo(a.x), za = half_hi(a.x), sb = half_lo(a.y), zb = half_hi(a.y);
    if (MASKED) {
      if (!(valid >> (2 * (pr + j)) & 1)) sa = za = 0;
      if (!(valid >> (2 * (pr + j) + 1) & 1)) sb = zb = 0;
    }
    float e[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (R == 1 && (i & 1)) { e[i] = e[i - 1]; continue; }
      e[i] = exp2_fast(x[j][i]);
      st.l[i & 1] += e[i];
      st.z[i & 1] += e[i] * (i < 2 ? za : zb);
      e[i] *= i < 2 ? sa : sb;
    }
    u32 b0 = transpose8x8(pack_half2(e[0], e[1])), b1 = transpose8x8(pack_half2(e[2], e[3]));
    u32 even = g < 4 ? 0xffffffffu : 0u;             // columns 0-3 belong to the even tile, 4-7 to the odd one
    ValueSteps<8>::run(st.o, w0, b0 & even, b1 & even);
    ValueSteps<8>::run(st.o, w1, b0 & ~even, b1 & ~even);
  }
}

// cos and sin of a superblock's two blocks, as this lane needs them.
DEVICE void load_rotation(uint4 (&rot)[4], const void* table, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) rot[i] = ((const uint4*)table)[(lane >> 4) * 16 + (lane & 3) + i * 4];
}
template <class Q = Queries>
DEVICE void rotate_query(u32 (&rq)[16], const uint4 (&rot)[4], const unsigned char* smem, int lane, int at) {
  const int g = lane >> 2, t = lane & 3;
  const uint4* raw = (const uint4*)((const u32*)(smem + Q::RAW + at * Q::RAW_STEP) + ((g & (Q::HEADS - 1)) * 4 + t) * 20);
#pragma unroll
  for (int i = 0; i < 2; i++) {                      // runs 4 i .. 4 i + 3 with their partners 8 runs (64 channels) on
    uint4 a = raw[i], b = raw[i + 2], c = rot[i], s = rot[i + 2];
    u32 av[4] = {a.x, a.y, a.z, a.w}, bv[4] = {b.x, b.y, b.z, b.w}, cv[4] = {c.x, c.y, c.z, c.w}, sv[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      rq[4 * i + k] = hfma2(bv[k], sv[k], hmul2(av[k], cv[k]));
      rq[4 * i + k + 8] = hfma2(av[k] ^ 0x80008000u, sv[k], hmul2(bv[k], cv[k]));
    }
  }
}

// Modes 0 and 1: the transformed query as B fragments, and what a token's zero adds to its logit in this lane's columns.
template <class Q = Queries> DEVICE void load_query(u32 (&q)[16], float (&shift)[2], const unsigned char* smem, int lane, int at) {
  const int g = lane >> 2, t = lane & 3;
  const u32* qt = (const u32*)(smem + Q::QT + at * Q::QT_STEP) + (g & (Q::HEADS - 1)) * (D / 2) + t;
#pragma unroll
  for (int r = 0; r < 16; r++) {
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
  DEVICE_STATIC void run(float (&s)[4], const u32 (&q)[16]) {
    CenterSteps<KS - 1>::run(s, q);
    constexpr int k = KS - 1;
    constexpr u32 lo = Center<2 * k>::value(), hi = Center<2 * k + 1>::value();
    mma(s, lo, lo, hi, hi, q[2 * k], q[2 * k + 1]);
  }
};
template <> struct CenterSteps<0> { DEVICE_STATIC void run(float (&)[4], const u32 (&)[16]) {} };

DEVICE void transform_query(u32 (&q)[16], float (&shift)[2], const u32 (&rq)[16], const unsigned char* smem, int lane) {
  const uint4* basis = (const uint4*)(smem + OFF_BASIS) + lane;
#pragma unroll
  for (int m = 0; m < 8; m += 4) {                   // four chains side by side
    float y[4][4] = {};
#pragma unroll
    for (int k = 0; k < 8; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint4 a = basis[((m + i) * 8 + k) * 32];
        mma(y[i], a.x, a.y, a.z, a.w, rq[2 * k], rq[2 * k + 1]);
      }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      q[2 * (m + i)] = transpose8x8(pack_half2(y[i][0], y[i][1]));
      q[2 * (m + i) + 1] = transpose8x8(pack_half2(y[i][2], y[i][3]));
    }
  }
  float c[4] = {0, 0, 0, 0};
  CenterSteps<8>::run(c, q);
  shift[0] = -c[0] * 5.9604644775390625e-08f;        // 2^-24, the unit of a subnormal code
  shift[1] = -c[1] * 5.9604644775390625e-08f;
}

DEVICE void write_warp_partial(State& st, float* dst, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int mask = 2; mask < 32; mask <<= 1)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      st.l[i] += shfl_xor(st.l[i], mask);
      st.z[i] += shfl_xor(st.z[i], mask);
    }
#pragma unroll
  for (int m = 0; m < 8; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float v = st.o[m][i];
      v += shfl_xor(v, 2);
      float unit = (float)(1 << (24 - VF.pos[2 * m + (i >> 1)]));
      if (t < 2) dst[(2 * t + (i & 1)) * PART + m * 16 + (i >> 1) * 8 + g] = v * unit + st.z[i & 1];
    }
  if (lane < 2) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      dst[(2 * lane + i) * PART + 128] = st.fresh ? NEG_INF : st.m[i];
      dst[(2 * lane + i) * PART + 129] = st.l[i];
    }
  }
}

template <int N = WARPS> DEVICE Partial merge_warps(const float* parts, int hq, int lane) {
  Partial a = {{0, 0, 0, 0}, NEG_INF, 0};
  const float* mine = parts + ((lane < N ? lane : 0) * 4 + hq) * PART;
  const float m = mine[128], l = lane < N ? mine[129] : 0.0f;
  a.m = m;
#pragma unroll
  for (int i = 16; i; i >>= 1) a.m = fmaxf(a.m, shfl_xor(a.m, i));
  const float f = exp2_fast(m - a.m);
  a.l = warp_sum(f * l);
#pragma unroll
  for (int w = 0; w < N; w++) {
    const float e = bits_float((u32)shfl_int((int)float_bits(f), w));
    const uint4 v = *(const uint4*)(parts + (w * 4 + hq) * PART + 4 * lane);
    a.o[0] += e * bits_float(v.x); a.o[1] += e * bits_float(v.y); a.o[2] += e * bits_float(v.z); a.o[3] += e * bits_float(v.w);
  }
  return a;
}

#endif
