// Rows into codes of a trellis: the best circular walks, one of 8 circles from one of 4 first states a lane, and their gain.
//
// Formula    kernels/trellis.py; two searches, four where a run has more than 4 bits; the best one counts
// Exact      walks as the definition finds them: products, differences and sums of a walk are rounded in its order; the sums of the
//            gain and of the error of a search differ in order
#ifndef KVSINK_SEARCH
#define KVSINK_SEARCH

struct WalkTable { float level[6][128], edge[6][4][32]; };   // by bits less one: levels; half-way marks between those of a subset
BOTH constexpr WalkTable make_walk_table() {
  WalkTable t = {};
  for (int w = 1; w <= 6; w++) {
    for (int i = 0; i < 2 << w; i++) t.level[w - 1][i] = walk_level(w, i);
    for (int s = 0; s < 4; s++)
      for (int m = 0; m + 1 < 1 << (w - 1); m++) t.edge[w - 1][s][m] = (t.level[w - 1][4 * m + 4 + s] + t.level[w - 1][4 * m + s]) / 2;
  }
  return t;
}
TABLE WalkTable WALK_TABLE = make_walk_table();
TABLE float STARTS[2] = {0.9f, 1.1f}, WIDE_STARTS[4] = {0.8f, 0.95f, 1.1f, 1.3f};   // gains that are searched with, in units of the row's rms
constexpr int ALONE = RUNS % 4 ? 2 : 4, AMONG = 1;  // TOGETHER where one row is all there is, and where many are
constexpr int WALK_ROW = 2 * D;                      // floats of shared memory a warp searches in: weights, then the row over its gain

DEVICE u32 gain_byte(float g) {
  if (!(g > 0.5f * gain_of(1))) return 0;
  const u32 bits = float_bits(g), byte = ((bits + 0x3ffffu + (bits >> 19 & 1)) >> 19) - (118u << 4);
  return byte < 1 || byte > 0x7fffffffu ? 1 : byte > 254 ? 254 : byte;
}
// The nearest level of a subset, and its place there. ROUNDS: as many for all widths, so that several such searches run side by
// side, those that fewer bits need not doing nothing; 0: as many as the width asks for.
template <int ROUNDS> DEVICE u32 nearest(float& level, float v, int subset, int width) {
  u32 m = 0, half = 1u << (width - 1) >> 1;
  if constexpr (ROUNDS == 0) {
    for (; half; half >>= 1) m += v > WALK_TABLE.edge[width - 1][subset][m + half - 1] ? half : 0u;
  } else {
#pragma unroll
    for (int round = 0; round < ROUNDS; round++, half >>= 1) m += half && v > WALK_TABLE.edge[width - 1][subset][half ? m + half - 1 : 0] ? half : 0u;
  }
  level = WALK_TABLE.level[width - 1][4 * m + subset];
  return m;
}

// The lowest bits of a circle's best walk for a row v, the bit of a step at its place. Four neighbouring lanes search and agree.
// TOGETHER: steps whose costs are found side by side, as each waits for the tables; what they take is registers.
template <class Width, int TOGETHER> DEVICE u32 best_walk(const float* weights, const float* v, int circle, int lane) {
  const int first = lane & 3;                        // a lane costs the subset of the same number
  float a[4];                                        // of the walks that end in a state, bit 0 the newest
#pragma unroll
  for (int s = 0; s < 4; s++) a[s] = s == first ? 0.0f : bits_float(0x7f800000u);
  constexpr int PARTS = (RUNS + 7) / 8;
  u32 taken[PARTS];
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    taken[part] = 0;
#pragma unroll (TOGETHER == 1 ? 2 : 1)
    for (int k = 0; k < (RUNS - 8 * part < 8 ? RUNS - 8 * part : 8); k += TOGETHER) {
      float c[TOGETHER][4], b[4];
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) {
        const int step = 8 * part + k + i, at = 8 * step + circle;
        float level;
        nearest<TOGETHER == 1 ? 0 : Width::most() - 1>(level, v[at], first, Width::at(step));
        const float off = sub(v[at], level), cost = mul(mul(off, off), weights[at]);
#pragma unroll
        for (int s = 0; s < 4; s++) c[i][s] = shfl_float(cost, (lane & 28) + s);
      }
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) {
        u32 bits = 0;
#pragma unroll
        for (int s = 0; s < 4; s++) {                // from states s / 2 and s / 2 + 2, whose oldest bit is 0 and 1
          const int subset = 2 * (s & 1) + (s >> 1);
          const float zero = add(a[s >> 1], c[i][subset]), one = add(a[(s >> 1) + 2], c[i][subset ^ 2]);
          bits |= one < zero ? 1u << s : 0u;
          b[s] = one < zero ? one : zero;
        }
#pragma unroll
        for (int s = 0; s < 4; s++) a[s] = b[s];
        taken[part] |= bits << 4 * (k + i);
      }
    }
  }
  float least = first == 0 ? a[0] : first == 1 ? a[1] : first == 2 ? a[2] : a[3];
  int state = first;
