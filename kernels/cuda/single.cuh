// The kernel of one decode step of one sequence that is short: a block for each superblock and KV head, in one pass.
//
// Formula    as step.cuh; latency is all, so everything that does not depend on the length is asked for before the length is known
// Layout     warps 0-3 attend to a tile pair each, warps 4-7 see to a query head each; block KLT: all eight turn the query into the
//            basis, a row of its tiles each, straight from the L2 cache
// Needs      B = 1 and as many blocks of a head as superblocks can be held; those behind the last token end early
#ifndef KVSINK_SINGLE
#define KVSINK_SINGLE

constexpr int PAIR_WARPS = 4, SINGLE_THREADS = 256;
constexpr int OFF_TURNED = OFF_PART + PAIR_WARPS * 4 * PART * 4;                 // query in the basis, 16 x 32 words, and 8 x 4 sums
static_assert(MODE != 2 || OFF_TURNED + 2048 + 256 <= OFF_RAW, "it lies where attend_packed has the partials of more warps");
static_assert(SERVICE == PAIR_WARPS && WARPS >= 2 * PAIR_WARPS, "warps");

// 2^pos (2^w - 1) / 2 of a run, twice, as fp16 bits: `Center` of a run known at run time.
constexpr u64 K_POSITIONS = nibbles(KF.pos, NOTHING);
DEVICE u32 center_of(int run) {
  const float x = 0.5f * (float)(((1 << nibble(K_WIDTHS, run)) - 1) << nibble(K_POSITIONS, run));
  return pack_half2(x, x);
}

