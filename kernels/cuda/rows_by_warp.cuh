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

// Which of this lane's eight tokens of the superblock at `base` are seen: those before `end` that are not among the exact rows.
DEVICE u32 seen_tokens(int excluded, int base, int end, int lane) {
  const int at = excluded - base, rest = end - base - (lane & 2) * 32, g = lane >> 2;
  u32 hidden[4];
#pragma unroll
  for (int i = 0; i < 4; i++) hidden[i] = or_lanes(at >= 32 * i && at < 32 * i + 32 ? 1u << (at & 31) : 0u);
  u32 lo = lane & 2 ? hidden[2] : hidden[0], hi = lane & 2 ? hidden[3] : hidden[1];
  if (rest < 32) lo |= rest <= 0 ? 0xffffffffu : 0xffffffffu << rest;
  if (rest < 64) hi |= rest <= 32 ? 0xffffffffu : 0xffffffffu << (rest - 32);
  lo >>= 2 * g;
  hi >>= 2 * g;
  return ((lo & 3) | (lo >> 14 & 12) | (hi & 3) << 4 | (hi >> 14 & 12) << 4) ^ 0xff;
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
extern "C" __global__ void __launch_bounds__(THREADS, 1) attend_rows(const __grid_constant__ Params p, const __grid_constant__ RowParams fresh)
#else
static void attend_rows(const Params& p, const RowParams& fresh)
#endif
{
#ifndef KVSINK_EMULATE
  extern __shared__ __align__(128) unsigned char smem[];
#else
  unsigned char* smem = EMULATED_SMEM;
#endif
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
        ExactRows side;
        load_exact(side, p, b, head, lane, 0);
        const bool enters = hq == 0 && fresh.segments && may_enter(fresh, b, lane);
        const Partial exact = attend_exact(side, qv, p, b, head, lane);
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
  if (last_row < first_row) return;
  u64 *bars = tables + 1 + warp * WARP_BARS, *full = bars + 3 * IN_FLIGHT;
  unsigned char* stages = smem + warp * STAGES * STAGE_BYTES;
  const Rows rows = {each, {first_row * each, (last_row + 1) * each}};
  Work fetch;
  fetch.row = first_row; fetch.last = last_row; fetch.valid = true;
  enter_row<1>(fetch, rows, 0);
  const auto exclusions = [&](int b) { return lane < p.E ? p.exact_slot[b * p.E + lane] : -1; };
  int coming = exclusions(first_row);
#pragma unroll 1
  for (int i = 0; i < STAGES; i++) request<1>(p, fetch, rows, head, 0, lane, stages + i * STAGE_BYTES, full + i);
  int slot = 0;
  u32 parity = 0;
  constexpr int SHIFT = halvings(ITEM_PAIRS);
  if (MODE != 0) barrier_wait(tables, 0);

#pragma unroll 1
  for (int b = first_row, n = 0; b <= last_row; b++, n++) {
    const int at = warp * IN_FLIGHT + (n & 1), excluded = coming;
    if (b < last_row) coming = exclusions(b + 1);
    barrier_wait(bars + (n & 1), n >> 1 & 1);
    u32 q[16], rq[16];
    float shift[2] = {0, 0};
    if (MODE != 2) {
      const u32* qt = (const u32*)(smem + WarpQueries::QT + at * WarpQueries::QT_STEP) + (g & (R - 1)) * (D / 2) + t;
#pragma unroll
      for (int r = 0; r < 16; r++) {
        const u32 f = 0x3c00u + ((u32)Q_SHIFT << 10) - ((u32)KF.pos[r] << 10);
        q[r] = hmul2(qt[4 * r], f | f << 16);
      }
      const float* qs = (const float*)(smem + WarpQueries::SUM) + at * R;
      shift[0] = qs[0];
      shift[1] = qs[R - 1];
    }
    State st;
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) st.o[i][j] = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) st.m[i] = st.l[i] = st.z[i] = 0;
    st.fresh = true;

#pragma unroll 1
    for (int i = 0; i < each << SHIFT; i++) {
      unsigned char* stage = stages + slot * STAGE_BYTES;
      const int base = (i >> SHIFT) * 128, pr0 = (i & ((1 << SHIFT) - 1)) * ITEM_PAIRS;
      u32 valid = seen_tokens(excluded, base, end, lane);
      barrier_wait(full + slot, parity >> slot & 1);
      parity ^= 1u << slot;
      if (p.mask) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const u32 m = *(const unsigned short*)(stage + IN_MASK + (t >> 1) * 64 + 16 * j + 2 * g);
          valid &= ~(((m & 1) ^ 1) << (2 * j) | (~m >> 8 & 1) << (2 * j + 1));
        }
      }
      const bool masked = any_lane(valid != 0xff);
      if (MODE != 0) rotate_query<WarpQueries>(rq, stage, smem, lane, at);
      if (MODE == 2) transform_query(q, shift, rq, smem, lane);
      if (!masked)
#pragma unroll 1
        for (int pr = pr0; pr < pr0 + ITEM_PAIRS; pr += STEP_PAIRS) step<false>(st, stage, smem, q, rq, shift, pr0, pr, valid, lane);
      else
#pragma unroll 1
        for (int pr = pr0; pr < pr0 + ITEM_PAIRS; pr += STEP_PAIRS) step<true>(st, stage, smem, q, rq, shift, pr0, pr, valid, lane);
      sync_warp();
      request<1>(p, fetch, rows, head, 0, lane, stage, full + slot);
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
