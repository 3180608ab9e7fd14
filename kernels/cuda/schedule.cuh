// Three schedules over the same step: rows divided among warps and blocks (attend_packed), one short sequence with a block for each
// superblock (attend_single), many short rows whole by one warp each (attend_rows). Attention reads the new row as it came, so its
// coding (rows.cuh) may run beside this; the row enters the exact rows here, when they have been read.
#ifndef KVSINK_SCHEDULE
#define KVSINK_SCHEDULE

struct Work {                                        // walks the items of one warp: superblocks (or parts of them) of the CTA's rows
  int row, last, first, shift, items, i;             // first: superblock of the row at which this block's share begins
  bool valid;
};
struct Range { int u0, u1; };
struct Rows { int each; Range range; };              // superblocks of every row, and this block's share of all of them
DEVICE constexpr int halvings(int pairs) { return pairs == 4 ? 0 : pairs == 2 ? 1 : 2; }

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

// Part `part` of 1 << SHIFT of superblock i of row b into a stage; its numbers whole.
template <int SHIFT, bool TURNED = AHEAD> DEVICE void ask(const Params& p, int b, int kv, int i, int part, int lane, unsigned char* stage, u64* bar) {
  const auto [keys, values, of_keys, of_values] = stored(p, b, kv, i);
  if constexpr (WIDE && SHIFT > 0) {                 // tiles of one block, which stand between those of the other
    const Item item = item_of(part, SHIFT);
    const int from = 2 * item.first + item.block;
#pragma unroll
    for (int n = 0; n < 8 >> SHIFT; n++) {
      copy_by_lanes<K_TILE * 4>(stage + n * K_TILE * 4, keys + (from + 2 * n) * K_TILE * 4, lane);
      copy_by_lanes<V_TILE * 4>(stage + IN_VALUES + n * V_TILE * 4, values + (from + 2 * n) * V_TILE * 4, lane);
    }
  } else {
    copy_by_lanes<(K_BYTES >> SHIFT)>(stage, keys + part * (K_BYTES >> SHIFT), lane);
    copy_by_lanes<(V_BYTES >> SHIFT)>(stage + IN_VALUES, values + part * (V_BYTES >> SHIFT), lane);
  }
  if constexpr (KS_BYTES + VS_BYTES <= 512) {
    if (16 * lane < KS_BYTES + VS_BYTES) copy16(stage + KI_BYTES + 16 * lane, (16 * lane < KS_BYTES ? of_keys : of_values - KS_BYTES) + 16 * lane);
  } else {
    copy_by_lanes<KS_BYTES>(stage + KI_BYTES, of_keys, lane);
    copy_by_lanes<VS_BYTES>(stage + KI_BYTES + KS_BYTES, of_values, lane);
  }
  if constexpr (TURNED) {
    const unsigned char* turned = p.turned + (((long long)b * p.Hkv * GROUPS + CTA_Y) * p.tiles + i) * 2 * TURNED_BYTES;
    if constexpr (WIDE && SHIFT > 0) copy_by_lanes<TURNED_BYTES>(stage + IN_TURN, turned + item_of(part, SHIFT).block * TURNED_BYTES, lane);
    else copy_by_lanes<2 * TURNED_BYTES>(stage + IN_TURN, turned, lane);
  }
  if (p.mask) copy_by_lanes<128>(stage + IN_MASK, p.mask + b * p.mask_row + i * 128, lane);
  copy_by_lanes<ROT_BYTES>(stage + IN_ROT, p.rotation + (long long)i * (ROT_BYTES / 4), lane);
  arrive_when_copied(bar);
}
DEVICE void request(const Params& p, Work& w, const Rows& r, int kv, int warp, int lane, unsigned char* stage, u64* bar) {
  if (!w.valid) return;
  constexpr int WHOLE = halvings(ITEM_PAIRS), SMALL = halvings(STEP_PAIRS);
  const int i = w.first + (w.i >> w.shift), part = w.i & ((1 << w.shift) - 1);
  if (WHOLE == SMALL || w.shift == WHOLE) ask<WHOLE>(p, w.row, kv, i, part, lane, stage, bar);
  else ask<SMALL>(p, w.row, kv, i, part, lane, stage, bar);
  w.i += WARPS;
  settle(w, r, warp);
}
// The tables of a KV head, by one warp. Nothing is on its way to a block that has ended: who leaves early waits for them.
DEVICE void ask_tables(const Params& p, int kv, int lane, unsigned char* smem, u64* bar) {
  if (TABLE_BYTES == 0 || !copies(lane)) return;
  copies_begin(bar, TABLE_BYTES);
  copy(smem + OFF_MEAN, p.mean + kv * (MEAN_BYTES / 4), MEAN_BYTES, bar, lane);
  if (MODE == 2) copy(smem + OFF_BASIS, p.basis + kv * (BASIS_BYTES / 4), BASIS_BYTES, bar, lane);
  copies_end(bar);
}
DEVICE Slots exclusions(const Params& p, int b, int lane) {
  return {lane < p.E ? p.exact_slot[b * p.E + lane] : -1, MANY && lane + 32 < p.E ? p.exact_slot[b * p.E + lane + 32] : -1};
}
DEVICE int longest(const Params& p, int lane) {      // superblocks of the longest row
  if (!p.length_row) return superblocks(end_of(p, 0));
  u32 most = 1;
  for (int b = lane; b < p.B; b += 32) {
    const u32 n = superblocks(end_of(p, b));
    most = n > most ? n : most;
  }
  return (int)most_in_warp(most);
}
DEVICE Raw query_of(const Params& p, int b, const Place& at, int h, int lane) {       // spare columns repeat a head
  return load_raw(p.q, (((long long)b * p.Hkv + at.kv) * HEADS_PER_KV + at.first + (h < at.heads ? h : at.heads - 1)) * D + CH * lane);
}
// The new row takes the place of an exact one, when the last group of heads has read them all.
DEVICE void enter_new(const Params& p, const RowParams& fresh, int b, int kv, int lane) {
  if (GROUPS > 1 && !last_to_come(fresh.group_arrived + (long long)b * p.Hkv + kv, GROUPS, lane)) return;
  const int slot = (int)p.length[b * p.length_row];
  if (slot >= p.tiles * 128) return;                 // what does not fit is dropped; the cache says so beforehand
  const long long at = ((long long)b * p.Hkv + kv) * D + CH * lane;
  enter_exact(fresh, load_raw(p.new_k, at), load_raw(p.new_v, at), b, kv, slot, lane);
}