#pragma unroll
  for (int mask = 1; mask < 4; mask <<= 1) {
    const float other = shfl_xor(least, mask);
    const int from = shfl_int(state, lane ^ mask);
    if (other < least || (other == least && from < state)) { least = other; state = from; }
  }
  const int winner = (lane & 28) + state;
  u32 walk = 0;
#pragma unroll
  for (int part = PARTS - 1; part >= 0; part--) {
    const u32 of_best = (u32)shfl_int((int)taken[part], winner);
#pragma unroll
    for (int k = 7; k >= 0; k--) {
      if (8 * part + k >= RUNS) continue;
      walk |= (u32)(state & 1) << (8 * part + k);
      state = (state >> 1) + 2 * (int)(of_best >> (4 * k + state) & 1);
    }
  }
  return walk;
}
// The code of a step in a walk, for v.
template <class Width> DEVICE u32 walked_code(float& level, u32 walk, float v, int step) {
  const auto bit = [&](int at) { return walk >> at % RUNS & 1; };
  const u32 u = bit(step), z1 = u ^ bit(step + RUNS - 2), z0 = bit(step + RUNS - 1);
  return 2 * nearest<0>(level, v, 2 * z1 + z0, Width::at(step)) + u;
}
template <int SEARCHES> DEVICE float first_gain(int n, float size) {
  return fmaxf(gain_of(gain_byte(mul(SEARCHES == 2 ? STARTS[n & 1] : WIDE_STARTS[n], size))), gain_of(1));
}
// The byte of the gain that fits levels best, and the error it leaves but for what no gain changes.
DEVICE u32 fitted_gain(float& error, float dot, float square) {
  const u32 byte = gain_byte(quotient(dot, square));
  const float g = gain_of(byte);
  error = g * (square * g - 2 * dot);
  return byte;
}

// Codes of a row x and the byte of its gain; `row` has WALK_ROW floats.
template <class Width, int TOGETHER> DEVICE u32 encode_walk(u32 (&code)[CH], const float (&x)[CH], float (&sigma)[CH], float* row, int lane) {
  const int step = holds(lane) ? CH * lane >> 3 : 0;
  float y[CH], weight[CH], top[CH], most = 0, square = 0;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < CH; i++) { sigma[i] = fmaxf(sigma[i], HALF_TINY); most = fmaxf(most, sigma[i]); }
  most = warp_max(most);
#pragma unroll
  for (int i = 0; i < CH; i++) top[i] = most;
  quotients(y, x, sigma);
  quotients(weight, sigma, top);
#pragma unroll
  for (int i = 0; i < CH; i++) finite = finite && sub(y[i], y[i]) == 0.0f;
  finite = !any_lane(!finite);
#pragma unroll
  for (int i = 0; i < CH; i++) {
    y[i] = finite ? y[i] : 0.0f;
    weight[i] = holds(lane) ? mul(weight[i], weight[i]) : 0.0f;
    square += mul(y[i], y[i]);
    if (holds(lane)) row[CH * lane + i] = weight[i];
  }
  const float size = root(warp_sum(square) / (float)D);
  u32 gain = 0;
  float least = 0;
#pragma unroll 1                                       // small code
  for (int n = 0; n < Width::searches(); n++) {
    const float start = first_gain<Width::searches()>(n, size);
    float v[CH], under[CH], dot = 0, own = 0, error;
    u32 found[CH];
#pragma unroll
    for (int i = 0; i < CH; i++) under[i] = start;
    quotients(v, y, under);
#pragma unroll
    for (int i = 0; i < CH; i++)
      if (holds(lane)) row[D + CH * lane + i] = v[i];
    sync_warp();
    const u32 walk = best_walk<Width, TOGETHER>(row, row + D, lane >> 2, lane);
    sync_warp();
#pragma unroll
    for (int i = 0; i < CH; i++) {
      const u32 mine = (u32)shfl_int((int)walk, (CH * lane & 7) * 4 + 4 * i);   // of circle (CH lane + i) % 8
      float level;
      found[i] = walked_code<Width>(level, mine, v[i], step);
      const float weighted = mul(weight[i], level);
      dot += mul(weighted, y[i]);
      own += mul(weighted, level);
    }
    warp_sums(dot, own);
    const u32 byte = fitted_gain(error, dot, own);
    if (n == 0 || error < least) {
      least = error;
      gain = byte;
#pragma unroll
      for (int i = 0; i < CH; i++) code[i] = found[i];
    }
  }
  return finite ? gain : 255u;
}
#endif
