// Decode attention of many short rows whose heads share nothing: every compute warp attends whole rows of its own.
//
// Formula    as attend.cuh; a row (sequence, KV head) is not divided, so nothing is merged and no block waits for another
// Layout     eight rows in flight per block, two queries and two results each; a service warp sees to one query head of every
//            row of WARPS * R / SERVICE compute warps
// Needs      one or two query heads per KV head
#ifndef KVSINK_ROWS_BY_WARP
#define KVSINK_ROWS_BY_WARP

#if HEADS_PER_KV <= 2
constexpr int GROUPS = SERVICE / R, IN_FLIGHT = 2;                             // service warps of one group hold the heads of a row
constexpr int ROW_PART = R * PART * 4;
struct WarpQueries {                                                           // buffer IN_FLIGHT * warp + (row & 1)
  static constexpr int HEADS = R, RAW = OFF_RAW, RAW_STEP = R * 4 * 20 * 4, QT = RAW + WARPS * IN_FLIGHT * RAW_STEP;
  static constexpr int QT_STEP = MODE == 2 ? 0 : R * D * 2, SUM = QT + WARPS * IN_FLIGHT * QT_STEP;
};
constexpr int WARP_BAR = WarpQueries::SUM + WARPS * IN_FLIGHT * R * 4;         // tables, then per warp: ready, done, emptied, stages
constexpr int WARP_BARS = 3 * IN_FLIGHT + STAGES, WARP_SMEM = WARP_BAR + 8 * (1 + WARPS * WARP_BARS);
static_assert(WARPS * IN_FLIGHT * ROW_PART <= OFF_RAW - OFF_PART, "results lie where those of attend_packed do");

struct Walk { int row, last, i; };                   // items of the rows up to `last`, `items` of each, one after another

DEVICE void ask_item(const Params& p, Walk& w, int items, int head, int lane, unsigned char* stage, u64* bar) {
  constexpr int PARTS = 4 / ITEM_PAIRS;
  if (w.row > w.last) return;
  if (lane == 0) {
    const int i = w.i / PARTS, part = w.i % PARTS;
    const long long tile = (long long)(w.row * p.Hkv + head) * p.tiles + i;
    unsigned char* scales = stage + KI_BYTES;
    barrier_expect(bar, KI_BYTES + VI_BYTES + (KS_BYTES + VS_BYTES) / PARTS + ROT_BYTES + (p.mask ? 128 : 0));
    bulk_load(stage, (const char*)p.k_codes + tile * K_BYTES + part * KI_BYTES, KI_BYTES, bar);
    bulk_load(stage + IN_VALUES, (const char*)p.v_codes + tile * V_BYTES + part * VI_BYTES, VI_BYTES, bar);
    for (int half = 0; half < (PARTS == 1 ? 1 : 2); half++) {   // of a divided superblock the even tiles' tokens, then the odd tiles'
      const int share = PARTS == 1 ? 1 : 2 * PARTS, ka = (half * PARTS + part) * (KS_BYTES / share), va = (half * PARTS + part) * (VS_BYTES / share);
      bulk_load(scales + ka, (const char*)p.k_scale + tile * KS_BYTES + ka, KS_BYTES / share, bar);
      bulk_load(scales + KS_BYTES + va, (const char*)p.v_scale + tile * VS_BYTES + va, VS_BYTES / share, bar);
    }
    if (p.mask) bulk_load(stage + IN_MASK, p.mask + w.row * p.mask_row + i * 128, 128, bar);
    if (MODE != 0) bulk_load(stage + IN_ROT, p.rotation + i * 128, ROT_BYTES, bar);
  }
  if (++w.i == items) { w.i = 0; w.row++; }
}

template <bool BF16> DEVICE void widened(float (&x)[4], uint2 v) { widen(x, v, BF16); }