KERNEL(THREADS, 1) attend_packed(ARGUMENT(Params) p, ARGUMENT(RowParams) fresh) {
  LAUNCH_MEMORY
  const int lane = TID & 31, warp = TID >> 5;
  const Place place = place_of(CTA_Y);
  const int kv = place.kv;
  u64* bars = (u64*)(smem + OFF_BAR);
  u64 *tables = bars, *ready = bars + 1, *emptied = bars + 3;   // ready: two buffers of query rows

  if (TID == 0) {
    barrier_init(tables, COPIERS);
    barrier_init(ready, SERVICE); barrier_init(ready + 1, SERVICE);
    barrier_init(emptied, SERVICE);
    for (int i = 0; i < WARPS * STAGES; i++) barrier_init(bars + 8 + i, 32);
    barrier_init_fence();
  }
  if (warp == 0) {
    sync_warp();
    ask_tables(p, kv, lane, smem, tables);
  }
  const int each = longest(p, lane);
  const u32 total = (u32)(p.B * each), nc = (u32)p.share < total ? p.share : total, c = CTA_X;
  sync_cta();
  if (c >= nc) {
    if (TABLE_BYTES && warp == 0) barrier_wait(tables, 0);
    return;
  }
  Rows rows = {each, {(int)(total * c / nc), (int)(total * (c + 1) / nc)}};
  const int first_row = rows.range.u0 / each, last_row = (rows.range.u1 - 1) / each;
  const bool tail = (last_row + 1) * each > rows.range.u1;      // the last row goes on in later blocks: send what we have of it
  float* parts = p.partial + ((long long)CTA_Y * p.share + c) * COLUMNS * SLOT;   // of this block; those of others, COLUMNS * SLOT apart

  if (warp >= WARPS) {                               // service warps, one query head each
    if constexpr (SHIFTS) fewer_registers<SERVICE_REGISTERS>();
    const int h = warp - WARPS;
    const bool waits = first_row * each < rows.range.u0 && !(first_row == last_row && tail), own = h < place.heads;
    Partial held = nothing(), held_exact = held;
    bool held_enters = false, entering = false;
    Raw qv = query_of(p, first_row, place, h, lane); // before any other load: they would queue behind everybody's packed rows
    if (!AHEAD) prepare_query(p, qv, first_row, h, lane, smem, 0);
    sync_warp();
    if (lane == 0) barrier_arrive(ready);
    if (!(first_row == last_row && tail)) prefetch_exact(p, first_row, kv, lane);
    constexpr bool few = !BY_WARPS;
    for (int b = first_row, n = 0, round = 0;; b++, n++) {       // round: parts that the warps have handed over
      Partial a, exact = nothing();
      int out = b;
      if (b <= last_row) {
        const bool send = b == last_row && tail;
        Raw next = qv;
        if (b < last_row) {
          next = query_of(p, b + 1, place, h, lane);
          if (!AHEAD) prepare_query(p, next, b + 1, h, lane, smem, (n + 1) & 1);
          sync_warp();
          if (lane == 0) barrier_arrive(ready + ((n + 1) & 1));
        }
        const bool enters = h == 0 && !send && fresh.segments && may_enter(fresh, b, lane);
        ExactRows side;
        if (!send && few) {
          load_exact(side, p, b, kv, lane, 0);
          exact = attend_exact(side, qv, p, b, kv, lane);
        }
        qv = next;
        const auto taken = [&] {
          sync_part<1, THREADS>();                   // a named barrier: warps that ask a barrier in shared memory take issue slots
          const Partial merged = merge_warps((const float*)(smem + OFF_PART), h, lane);
          sync_warp();
          if (lane == 0) barrier_arrive(emptied);
          round++;
          return merged;
        };
        a = taken();
        if (!send && !few) exact = taken();
        if (h == 0 && fresh.segments) barrier_wait(emptied, (round - 1) & 1);   // every warp has read the exact rows
        if (send) {
          if (own) send_partial(parts + h * SLOT, a, lane);
          continue;
        }
        if (n == 0 && waits) {                       // wait for the others at the end only
          held = a;
          held_exact = exact;
          held_enters = enters;
          continue;
        }
        entering = enters;
      } else {
        if (!waits || !own) break;
        const u32 origin = ((u32)(first_row * each + 1) * nc - 1) / total;   // the block that holds the row's first superblock
        a = held;
        exact = held_exact;
        receive_partials(a, parts - (long long)(c - origin) * COLUMNS * SLOT + h * SLOT, COLUMNS * SLOT, c - origin, lane);
        out = first_row;
        entering = held_enters;
      }
      if (own) finish(p, out, kv, place.first + h, lane, a, exact);
      if (entering) enter_new(p, fresh, out, kv, lane);          // nobody of this block reads the exact rows of the sequence any more
      if (b > last_row) break;
    }
    return;
  }

  if constexpr (SHIFTS) more_registers<COMPUTE_REGISTERS>();
  u64* full = bars + 8 + warp * STAGES;
  unsigned char* stages = smem + warp * STAGES * STAGE_BYTES;
  float* part = (float*)(smem + OFF_PART) + warp * R * PART;
  Work fetch;
  fetch.row = first_row; fetch.last = last_row; fetch.valid = true;
  enter_row(fetch, rows, warp);
  settle(fetch, rows, warp);
  Slots coming = exclusions(p, first_row, lane);     // before the packed rows: it would queue behind them
  request(p, fetch, rows, kv, warp, lane, stages, full);
  int slot = 0;
  u32 parity = 0;

  for (int b = first_row, n = 0, round = 0; b <= last_row; b++, n++) {
    Work work;
    work.row = work.last = b;
    enter_row(work, rows, warp);
    const int at = n & 1, end = end_of(p, b);
    const Slots excluded = coming;
    if (b < last_row) coming = exclusions(p, b + 1, lane);
    barrier_wait(ready + at, n >> 1 & 1);
    if (n == 0)                                      // not before every warp has asked for its first stage
      for (int i = 1; i < STAGES; i++) request(p, fetch, rows, kv, warp, lane, stages + i * STAGE_BYTES, full + i);
    u32 q[RUNS];
    float shift[2] = {0, 0};
    if (MODE != 2) load_query(q, shift, smem, lane, at);
    State st;
    begin_softmax(st);
    if (TABLE_BYTES && n == 0) barrier_wait(tables, 0);

    for (; work.i < work.items; work.i += WARPS) {
      unsigned char* stage = stages + slot * STAGE_BYTES;
      const int base = (work.first + (work.i >> work.shift)) * 128;
      const Item item = item_of(work.i & ((1 << work.shift) - 1), work.shift);
      u32 valid = ALL_SEEN;
      if (base + 128 > end || any_lane(meets(excluded, base))) valid = seen_tokens(excluded, base, end, lane);
      barrier_wait(full + slot, parity >> slot & 1);
      parity ^= 1u << slot;
      if (p.mask) valid = masked_tokens(valid, stage + IN_MASK, lane);
      attend_item<Queries, STEP_PAIRS>(st, q, shift, stage, smem, item, valid, at, lane);
      sync_warp();
      request(p, fetch, rows, kv, warp, lane, stage, full + slot);
      slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    if (round) barrier_wait(emptied, (round - 1) & 1);
    write_warp_partial(st, part, lane);
    arrive_part<1, THREADS>();
    round++;
    if constexpr (BY_WARPS) {
      if (b == last_row && tail) continue;
      const auto free = [&] { barrier_wait(emptied, (round - 1) & 1); };
      if (p.q_bf16) attend_many<true>(p, place, b, warp, lane, part, free);
      else attend_many<false>(p, place, b, warp, lane, part, free);
      arrive_part<1, THREADS>();
      round++;
    }
  }
}

// -- one short sequence ---------------------------------------------------------------------------------------------------
//
// Latency is all, so everything that does not depend on the length is asked for before the length is known. Warps 0-3 attend to a
// tile pair each, the others see to a query head each; block KLT: all take the query to the basis, rows of its tiles each, straight
// from the L2 cache. Needs B = 1 and as many blocks as superblocks can be held; those behind the last token end early.
constexpr int SINGLE_WARPS = PAIR_WARPS + SERVICE, SINGLE_THREADS = 32 * SINGLE_WARPS;

#ifndef KVSINK_EMULATE
// What the host must ask for: threads of the kernels, bytes of two; 0: not to be launched.
extern "C" __device__ const int kvsink_launch[6] = {THREADS, ROW_THREADS, SINGLE_ROW_THREADS, SINGLE_THREADS, SMEM_BYTES,
                                                   Single::BYTES <= SHARED_MOST ? Single::BYTES : 0};
#endif
KERNEL(SINGLE_THREADS, 1) attend_single(ARGUMENT(Params) p, ARGUMENT(RowParams) fresh) {
  LAUNCH_MEMORY
  constexpr int BLOCKS = WIDE ? 2 : 1, TILES_ALONE = WIDE ? 2 : 1;             // of 64 tokens, whose queries stand apart; units of a warp
  const int lane = TID & 31, warp = TID >> 5, c = CTA_X, h = warp - PAIR_WARPS;
  const Place place = place_of(CTA_Y);
  const int kv = place.kv;
  const bool attends = warp < PAIR_WARPS;
  u64* full = (u64*)(smem + Single::BAR) + warp;
  unsigned char* stage = smem + warp * STAGE_BYTES;

  if (attends && lane == 0) {
    barrier_init(full, MODE != 0 ? 32 + COPIERS : 32);
    barrier_init_fence();
  }
  if (attends) {
    sync_warp();
    ask<2, false>(p, 0, kv, c, warp, lane, stage, full);
    if (MODE != 0 && copies(lane)) {                 // the pair's part of the table of the mean's logit
      const Item item = item_of(warp, 2);            // two warps write the same where they share pairs
      const u32 size = item.pairs * (MEAN_BYTES / 4);
      copies_begin(full, size);
      copy(smem + Single::MEAN + item.first * (MEAN_BYTES / 4), p.mean + kv * (MEAN_BYTES / 4) + item.first * (MEAN_BYTES / 16), size, full, lane);
      copies_end(full);
    }
  }
  const Slots excluded = exclusions(p, 0, lane);
  const uint4* rows = (const uint4*)p.basis + (long long)kv * (BASIS_BYTES / 16) + lane;
  uint4 basis[K_STEPS];
  Rotation rot[BLOCKS];
  if (MODE == 2 && warp < K_STEPS)
#pragma unroll
    for (int k = 0; k < K_STEPS; k++) basis[k] = rows[(warp * K_STEPS + k) * 32];
  if (MODE == 2 || (MODE == 1 && attends))
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) load_rotation(rot[i], p.rotation + c * (ROT_TABLE / 4), WIDE ? i : lane >> 4, lane);
  Raw qv = {};
  ExactRows side;
  bool better = false;                               // the new row than some exact one, for the warp that sees to it
  if (!attends) {
    qv = query_of(p, 0, place, h, lane);
    prepare_query<Single>(p, qv, 0, h, lane, smem, 0);
  }
  sync_cta();
  const int end = end_of(p, 0), each = superblocks(end);
  if (c >= each) {
    if (attends) barrier_wait(full, 0);              // no copy may be on its way to a block that has ended
    return;
  }
  const bool last = c == each - 1;
  if (!attends && last) {
    load_exact(side, p, 0, kv, lane, 0);
    better = h == 0 && fresh.segments && may_enter(fresh, 0, lane);
  }
  u32 rq[BLOCKS][RUNS];
  if (MODE == 2 || (MODE == 1 && attends))
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) rotate_query<Single>(rq[i], rot[i], smem, lane, 0);
  if (MODE == 2) {
#pragma unroll 1
    for (int m = warp; m < K_STEPS; m += SINGLE_WARPS) {
      if (m != warp)
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) basis[k] = rows[(m * K_STEPS + k) * 32];
#pragma unroll
      for (int i = 0; i < BLOCKS; i++) {
        float y[2][4] = {}, sum[4] = {};
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) mma(y[k & 1], basis[k].x, basis[k].y, basis[k].z, basis[k].w, rq[i][2 * k], rq[i][2 * k + 1]);
        const u32 a = transpose8x8(pack_half2(y[0][0] + y[1][0], y[0][1] + y[1][1])), b = transpose8x8(pack_half2(y[0][2] + y[1][2], y[0][3] + y[1][3]));
        if (!KEY_TRELLIS) {
          const u32 lo = center_of(2 * m), hi = center_of(2 * m + 1);
          mma(sum, lo, lo, hi, hi, a, b);
        }
        *(uint2*)(smem + Single::ROTATED + ((i * K_STEPS + m) * 32 + lane) * 8) = uint2{a, b};
        if (lane < 4) *(float2*)(smem + Single::ROTATED + BLOCKS * K_STEPS * 256 + ((i * K_STEPS + m) * 4 + lane) * 8) = float2{sum[0], sum[1]};
      }
    }
    sync_cta();
  }
  Partial exact = nothing();
  if (attends) {
    const Item item = item_of(warp, 2);
    const int mine = WIDE ? item.block : 0;
    State st;
    begin_softmax(st);
    u32 q[RUNS], rotated[RUNS], valid = ALL_SEEN;
    float shift[2] = {0, 0};
    if (c * 128 + 128 > end || any_lane(meets(excluded, c * 128))) valid = seen_tokens(excluded, c * 128, end, lane);
#pragma unroll
    for (int r = 0; r < RUNS; r++) rotated[r] = WIDE && mine ? rq[BLOCKS - 1][r] : rq[0][r];
    if (MODE == 2) {
#pragma unroll
      for (int m = 0; m < K_STEPS; m++) {
        const uint2 pair = *(const uint2*)(smem + Single::ROTATED + ((mine * K_STEPS + m) * 32 + lane) * 8);
        const float2 sum = *(const float2*)(smem + Single::ROTATED + BLOCKS * K_STEPS * 256 + ((mine * K_STEPS + m) * 4 + (lane & 3)) * 8);
        q[2 * m] = pair.x; q[2 * m + 1] = pair.y;
        shift[0] -= sum.x; shift[1] -= sum.y;
      }
      shift[0] *= SUBNORMAL;
      shift[1] *= SUBNORMAL;
    } else {
      load_query(q, shift, smem, lane, 0);
    }
    barrier_wait(full, 0);
    if (p.mask) valid = masked_tokens(valid, stage + IN_MASK, lane);
    const bool masked = any_lane(valid != ALL_SEEN);
    step<TILES_ALONE, false>(st, stage, smem + Single::MEAN, q, rotated, shift, item, item.first, mine, valid, masked, lane);
    write_warp_partial(st, (float*)(smem + Single::PARTS) + warp * R * PART, lane);
  } else if (last) {
    exact = attend_exact(side, qv, p, 0, kv, lane);
  }
  sync_cta();
  if (attends || h >= place.heads) return;
  float* slots = p.partial + (long long)CTA_Y * p.share * COLUMNS * SLOT + h * SLOT;
  Partial a = merge_warps<PAIR_WARPS>((const float*)(smem + Single::PARTS), h, lane);
  if (!last) {
    send_partial(slots + (long long)c * COLUMNS * SLOT, a, lane);
    return;
  }
  receive_partials(a, slots, COLUMNS * SLOT, c, lane);
  finish(p, 0, kv, place.first + h, lane, a, exact);
  if (better) enter_new(p, fresh, 0, kv, lane);      // nobody of this block reads the exact rows any more
}

