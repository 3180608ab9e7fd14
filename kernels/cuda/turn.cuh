// A launch ahead of attention: the query of every block of 64 tokens in the basis of its codes, and the mean's logits there.
//
// Layout     a warp holds 32 rows of the basis in registers and its part of the mean's table in shared memory. Eight units of 8 columns at
//            a time: each warp rotates the query of one, all warps take all of them to their rows. A unit is as many blocks as give 8
//            columns
// Shapes     256 channels; TURNED_BYTES of a block and key-value head, as attend.cuh has them
#ifndef KVSINK_TURN
#define KVSINK_TURN

#if MODE == 2 && HEAD_DIM > 128
constexpr int TURN_WARPS = 8, TURN_BLOCKS = 8 / HELD;
struct Turn {
  static constexpr int HEADS = HELD, MEAN = TURN_WARPS * RUNS * 128, RAW = MEAN + MEAN_BYTES, QT = 0, SUM = 0, RAW_STEP = 0, QT_STEP = 0;
  static constexpr int BYTES = RAW + HELD * 4 * RAW_ROW * 4;
};
#ifndef KVSINK_EMULATE
extern "C" __device__ const int kvsink_turn[3] = {32 * TURN_WARPS, Turn::BYTES, 2 * TURNED_BYTES};
#endif
KERNEL(32 * TURN_WARPS, 1) turn_queries(ARGUMENT(Params) p) {
  LAUNCH_MEMORY
  static_assert(AHEAD && K_STEPS == 2 * TURN_WARPS, "rows of the basis");
  const int lane = TID & 31, warp = TID >> 5, g = lane >> 2, t = lane & 3;
  const Place place = place_of(CTA_Y);
  const uint4* rows = (const uint4*)p.basis + (long long)place.kv * (BASIS_BYTES / 16) + 2 * warp * K_STEPS * 32 + lane;
  uint4 basis[2][K_STEPS];
#pragma unroll
  for (int k = 0; k < K_STEPS; k++) {
    basis[0][k] = rows[k * 32];
    basis[1][k] = rows[(K_STEPS + k) * 32];
  }
  const uint4* from = (const uint4*)p.mean + place.kv * (MEAN_BYTES / 16);
  for (int i = TID; i < MEAN_BYTES / 16; i += 32 * TURN_WARPS) ((uint4*)(smem + Turn::MEAN))[i] = from[i];
  const uint4* mean = (const uint4*)(smem + Turn::MEAN) + (warp & 3) * 32 * K_STEPS + lane;
  const int blocks = 2 * longest(p, lane), each = (blocks + TURN_BLOCKS - 1) / TURN_BLOCKS;
  const u32 total = (u32)(p.B * each);
  const int last = (int)((u64)total * (CTA_X + 1) / GRID_X);
  int held = -1;
  for (int first = (int)((u64)total * CTA_X / GRID_X); first < last;) {
    const int b = first / each, i0 = first - b * each, rest = last - first < each - i0 ? last - first : each - i0;
    const int count = rest < TURN_WARPS ? rest : TURN_WARPS;
    if (b != held) {                               // nobody reads the query of another row any more
      if (warp < HELD) prepare_query<Turn>(p, query_of(p, b, place, warp, lane), b, warp, lane, smem, 0);
      held = b;
    }
    sync_cta();
    if (warp < count) {
      const int block = (i0 + warp) * TURN_BLOCKS + g / HELD;
      Rotation rot;
      u32 rq[RUNS];
      load_rotation(rot, p.rotation, block < blocks ? block : blocks - 1, lane);
      rotate_query<Turn>(rq, rot, smem, lane, 0);
#pragma unroll
      for (int i = 0; i < RUNS / 4; i++)
        ((uint4*)smem)[(warp * (RUNS / 4) + i) * 32 + lane] = uint4{rq[4 * i], rq[4 * i + 1], rq[4 * i + 2], rq[4 * i + 3]};
    }
    sync_cta();
    unsigned char* row = p.turned + ((long long)b * p.Hkv * GROUPS + CTA_Y) * p.tiles * 2 * TURNED_BYTES;
#pragma unroll 1
    for (int n = 0; n < count; n += 2) {           // two units side by side, as a chain of products waits for each of them
      float y[2][2][4] = {}, z[2][4] = {};         // unit, product; two halves of the logits of one of the units
#pragma unroll
      for (int i = 0; i < RUNS / 4; i++) {
        const uint4 v[2] = {((const uint4*)smem)[(n * (RUNS / 4) + i) * 32 + lane], ((const uint4*)smem)[((n + 1) * (RUNS / 4) + i) * 32 + lane]};
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const uint4 a = basis[j][2 * i], c = basis[j][2 * i + 1];
#pragma unroll
          for (int m = 0; m < 2; m++) mma(y[m][j], a.x, a.y, a.z, a.w, v[m].x, v[m].y);
#pragma unroll
          for (int m = 0; m < 2; m++) mma(y[m][j], c.x, c.y, c.z, c.w, v[m].z, v[m].w);
        }
        const uint4 a = mean[2 * i * 32], c = mean[(2 * i + 1) * 32], x = warp < 4 ? v[0] : v[1];
        mma(z[0], a.x, a.y, a.z, a.w, x.x, x.y);
        mma(z[1], c.x, c.y, c.z, c.w, x.z, x.w);
      }
#pragma unroll
      for (int m = 0; m < 2; m++) {
        const int at = (i0 + n + m) * TURN_BLOCKS + g / HELD;
        u32 w[4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          w[2 * j] = transpose8x8(pack_half2(y[m][j][0], y[m][j][1]));
          w[2 * j + 1] = transpose8x8(pack_half2(y[m][j][2], y[m][j][3]));
        }
        if (n + m < count && at < blocks) ((uint4*)(row + at * TURNED_BYTES))[(warp * HELD + g % HELD) * 4 + t] = uint4{w[0], w[1], w[2], w[3]};
      }
      const int unit = n + warp / 4, at = (i0 + unit) * TURN_BLOCKS + 2 * t / HELD;
      if (unit < count && at < blocks)
        ((float4*)(row + at * TURNED_BYTES + TURNED_QUERY))[((warp & 3) * (HELD / 2) + 2 * t % HELD / 2) * 8 + g] =
            float4{z[0][0] + z[1][0], z[0][1] + z[1][1], z[0][2] + z[1][2], z[0][3] + z[1][3]};
    }
    first += count;
  }
}
#endif
#endif