// Exact and new rows of a row for one query head, eight at a time, in the values' own basis.
template <bool BF16> DEVICE Partial attend_few(const Params& p, uint2 qv, int b, long long pair, int lane) {
  const int length = (int)*p.length, slot = lane < p.E ? p.exact_slot[b * p.E + lane] : -1;
  u32 seen = 0;                                      // exact rows that count
  float q[4];
  widened<BF16>(q, qv);
#pragma unroll
  for (int i = 0; i < 4; i++) q[i] *= p.scale;
  Partial a = {{0, 0, 0, 0}, NEG_INF, 0};
  const unsigned short *keys = (const unsigned short*)p.exact_k + pair * p.E * D + 4 * lane;
  const unsigned short *values = (const unsigned short*)p.exact_v + pair * p.E * D + 4 * lane;
#pragma unroll 1
  for (int e0 = 0; e0 < p.E; e0 += 8, keys += 8 * D, values += 8 * D) {
    uint2 k[8], v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      k[j] = v[j] = uint2{0, 0};
      if (e0 + j < p.E) { k[j] = load4(keys, j * D); v[j] = load4(values, j * D); }
    }
    if (!e0) {                                       // after the first rows are asked for
      bool kept = slot >= 0 && !(p.N && slot >= length);       // the new row, already among the exact ones, counts once
      if (p.mask && kept) kept = p.mask[b * p.mask_row + slot];
      seen = ballot_warp(kept);
    }
    float d[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float x[4];
      widened<BF16>(x, k[j]);
      d[j] = q[0] * x[0] + q[1] * x[1] + q[2] * x[2] + q[3] * x[3];
    }
    // as in attend_exact: lane bits 16, 8, 4 end up naming the row
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
    const float x = seen >> (e0 + (lane >> 2)) & 1 ? d[0] : NEG_INF;
    float top = fmaxf(x, a.m);
#pragma unroll
    for (int m = 4; m < 32; m <<= 1) top = fmaxf(top, shfl_xor(top, m));
    const float f = exp2_fast(a.m - top), w = x <= NEG_INF ? 0.0f : exp2_fast(x - top);
    float sum = w;
#pragma unroll
    for (int m = 4; m < 32; m <<= 1) sum += shfl_xor(sum, m);
    a.l = a.l * f + sum;
    a.m = top;
#pragma unroll
    for (int i = 0; i < 4; i++) a.o[i] *= f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float wj = bits_float((u32)shfl_int((int)float_bits(w), 4 * j));
      float y[4];
      widened<BF16>(y, wj > 0.0f ? v[j] : uint2{0, 0});        // unused rows of the store may hold anything
#pragma unroll
      for (int i = 0; i < 4; i++) a.o[i] += wj * y[i];
    }
  }
#pragma unroll 1
  for (int n = 0; n < p.N; n++) {
    if (p.mask && !p.mask[b * p.mask_row + length + n]) continue;
    const long long at = (pair * p.N + n) * D + 4 * lane;
    float x[4], y[4];
    widened<BF16>(x, load4(p.new_k, at));
    widened<BF16>(y, load4(p.new_v, at));
    const float d = warp_sum(q[0] * x[0] + q[1] * x[1] + q[2] * x[2] + q[3] * x[3]), top = fmaxf(d, a.m);
    const float f = exp2_fast(a.m - top), w = exp2_fast(d - top);
    a.l = a.l * f + w;
    a.m = top;
#pragma unroll
    for (int i = 0; i < 4; i++) a.o[i] = a.o[i] * f + w * y[i];
  }
  return a;
}

// As write_warp_partial, of R heads: lanes t == 0 hold those of the even tiles, t == 2 those of the odd ones.
DEVICE void write_row(State& st, float* dst, int lane) {
#pragma unroll
  for (int mask = 2; mask < 32; mask <<= 1)
#pragma unroll
    for (int i = 0; i < R; i++) {
      st.l[i] += shfl_xor(st.l[i], mask);
      st.z[i] += shfl_xor(st.z[i], mask);
    }
#pragma unroll
  for (int m = 0; m < 8; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if ((i & 1) >= R) continue;
      const float v = st.o[m][i] + shfl_xor(st.o[m][i], 2), unit = (float)(1 << (24 - VF.pos[2 * m + (i >> 1)]));
      if ((lane & 3) == 0) dst[(i & 1) * PART + m * 16 + (i >> 1) * 8 + (lane >> 2)] = v * unit + st.z[i & 1];
    }
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < R; i++) {
      dst[i * PART + 128] = st.fresh ? NEG_INF : st.m[i];
      dst[i * PART + 129] = st.l[i];
    }
  }
}