// -- many short rows --------------------------------------------------------------------------------------------------------
//
// Every compute warp attends whole rows of its own: a row (sequence, KV head) is not divided, so nothing is merged and no block waits
// for another. Eight rows in flight per block, two queries and two results each; a service warp sees to one query head of every row of
// WARPS * R / SERVICE compute warps. Needs one or two query heads per KV head.
#if HEADS_PER_KV <= 2
constexpr int TEAMS = SERVICE / R, IN_FLIGHT = 2;                              // service warps of one team hold the heads of a row
constexpr int ROW_PART = R * PART * 4;
struct WarpQueries {                                                           // buffer IN_FLIGHT * warp + (row & 1)
  static constexpr int HEADS = R, RAW = OFF_PART + WARPS * IN_FLIGHT * ROW_PART, RAW_STEP = MODE == 0 || AHEAD ? 0 : R * 4 * RAW_ROW * 4, QT = RAW + WARPS * IN_FLIGHT * RAW_STEP;
  static constexpr int QT_STEP = MODE == 2 ? 0 : R * D * 2, SUM = QT + WARPS * IN_FLIGHT * QT_STEP;
};
constexpr int WARP_BAR = WarpQueries::SUM + WARPS * IN_FLIGHT * R * 4;         // tables, then per warp: ready, done, emptied, stages
constexpr int WARP_BARS = 3 * IN_FLIGHT + STAGES, WARP_SMEM = WARP_BAR + 8 * (1 + WARPS * WARP_BARS);
static_assert(WARP_BAR % 8 == 0, "barriers");

