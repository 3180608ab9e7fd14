// The kernel of one decode step: attention of one new row per sequence (attend.cuh), which then enters the exact rows if it is
// better than one of them. Attention reads the new row as it came, so its coding (rows.cuh) may run beside this kernel.
#ifndef KVSINK_STEP
#define KVSINK_STEP

KERNEL(THREADS, 1) attend_packed(ARGUMENT(Params) p, ARGUMENT(RowParams) fresh) {
  LAUNCH_MEMORY
  const int lane = TID & 31, warp = TID >> 5, head = CTA_Y;
  u64* bars = (u64*)(smem + OFF_BAR);
  u64 *tables = bars, *ready = bars + 1, *done = bars + 3, *emptied = bars + 4;   // ready: two buffers of query rows

  if (TID == 0) {
    barrier_init(tables, 1);
    barrier_init(ready, SERVICE); barrier_init(ready + 1, SERVICE);
    barrier_init(done, WARPS);
    barrier_init(emptied, SERVICE);
    for (int i = 0; i < WARPS * STAGES; i++) barrier_init(bars + 8 + i, 1);
    barrier_init_fence();
    if (MODE != 0) {
      barrier_expect(tables, 16384 + (MODE == 2 ? 32768 : 0));
      bulk_load(smem + OFF_MEAN, p.mean + head * 4096, 16384, tables);
      if (MODE == 2) bulk_load(smem + OFF_BASIS, p.basis + head * 8192, 32768, tables);
    }
  }
  const int held = (int)*p.length + p.extra, end = held < p.tiles * 128 ? held : p.tiles * 128, each = end < 1 ? 1 : (end + 127) / 128;
  const u32 total = (u32)(p.B * each), nc = (u32)p.share < total ? p.share : total, c = CTA_X;
  sync_cta();
  if (c >= nc) {
    if (MODE != 0 && warp == 0) barrier_wait(tables, 0);       // no copy may be on its way to a block that has ended
    return;
  }
  Rows rows = {each, {(int)(total * c / nc), (int)(total * (c + 1) / nc)}};
  const int first_row = rows.range.u0 / each, last_row = (rows.range.u1 - 1) / each;
  const bool tail = (last_row + 1) * each > rows.range.u1;      // the last row goes on in later blocks: send what we have of it

  if (warp >= WARPS) {                               // service warps, one query head each
    fewer_registers<SERVICE_REGISTERS>();
    const int hq = warp - WARPS, from = hq < R ? hq : R - 1;     // spare columns repeat a head; their results are dropped
    const bool waits = first_row * each < rows.range.u0 && !(first_row == last_row && tail);
    Partial held = {{0, 0, 0, 0}, NEG_INF, 0}, held_exact = held;
    bool held_enters = false, entering = false;
    const auto query = [&](int b) { return load4(p.q, ((long long)(b * p.Hkv + head) * R + from) * D + 4 * lane); };
    const auto angle = [&](const float* table, int b, float none) {
      return table ? *(const float4*)(table + b * D + 4 * lane) : float4{none, none, none, none};
    };
    uint2 qv = query(first_row);
    float4 tc = angle(p.anchor_cos, first_row, 1.0f), ts = angle(p.anchor_sin, first_row, 0.0f);
    uint4 mean = {0, 0, 0, 0};
    if (p.value_mean) mean = *(const uint4*)(p.value_mean + head * D + 4 * lane);
    if (!(first_row == last_row && tail)) prefetch_exact(p, first_row, head, lane);
    prepare_query(p, qv, tc, ts, hq, lane, smem, 0);   // before any other load: they would queue behind everybody's packed rows
    sync_warp();
    if (lane == 0) barrier_arrive(ready);
    for (int b = first_row, n = 0;; b++, n++) {
      Partial a, exact = {{0, 0, 0, 0}, NEG_INF, 0};
      int out = b;
      if (b <= last_row) {
        const bool send = b == last_row && tail;
        uint2 next = qv;
        if (b < last_row) {
          next = query(b + 1);
          tc = angle(p.anchor_cos, b + 1, 1.0f);
          ts = angle(p.anchor_sin, b + 1, 0.0f);
          prepare_query(p, next, tc, ts, hq, lane, smem, (n + 1) & 1);
          sync_warp();
          if (lane == 0) barrier_arrive(ready + ((n + 1) & 1));
        }
        ExactRows side;
        const bool enters = hq == 0 && !send && fresh.segments && may_enter(fresh, b, lane);
        if (!send) load_exact(side, p, b, head, lane, 0);
        if (!send) exact = attend_exact(side, qv, p, b, head, lane);
        qv = next;
        barrier_wait(done, n & 1);
        a = merge_warps((const float*)(smem + OFF_PART), hq, lane);
        sync_warp();
        if (lane == 0) barrier_arrive(emptied);
        if (hq == 0 && fresh.segments) barrier_wait(emptied, n & 1);   // every warp has read the exact rows
        if (send) {
          if (hq < R) send_partial(p.partial + ((long long)head * p.share + c) * 4 * PART + hq * PART, a, lane);
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
        if (!waits || hq >= R) break;
        const u32 origin = ((u32)(first_row * each + 1) * nc - 1) / total;   // the block that holds the row's first superblock
        a = held;
        exact = held_exact;
        receive_partials(a, p.partial + ((long long)head * p.share + origin) * 4 * PART + hq * PART, 4 * PART, c - origin, lane);
        out = first_row;
        entering = held_enters;
      }
      if (hq < R) finish(p, out, head, hq, lane, a, exact, mean);
      if (entering) {                                // nobody reads this head's exact rows of the sequence any more
        const long long at = ((long long)out * p.Hkv + head) * D + 4 * lane;
        enter_exact(fresh, load4(p.new_k, at), load4(p.new_v, at), out, head, (int)*p.length, lane);
      }
      if (b > last_row) break;
    }
    return;
  }

  more_registers<COMPUTE_REGISTERS>();
  const int g = lane >> 2, t = lane & 3;
  u64* full = bars + 8 + warp * STAGES;
  unsigned char* stages = smem + warp * STAGES * STAGE_BYTES;
  float* part = (float*)(smem + OFF_PART) + warp * 4 * PART;
  Work fetch;
  fetch.row = first_row; fetch.last = last_row; fetch.valid = true;
  enter_row(fetch, rows, warp);
  settle(fetch, rows, warp);
  const auto exclusions = [&](int b) { return lane < p.E ? p.exact_slot[b * p.E + lane] : -1; };
  int coming = exclusions(first_row);                // before the packed rows: it would queue behind them
  request(p, fetch, rows, head, warp, lane, stages, full);
  int slot = 0;
  u32 parity = 0;

  for (int b = first_row, n = 0; b <= last_row; b++, n++) {
    Work work;
    work.row = work.last = b;
    enter_row(work, rows, warp);
    const int at = n & 1;
    const int excluded = coming;
    if (b < last_row) coming = exclusions(b + 1);
    barrier_wait(ready + at, n >> 1 & 1);
    if (n == 0)                                      // not before every warp has asked for its first stage
      for (int i = 1; i < STAGES; i++) request(p, fetch, rows, head, warp, lane, stages + i * STAGE_BYTES, full + i);
    u32 q[16], rq[16];
    float shift[2] = {0, 0};
    if (MODE != 2) load_query(q, shift, smem, lane, at);
    State st;
    begin_softmax(st);
    if (MODE != 0 && n == 0) barrier_wait(tables, 0);

    for (; work.i < work.items; work.i += WARPS) {
      unsigned char* stage = stages + slot * STAGE_BYTES;
      const int base = (work.first + (work.i >> work.shift)) * 128;
      const int np = 4 >> work.shift, pr0 = (work.i & ((1 << work.shift) - 1)) * np;
      const bool partial = base + 128 > end || any_lane(excluded >= base && excluded < base + 128);
      u32 valid = 0xff;
      if (partial) {
        valid = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int token = base + (t >> 1) * 64 + (i >> 1) * 16 + 2 * g + (i & 1);
          if (token < end) valid |= 1u << i;
        }
        for (int e = 0; e < p.E; e++) {
          const int s = shfl_int(excluded, e) - base;
          if (s >= 0 && s < 128 && (s >> 6) == (t >> 1) && ((s & 15) >> 1) == g) valid &= ~(1u << (((s & 63) >> 4) * 2 + (s & 1)));
        }
      }
      barrier_wait(full + slot, parity >> slot & 1);
      parity ^= 1u << slot;
      bool masked = partial;
      if (p.mask) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const u32 m = *(const unsigned short*)(stage + IN_MASK + (t >> 1) * 64 + 16 * i + 2 * g);
          valid &= ~(((m & 1) ^ 1) << (2 * i) | (~m >> 8 & 1) << (2 * i + 1));
        }
        masked = any_lane(valid != 0xff);
      }
      if (MODE != 0) {
        uint4 rot[4];
        load_rotation(rot, stage + IN_ROT, lane);
        rotate_query(rq, rot, smem, lane, at);
      }
      if (MODE == 2) transform_query(q, shift, rq, smem, lane);
      if (!masked)
#pragma unroll 1
        for (int pr = pr0; pr < pr0 + np; pr += STEP_PAIRS) step<false>(st, stage, smem, q, rq, shift, pr0, pr, valid, lane);
      else
#pragma unroll 1
        for (int pr = pr0; pr < pr0 + np; pr += STEP_PAIRS) step<true>(st, stage, smem, q, rq, shift, pr0, pr, valid, lane);
      sync_warp();
      request(p, fetch, rows, head, warp, lane, stage, full + slot);
      slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    if (n) barrier_wait(emptied, (n - 1) & 1);
    write_warp_partial(st, part, lane);
    sync_warp();
    if (lane == 0) barrier_arrive(done);
  }
}
#endif