#ifndef KVSINK_EMULATE
extern "C" __device__ const int kvsink_by_warp = WARP_SMEM <= 232448 ? WARP_SMEM : 0;   // 0: not to be launched
#endif
KERNEL(THREADS, 1) attend_rows(ARGUMENT(Params) p, ARGUMENT(RowParams) fresh) {
  LAUNCH_MEMORY
  const int lane = TID & 31, warp = TID >> 5;
  u64* tables = (u64*)(smem + WARP_BAR);
  if (TID == 0) {
    barrier_init(tables, 1);
    for (int w = 0; w < WARPS; w++) {
      u64* bars = tables + 1 + w * WARP_BARS;
      for (int i = 0; i < IN_FLIGHT; i++) {
        barrier_init(bars + i, R);
        barrier_init(bars + IN_FLIGHT + i, 1);
        barrier_init(bars + 2 * IN_FLIGHT + i, R);
      }
      for (int i = 0; i < STAGES; i++) barrier_init(bars + 3 * IN_FLIGHT + i, 1);
    }
    barrier_init_fence();
    if (MODE != 0) {
      barrier_expect(tables, 16384 + (MODE == 2 ? 32768 : 0));
      bulk_load(smem + OFF_MEAN, p.mean + CTA_Y * 4096, 16384, tables);
      if (MODE == 2) bulk_load(smem + OFF_BASIS, p.basis + CTA_Y * 8192, 32768, tables);
    }
  }
  const int held = (int)*p.length + p.extra, end = held < p.tiles * 128 ? held : p.tiles * 128, each = end < 1 ? 1 : (end + 127) / 128;
  sync_cta();
  // Compute warp w of this block takes rows first_of(w) to first_of(w + 1) - 1; every lane holds one of these.
  const int begins = (int)((u32)p.B * (u32)(CTA_X * WARPS + (lane < WARPS ? lane : WARPS)) / (u32)(p.share * WARPS));
  const auto first_of = [&](int w) { return shfl_int(begins, w); };

  if (warp >= WARPS) {
    fewer_registers<SERVICE_REGISTERS>();
    const int head = CTA_Y, hq = (warp - WARPS) % R, group = (warp - WARPS) / R;
    const auto row_of = [&](int b) { return (long long)b * p.Hkv + head; };
    const auto query = [&](int b) { return load4(p.q, (row_of(b) * R + hq) * D + 4 * lane); };
    const auto prepare = [&](int w, int n, int b, uint2 qv) {
      const float4 none = {0, 0, 0, 0}, one = {1, 1, 1, 1};
      const float4 tc = p.anchor_cos ? *(const float4*)(p.anchor_cos + b * D + 4 * lane) : one;
      const float4 ts = p.anchor_sin ? *(const float4*)(p.anchor_sin + b * D + 4 * lane) : none;
      prepare_query<WarpQueries>(p, qv, tc, ts, hq, lane, smem, w * IN_FLIGHT + (n & 1));
      sync_warp();
      if (lane == 0) barrier_arrive(tables + 1 + w * WARP_BARS + (n & 1));
    };
    const auto ask = [&](int b) {                    // exact rows into L2, a row ahead of their use
      if (lane || hq || !p.E) return;
      prefetch_bulk((const unsigned short*)p.exact_k + row_of(b) * p.E * D, p.E * D * 2);
      prefetch_bulk((const unsigned short*)p.exact_v + row_of(b) * p.E * D, p.E * D * 2);
    };
    int rows = 0;
#pragma unroll 1
    for (int w = group; w < WARPS; w += GROUPS) {
      const int first = first_of(w), count = first_of(w + 1) - first;
      if (count > rows) rows = count;
      if (!count) continue;
      prepare(w, 0, first, query(first));
      ask(first);
    }
#pragma unroll 1
    for (int n = 0; n < rows; n++) {
#pragma unroll 1
      for (int w = group; w < WARPS; w += GROUPS) {  // the queries of all rows that come next, before any row is waited for
        const int b = first_of(w) + n + 1;
        if (b >= first_of(w + 1)) continue;
        ask(b);
        prepare(w, n + 1, b, query(b));
      }
#pragma unroll 1
      for (int w = group; w < WARPS; w += GROUPS) {
        const int b = first_of(w) + n;
        if (b >= first_of(w + 1)) continue;
        u64* bars = tables + 1 + w * WARP_BARS + (n & 1);
        const uint2 qv = query(b);
        const bool enters = hq == 0 && fresh.segments && may_enter(fresh, b, lane);
        const Partial exact = p.q_bf16 ? attend_few<true>(p, qv, b, row_of(b), lane) : attend_few<false>(p, qv, b, row_of(b), lane);
        uint4 mean = {0, 0, 0, 0};
        if (p.value_mean) mean = *(const uint4*)(p.value_mean + head * D + 4 * lane);
        barrier_wait(bars + IN_FLIGHT, n >> 1 & 1);
        const float* part = (const float*)(smem + OFF_PART + (w * IN_FLIGHT + (n & 1)) * ROW_PART) + hq * PART;
        const uint4 o = *(const uint4*)(part + 4 * lane);
        const Partial a = {{bits_float(o.x), bits_float(o.y), bits_float(o.z), bits_float(o.w)}, part[128], part[129]};
        sync_warp();
        if (lane == 0) barrier_arrive(bars + 2 * IN_FLIGHT);
        finish(p, b, head, hq, lane, a, exact, mean);
        if (enters) {
          if (R > 1) barrier_wait(bars + 2 * IN_FLIGHT, n >> 1 & 1);           // the other heads have read the exact rows
          const long long at = row_of(b) * D + 4 * lane;
          enter_exact(fresh, load4(p.new_k, at), load4(p.new_v, at), b, head, (int)*p.length, lane);
        }
      }
    }
    return;
  }

  more_registers<COMPUTE_REGISTERS>();
  const int head = CTA_Y, g = lane >> 2, t = lane & 3, first_row = first_of(warp), last_row = first_of(warp + 1) - 1;
  if (last_row < first_row) {
    if (MODE != 0 && warp == 0) barrier_wait(tables, 0);       // no copy may be on its way to a block that has ended
    return;
  }
  u64 *bars = tables + 1 + warp * WARP_BARS, *full = bars + 3 * IN_FLIGHT;
  unsigned char* stages = smem + warp * STAGES * STAGE_BYTES;
  constexpr int PARTS = 4 / ITEM_PAIRS;
  const int items = each * PARTS;
  Walk fetch = {first_row, last_row, 0};
  const auto exclusions = [&](int b) { return lane < p.E ? p.exact_slot[b * p.E + lane] : -1; };
  int coming = exclusions(first_row);
#pragma unroll 1
  for (int i = 0; i < STAGES; i++) ask_item(p, fetch, items, head, lane, stages + i * STAGE_BYTES, full + i);
  int slot = 0;
  u32 parity = 0;
  if (MODE != 0) barrier_wait(tables, 0);

#pragma unroll 1
  for (int b = first_row, n = 0; b <= last_row; b++, n++) {
    const int at = warp * IN_FLIGHT + (n & 1), excluded = coming;
    if (b < last_row) coming = exclusions(b + 1);
    barrier_wait(bars + (n & 1), n >> 1 & 1);
    u32 q[16], rq[16];
    float shift[2] = {0, 0};
    if (MODE != 2) load_query<WarpQueries>(q, shift, smem, lane, at);
    State st;
    begin_softmax(st);

#pragma unroll 1
    for (int i = 0; i < items; i++) {
      unsigned char* stage = stages + slot * STAGE_BYTES;
      const int base = i / PARTS * 128, pr0 = i % PARTS * ITEM_PAIRS;
      u32 valid = 0xff;
      bool masked = base + 128 > end || any_lane(excluded >= base && excluded < base + 128);
      if (masked) valid = seen_tokens(excluded, base, end, lane);
      barrier_wait(full + slot, parity >> slot & 1);
      parity ^= 1u << slot;
      if (p.mask) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const u32 m = *(const unsigned short*)(stage + IN_MASK + (t >> 1) * 64 + 16 * j + 2 * g);
          valid &= ~(((m & 1) ^ 1) << (2 * j) | (~m >> 8 & 1) << (2 * j + 1));
        }
        masked = any_lane(valid != 0xff);
      }
      if (MODE != 0) {
        uint4 rot[4];
        load_rotation(rot, stage + IN_ROT, lane);
        rotate_query<WarpQueries>(rq, rot, smem, lane, at);
      }
      if (MODE == 2) transform_query(q, shift, rq, smem, lane);
      if (!masked)
#pragma unroll 1
        for (int pr = pr0; pr < pr0 + ITEM_PAIRS; pr += STEP_PAIRS) step<false>(st, stage, smem, q, rq, shift, pr0, pr, valid, lane);
      else
#pragma unroll 1
        for (int pr = pr0; pr < pr0 + ITEM_PAIRS; pr += STEP_PAIRS) step<true>(st, stage, smem, q, rq, shift, pr0, pr, valid, lane);
      sync_warp();
      ask_item(p, fetch, items, head, lane, stage, full + slot);
      slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    if (n >= IN_FLIGHT) barrier_wait(bars + 2 * IN_FLIGHT + (n & 1), (n >> 1 & 1) ^ 1);
    write_row(st, (float*)(smem + OFF_PART + at * ROW_PART), lane);
    sync_warp();
    if (lane == 0) barrier_arrive(bars + IN_FLIGHT + (n & 1));
  }
}
#elif !defined(KVSINK_EMULATE)
extern "C" __device__ const int kvsink_by_warp = 0;
#endif
#endif
