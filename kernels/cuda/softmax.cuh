// One step of the online softmax over packed tiles, the same in every schedule, and which tokens of a superblock it sees.
#ifndef KVSINK_SOFTMAX
#define KVSINK_SOFTMAX

// Which of this lane's eight tokens of a block of 64 of the superblock at `base` are seen: those before `end` that are not among
// the exact rows, up to two of which each lane names. Bit 2 i + j is token 16 i + 2 g + j of the block.
struct Slots { int a, b; };                          // b: where there are many
DEVICE bool meets(const Slots& x, int base) { return (x.a >= base && x.a < base + 128) || (MANY && x.b >= base && x.b < base + 128); }
DEVICE void hidden_tokens(u32 (&hidden)[4], const Slots& x, int base) {
  const int a = x.a - base, b = x.b - base;
#pragma unroll
  for (int i = 0; i < 4; i++)
    hidden[i] = or_in_warp((a >= 32 * i && a < 32 * i + 32 ? 1u << (a & 31) : 0u) | (MANY && b >= 32 * i && b < 32 * i + 32 ? 1u << (b & 31) : 0u));
}
DEVICE u32 seen_in_block(const u32 (&hidden)[4], int block, int base, int end, int g) {
  const int rest = end - base - block * 64;
  u32 lo = block ? hidden[2] : hidden[0], hi = block ? hidden[3] : hidden[1];
  if (rest < 32) lo |= rest <= 0 ? 0xffffffffu : 0xffffffffu << rest;
  if (rest < 64) hi |= rest <= 32 ? 0xffffffffu : 0xffffffffu << (rest - 32);
  lo >>= 2 * g;
  hi >>= 2 * g;
  return ((lo & 3) | (lo >> 14 & 12) | (hi & 3) << 4 | (hi >> 14 & 12) << 4) ^ 0xff;
}
constexpr u32 ALL_SEEN = WIDE ? 0xffff : 0xff;       // WIDE: the second block's bits behind the first's
DEVICE u32 seen_tokens(const Slots& excluded, int base, int end, int lane) {
  u32 hidden[4];
  hidden_tokens(hidden, excluded, base);
  if (!WIDE) return seen_in_block(hidden, lane >> 1 & 1, base, end, lane >> 2);
  return seen_in_block(hidden, 0, base, end, lane >> 2) | seen_in_block(hidden, 1, base, end, lane >> 2) << 8;
}
DEVICE u32 masked_tokens(u32 valid, const unsigned char* mask, int lane) {     // the mask's bytes of a superblock over them
#pragma unroll
  for (int block = 0; block < (WIDE ? 2 : 1); block++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 m = *(const unsigned short*)(mask + (WIDE ? block : lane >> 1 & 1) * 64 + 16 * i + 2 * (lane >> 2));
      valid &= ~((((m & 1) ^ 1) << (2 * i) | (~m >> 8 & 1) << (2 * i + 1)) << 8 * block);
    }
  return valid;
}

constexpr int LAST = R == 1 ? 0 : 1;                 // of this lane's two columns the last that holds a head of its own: one head fills all
constexpr int ROWS_FROM = WIDE ? 4 : 2;              // lane bits from here on stand for tokens of the same head

// Where the tiles of an item stand in its stage: WIDE, those of one block alone when the superblock is divided; else pairs of tiles.
struct Item { int first, pairs, block, blocks; };    // first pair and how many, first block and how many
DEVICE Item item_of(int part, int shift) {
  if (!WIDE || shift == 0) return {part * (4 >> shift), 4 >> shift, 0, WIDE ? 2 : 1};
  const int n = 8 >> shift;
  return {shift == 1 ? 0 : (part & 1) * n, n, shift == 1 ? part : part >> 1, 1};
}