struct Walk { int row, last, i; };                   // items of the rows up to `last`, `items` of each, one after another

DEVICE void ask_item(const Params& p, Walk& w, int items, int kv, int lane, unsigned char* stage, u64* bar) {
  constexpr int SHIFT = halvings(ITEM_PAIRS);
  if (w.row > w.last) return;
  ask<SHIFT>(p, w.row, kv, w.i >> SHIFT, w.i & ((1 << SHIFT) - 1), lane, stage, bar);
  if (++w.i == items) { w.i = 0; w.row++; }
}

#ifndef KVSINK_EMULATE
extern "C" __device__ const int kvsink_by_warp = WARP_SMEM <= SHARED_MOST ? WARP_SMEM : 0;   // 0: not to be launched
#endif
KERNEL(THREADS, 1) attend_rows(ARGUMENT(Params) p, ARGUMENT(RowParams) fresh) {
  LAUNCH_MEMORY
  const int lane = TID & 31, warp = TID >> 5, kv = CTA_Y;
  const Place place = place_of(CTA_Y);
  u64* tables = (u64*)(smem + WARP_BAR);
  if (TID == 0) {
    barrier_init(tables, COPIERS);
    for (int w = 0; w < WARPS; w++) {
      u64* bars = tables + 1 + w * WARP_BARS;
      for (int i = 0; i < IN_FLIGHT; i++) {
        barrier_init(bars + i, R);
        barrier_init(bars + IN_FLIGHT + i, 1);
        barrier_init(bars + 2 * IN_FLIGHT + i, R);
      }
      for (int i = 0; i < STAGES; i++) barrier_init(bars + 3 * IN_FLIGHT + i, 32);
    }
    barrier_init_fence();
  }
  if (warp == 0) {
    sync_warp();
    ask_tables(p, kv, lane, smem, tables);
  }
  const int each = longest(p, lane);
  sync_cta();
  // Compute warp w of this block takes rows first_of(w) to first_of(w + 1) - 1; every lane holds one of these.
  const int begins = (int)((u32)p.B * (u32)(CTA_X * WARPS + (lane < WARPS ? lane : WARPS)) / (u32)(p.share * WARPS));
  const auto first_of = [&](int w) { return shfl_int(begins, w); };

  if (warp >= WARPS) {
    if constexpr (SHIFTS) fewer_registers<SERVICE_REGISTERS>();
    const int hq = (warp - WARPS) % R, team = (warp - WARPS) / R;
    const auto prepare = [&](int w, int n, int b) {
      if (!AHEAD) prepare_query<WarpQueries>(p, query_of(p, b, place, hq, lane), b, hq, lane, smem, w * IN_FLIGHT + (n & 1));
      sync_warp();
      if (lane == 0) barrier_arrive(tables + 1 + w * WARP_BARS + (n & 1));
      if (!hq) prefetch_exact(p, b, kv, lane);       // a row ahead of their use
    };
    int rows = 0;
#pragma unroll 1
    for (int w = team; w < WARPS; w += TEAMS) {
      const int first = first_of(w), count = first_of(w + 1) - first;
      if (count > rows) rows = count;
      if (count) prepare(w, 0, first);
    }
#pragma unroll 1
    for (int n = 0; n < rows; n++) {
#pragma unroll 1
      for (int w = team; w < WARPS; w += TEAMS) {    // the queries of all rows that come next, before any row is waited for
        const int b = first_of(w) + n + 1;
        if (b < first_of(w + 1)) prepare(w, n + 1, b);
      }
#pragma unroll 1
      for (int w = team; w < WARPS; w += TEAMS) {
        const int b = first_of(w) + n;
        if (b >= first_of(w + 1)) continue;
        u64* bars = tables + 1 + w * WARP_BARS + (n & 1);
        const bool enters = hq == 0 && fresh.segments && may_enter(fresh, b, lane);
        ExactRows side;
        load_exact(side, p, b, kv, lane, 0);
        const Partial exact = attend_exact(side, query_of(p, b, place, hq, lane), p, b, kv, lane);
        barrier_wait(bars + IN_FLIGHT, n >> 1 & 1);
        const float* part = (const float*)(smem + OFF_PART + (w * IN_FLIGHT + (n & 1)) * ROW_PART) + hq * PART;
        Partial a;
        load_channels(a.o, part, lane);
        a.m = part[D];
        a.l = part[D + 1];
        sync_warp();
        if (lane == 0) barrier_arrive(bars + 2 * IN_FLIGHT);
        finish(p, b, kv, hq, lane, a, exact);
        if (enters) {
          if (R > 1) barrier_wait(bars + 2 * IN_FLIGHT, n >> 1 & 1);           // the other heads have read the exact rows
          enter_new(p, fresh, b, kv, lane);
        }
      }
    }
    return;
  }

  if constexpr (SHIFTS) more_registers<COMPUTE_REGISTERS>();
  const int first_row = first_of(warp), last_row = first_of(warp + 1) - 1;
  if (last_row < first_row) {
    if (TABLE_BYTES && warp == 0) barrier_wait(tables, 0);     // no copy may be on its way to a block that has ended
    return;
  }
  u64 *bars = tables + 1 + warp * WARP_BARS, *full = bars + 3 * IN_FLIGHT;
  unsigned char* stages = smem + warp * STAGES * STAGE_BYTES;
  constexpr int PARTS = 4 / ITEM_PAIRS;
  const int items = each * PARTS;
  Walk fetch = {first_row, last_row, 0};
  Slots coming = exclusions(p, first_row, lane);
#pragma unroll 1
  for (int i = 0; i < STAGES; i++) ask_item(p, fetch, items, kv, lane, stages + i * STAGE_BYTES, full + i);
  int slot = 0;
  u32 parity = 0;
  if (TABLE_BYTES) barrier_wait(tables, 0);

#pragma unroll 1
  for (int b = first_row, n = 0; b <= last_row; b++, n++) {
    const int at = warp * IN_FLIGHT + (n & 1), end = end_of(p, b);
    const Slots excluded = coming;
    if (b < last_row) coming = exclusions(p, b + 1, lane);
    barrier_wait(bars + (n & 1), n >> 1 & 1);
    u32 q[RUNS];
    float shift[2] = {0, 0};
    if (MODE != 2) load_query<WarpQueries>(q, shift, smem, lane, at);
    State st;
    begin_softmax(st);
#pragma unroll 1
    for (int i = 0; i < items; i++) {
      unsigned char* stage = stages + slot * STAGE_BYTES;
      const int base = i / PARTS * 128;
      u32 valid = ALL_SEEN;
      if (base + 128 > end || any_lane(meets(excluded, base))) valid = seen_tokens(excluded, base, end, lane);
      barrier_wait(full + slot, parity >> slot & 1);
      parity ^= 1u << slot;
      if (p.mask) valid = masked_tokens(valid, stage + IN_MASK, lane);
      attend_item<WarpQueries, STEP_PAIRS>(st, q, shift, stage, smem, item_of(i % PARTS, halvings(ITEM_PAIRS)), valid, at, lane);
      sync_warp();
      ask_item(p, fetch, items, kv, lane, stage, full + slot);
      slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    if (n >= IN_FLIGHT) barrier_wait(bars + 2 * IN_FLIGHT + (n & 1), (n >> 1 & 1) ^ 1);
    write_warp_partial(st, (float*)(smem + OFF_PART + at * ROW_PART), lane);
    sync_warp();
    if (lane == 0) barrier_arrive(bars + IN_FLIGHT + (n & 1));
  }
}
#elif !defined(KVSINK_EMULATE)
extern "C" __device__ const int kvsink_by_warp = 0;
#endif
#endif