KERNEL(SINGLE_THREADS, 1) attend_single(ARGUMENT(Params) p, ARGUMENT(RowParams) fresh) {
  LAUNCH_MEMORY
  const int lane = TID & 31, warp = TID >> 5, head = CTA_Y, c = CTA_X, hq = warp - PAIR_WARPS;
  const bool attends = warp < PAIR_WARPS;
  u64* full = (u64*)(smem + OFF_BAR) + warp;
  unsigned char* stage = smem + warp * STAGE_BYTES;

  if (attends && lane == 0) {
    barrier_init(full, MODE != 0 ? 2 : 1);
    barrier_init_fence();
  }
  if (attends) {
    sync_warp();
    Work work = {0, 0, c, 2, 4, warp, true};
    request(p, work, Rows{}, head, warp, lane, stage, full);
    if (MODE != 0 && lane == 0) {                    // the pair's part of the table of the mean's logit
      barrier_expect(full, 4096);
      bulk_load(smem + OFF_MEAN + warp * 4096, p.mean + head * 4096 + warp * 1024, 4096, full);
    }
  }
  const long long length = *p.length;
  const int excluded = lane < p.E ? p.exact_slot[lane] : -1;
  uint4 basis[8], rot[4];
  if (MODE == 2)
#pragma unroll
    for (int k = 0; k < 8; k++) basis[k] = ((const uint4*)p.basis)[head * 2048 + (warp * 8 + k) * 32 + lane];
  if (MODE == 2 || (MODE == 1 && attends)) load_rotation(rot, p.rotation + c * 128, lane);
  uint2 qv = {0, 0};
  uint4 mean = {0, 0, 0, 0};
  ExactRows side;
  bool better = false;                               // the new row than some exact one, for the warp that sees to it
  if (!attends) {
    const int from = hq < R ? hq : R - 1;            // spare columns repeat a head; their results are dropped
    qv = load4(p.q, ((long long)head * R + from) * D + 4 * lane);
    float4 tc = {1, 1, 1, 1}, ts = {0, 0, 0, 0};
    if (p.anchor_cos) tc = *(const float4*)(p.anchor_cos + 4 * lane);
    if (p.anchor_sin) ts = *(const float4*)(p.anchor_sin + 4 * lane);
    if (p.value_mean) mean = *(const uint4*)(p.value_mean + head * D + 4 * lane);
    prepare_query(p, qv, tc, ts, hq, lane, smem, 0);
  }
  sync_cta();
  const int known = (int)length + p.extra, end = known < p.tiles * 128 ? known : p.tiles * 128, each = end < 1 ? 1 : (end + 127) / 128;
  if (c >= each) {
    if (attends) barrier_wait(full, 0);              // no copy may be on its way to a block that has ended
    return;
  }
  const bool last = c == each - 1;
  if (!attends && last) {
    load_exact(side, p, 0, head, lane, 0);
    better = hq == 0 && fresh.segments && may_enter(fresh, 0, lane);
  }
  u32 q[16], rq[16];
  float shift[2] = {0, 0};
  if (MODE == 2 || (MODE == 1 && attends)) rotate_query(rq, rot, smem, lane, 0);
  if (MODE == 2) {
    float y[2][4] = {}, sum[4] = {};
#pragma unroll
    for (int k = 0; k < 8; k++) mma(y[k & 1], basis[k].x, basis[k].y, basis[k].z, basis[k].w, rq[2 * k], rq[2 * k + 1]);
    const u32 a = transpose8x8(pack_half2(y[0][0] + y[1][0], y[0][1] + y[1][1])), b = transpose8x8(pack_half2(y[0][2] + y[1][2], y[0][3] + y[1][3]));
    const u32 lo = center_of(2 * warp), hi = center_of(2 * warp + 1);
    mma(sum, lo, lo, hi, hi, a, b);
    *(uint2*)(smem + OFF_TURNED + (warp * 32 + lane) * 8) = uint2{a, b};
    if (lane < 4) *(float2*)(smem + OFF_TURNED + 2048 + (warp * 4 + lane) * 8) = float2{sum[0], sum[1]};
    sync_cta();
  }
  Partial exact = {{0, 0, 0, 0}, NEG_INF, 0};
  if (attends) {
    if (MODE == 2) {
#pragma unroll
      for (int m = 0; m < 8; m++) {
        const uint2 pair = *(const uint2*)(smem + OFF_TURNED + (m * 32 + lane) * 8);
        const float2 sum = *(const float2*)(smem + OFF_TURNED + 2048 + (m * 4 + (lane & 3)) * 8);
        q[2 * m] = pair.x; q[2 * m + 1] = pair.y;
        shift[0] -= sum.x; shift[1] -= sum.y;
      }
      shift[0] *= 5.9604644775390625e-08f;           // 2^-24, the unit of a subnormal code
      shift[1] *= 5.9604644775390625e-08f;
    } else {
      load_query(q, shift, smem, lane, 0);
    }
    State st;
    begin_softmax(st);
    u32 valid = 0xff;
    bool masked = c * 128 + 128 > end || any_lane(excluded >= c * 128 && excluded < c * 128 + 128);
    if (masked) valid = seen_tokens(excluded, c * 128, end, lane);
    barrier_wait(full, 0);
    if (p.mask) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const u32 m = *(const unsigned short*)(stage + IN_MASK + (lane & 2) * 32 + 16 * j + 2 * (lane >> 2));
        valid &= ~(((m & 1) ^ 1) << (2 * j) | (~m >> 8 & 1) << (2 * j + 1));
      }
      masked = any_lane(valid != 0xff);
    }
    if (masked) step<true, 1>(st, stage, smem, q, rq, shift, warp, warp, valid, lane);
    else step<false, 1>(st, stage, smem, q, rq, shift, warp, warp, valid, lane);
    write_warp_partial(st, (float*)(smem + OFF_PART) + warp * 4 * PART, lane);
  } else if (last) {
    exact = attend_exact(side, qv, p, 0, head, lane);
  }
  sync_cta();
  if (attends || hq >= R) return;
  Partial a = merge_warps<PAIR_WARPS>((const float*)(smem + OFF_PART), hq, lane);
  float* slots = p.partial + (long long)head * p.share * 4 * PART + hq * PART;
  if (!last) {
    send_partial(slots + (long long)c * 4 * PART, a, lane);
    return;
  }
  receive_partials(a, slots, 4 * PART, c, lane);
  finish(p, 0, head, hq, lane, a, exact, mean);
  if (better) {                                      // nobody reads this head's exact rows any more
    const long long at = (long long)head * D + 4 * lane;
    enter_exact(fresh, load4(p.new_k, at), load4(p.new_v, at), 0, head, (int)length, lane);
  }
}
#endif