// One softmax step over NP units of an item from pair `pr` on; `block` is theirs when WIDE. mean: its table, by which the query rotated to
// the block gives its logits; TURNED: those logits, of the block of these columns. masked: some lane has tokens that are not seen.
template <int NP, bool TURNED>
DEVICE void step(State& st, const unsigned char* stage, const unsigned char* mean, const u32 (&q)[RUNS], const u32 (&rq)[RUNS],
                 const float (&shift)[2], const Item& item, int pr, int block, u32 valid, bool masked, int lane) {
  const int g = lane >> 2, half = WIDE ? block : lane >> 1 & 1;
  const int token = half * 64 + 16 * pr + 2 * g;     // this lane's rows of unit j are tokens token + 16 j and the next
  if (WIDE && block) valid >>= 8;
  const unsigned char *keys[NP], *values[NP], *key_scales[NP], *value_scales[NP];
#pragma unroll
  for (int j = 0; j < NP; j++) {
    const int at = pr + j - item.first, tile = !WIDE ? 2 * at : item.blocks == 2 ? 2 * at + block : at;
    keys[j] = stage + tile * K_TILE * 4;
    values[j] = stage + IN_VALUES + tile * V_TILE * 4;
    key_scales[j] = stage + KI_BYTES + (token + 16 * j) * K_SCALE;
    value_scales[j] = stage + KI_BYTES + KS_BYTES + (token + 16 * j) * V_SCALE;
  }
  float x[NP][4], s[NP][TILES][4], u[NP][4];
  u32 w[NP][TILES][K_WORDS];
#pragma unroll
  for (int j = 0; j < NP; j++)
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      load_words(w[j][i], (const u32*)keys[j] + i * K_TILE, lane);
#pragma unroll
      for (int e = 0; e < 4; e++) s[j][i][e] = MODE == 2 ? shift[e & 1] : 0.0f;
    }
#pragma unroll
  for (int j = 0; j < NP; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) u[j][e] = -st.m[e & LAST];
  if (TURNED)
#pragma unroll
    for (int j = 0; j < NP; j++) {
      const float4 a = ((const float4*)mean)[((pr + j) * (HELD / 2) + (lane & (HELD / 2 - 1))) * 8 + g];
      u[j][0] += a.x; u[j][1] += a.y; u[j][2] += a.z; u[j][3] += a.w;
    }
  const uint4* table = (const uint4*)mean + pr * 32 * K_STEPS + lane;
  if constexpr (KEY_TRELLIS) {
    Indices n[NP][TILES];
#pragma unroll
    for (int j = 0; j < NP; j++)
#pragma unroll
      for (int i = 0; i < TILES; i++) indices<false>(n[j][i], w[j][i]);
    KeyWalks<QUARTERS, NP, TILES, MODE != 0 && !TURNED>::run(s, u, w, n, q, rq, table);
  } else {
    KeySteps<K_STEPS, NP, TILES, MODE != 0 && !TURNED>::run(s, u, w, q, rq, table);
  }
#pragma unroll
  for (int j = 0; j < NP; j++) {
    float sa, sb, za = 0, zb = 0;
    if (KEY_TRELLIS) {
      gains_of(sa, sb, *(const unsigned short*)key_scales[j]);
    } else if (MODE == 2) {
      const u32 a = *(const u32*)key_scales[j];
      sa = half_lo(a); sb = half_hi(a);
    } else {
      const uint2 a = *(const uint2*)key_scales[j];
      sa = half_lo(a.x); za = half_hi(a.x); sb = half_lo(a.y); zb = half_hi(a.y);
    }
    constexpr float unit = KEY_TRELLIS ? 1.0f / (1 << Q_SHIFT) : (float)(1 << (24 - Q_SHIFT));
    sa *= unit; sb *= unit;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (R == 1 && (i & 1)) { x[j][i] = x[j][i - 1]; continue; }
      if (MODE != 2) u[j][i] += (i < 2 ? za : zb) * shift[i & 1];
      x[j][i] = (i < 2 ? sa : sb) * (TILES == 2 && half ? s[j][TILES - 1][i] : s[j][0][i]) + u[j][i];
    }
  }
  if (masked)
#pragma unroll
    for (int j = 0; j < NP; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (!(valid >> (2 * (pr + j) + (i >> 1)) & 1)) x[j][i] = NEG_INF;
  float top0 = x[0][0], top1 = x[0][1];
#pragma unroll
  for (int j = 0; j < NP; j++) {
    top0 = fmaxf(top0, fmaxf(x[j][0], x[j][2]));
    top1 = fmaxf(top1, fmaxf(x[j][1], x[j][3]));
  }
  if (st.fresh || any_lane(fmaxf(top0, top1) > LAZY_HIGH)) {
#pragma unroll
    for (int mask = ROWS_FROM; mask < 32; mask <<= 1) {
      top0 = fmaxf(top0, shfl_xor(top0, mask));
      top1 = R == 1 ? top0 : fmaxf(top1, shfl_xor(top1, mask));
    }
    float d0 = (st.fresh || top0 > LAZY_HIGH) ? top0 - LAZY_LOW : 0.0f, d1 = (st.fresh || top1 > LAZY_HIGH) ? top1 - LAZY_LOW : 0.0f;
    float f0 = exp2_fast(-d0), f1 = exp2_fast(-d1);
    bool empty = masked && top0 < -1e29f;            // nothing visible yet: stay fresh
    if (empty) d0 = d1 = 0.0f;
    if (st.fresh) f0 = f1 = 0.0f;
    st.fresh = st.fresh && empty;
    st.m[0] += d0; st.m[1] += d1;
    st.l[0] *= f0; st.l[1] *= f1; st.z[0] *= f0; st.z[1] *= f1;
#pragma unroll
    for (int i = 0; i < K_STEPS; i++) {
      st.o[i][0] *= f0; st.o[i][2] *= f0;
      if (R > 1) { st.o[i][1] *= f1; st.o[i][3] *= f1; }
    }
#pragma unroll
    for (int j = 0; j < NP; j++) { x[j][0] -= d0; x[j][1] -= d1; x[j][2] -= d0; x[j][3] -= d1; }
  }
#pragma unroll
  for (int j = 0; j < NP; j++) {
    float sa, sb, za = 0, zb = 0;
    if (VALUE_TRELLIS) {
      gains_of(sa, sb, *(const unsigned short*)value_scales[j]);
    } else {
      const uint2 a = *(const uint2*)value_scales[j];
      sa = half_lo(a.x); za = half_hi(a.x); sb = half_lo(a.y); zb = half_hi(a.y);
    }
    if (masked) {
      if (!(valid >> (2 * (pr + j)) & 1)) sa = za = 0;
      if (!(valid >> (2 * (pr + j) + 1) & 1)) sb = zb = 0;
    }
    float e[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (R == 1 && (i & 1)) { e[i] = e[i - 1]; continue; }
      e[i] = exp2_fast(x[j][i]);
      st.l[i & 1] += e[i];
      if (!VALUE_TRELLIS) st.z[i & 1] += e[i] * (i < 2 ? za : zb);
      e[i] *= i < 2 ? sa : sb;
    }
    const u32 b0 = transpose8x8(pack_half2(e[0], e[1])), b1 = transpose8x8(pack_half2(e[2], e[3]));
#pragma unroll
    for (int i = 0; i < TILES; i++) {                // columns 0-3 belong to the even tile, 4-7 to the odd one
      u32 v[V_WORDS];
      load_words(v, (const u32*)values[j] + i * V_TILE, lane);
      const u32 mine = WIDE || (g < 4) == (i == 0) ? 0xffffffffu : 0u;
      if constexpr (VALUE_TRELLIS) {
        Indices n;
        indices<true>(n, v);
        ValueWalks<QUARTERS>::run(st.o, v, n, b0 & mine, b1 & mine);
      } else {
        ValueSteps<K_STEPS>::run(st.o, v, b0 & mine, b1 & mine);
      }
    }
  }
}

// Whether a step is there a second time for masked tokens, as was faster on an H200 (tools/gpu_lab/NOTES.md): of few products it loses more
// to branches, of many to instructions that are fetched late.
constexpr bool TWICE = D <= 128 && (WIDE || STEP_PAIRS == 1);

// All of an item, the query rotated (and taken to the basis) for its blocks.
template <class Q, int NP>
DEVICE void attend_item(State& st, u32 (&q)[RUNS], float (&shift)[2], const unsigned char* stage, const unsigned char* smem, const Item& item,
                        u32 valid, int at, int lane) {
  const bool masked = any_lane(valid != ALL_SEEN);
  u32 rq[RUNS];                                      // AHEAD: unused
#pragma unroll 1
  for (int block = item.block; block < item.block + item.blocks; block++) {
    const unsigned char *mean = smem + OFF_MEAN, *turned = stage + IN_TURN;
    if constexpr (AHEAD) {
      load_turned(q, turned + (WIDE ? block - item.block : lane >> 4) * TURNED_BYTES, lane);
      mean = turned + (WIDE ? block - item.block : lane >> 1 & 1) * TURNED_BYTES + TURNED_QUERY;
    } else if (MODE != 0) {
      Rotation rot;
      load_rotation(rot, stage + IN_ROT, WIDE ? block : lane >> 4, lane);
      rotate_query<Q>(rq, rot, smem, lane, at);
      if (MODE == 2) transform_query(q, rq, smem, lane);
    }
    if (MODE == 2) center_query(shift, q);
    const auto steps = [&](bool masks) {
#pragma unroll 1
      for (int pr = item.first; pr < item.first + item.pairs; pr += NP)
        step<NP, AHEAD>(st, stage, mean, q, rq, shift, item, pr, block, valid, masks, lane);
    };
    if (!TWICE) steps(masked);
    else if (masked) steps(true);
    else steps(false);
  }
}
#endif
