// Where the codes of a run of 8 channels stand inside the words of a slot (kernels/layout.py has the layout).
#ifndef KVSINK_FIELDS
#define KVSINK_FIELDS

#ifndef KW
#define KW 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2  // key bits of each run of 8 components
#endif
#ifndef VW
#define VW 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2  // value bits of each run of 8 channels
#endif
#ifndef KEY_TRELLIS
#define KEY_TRELLIS 0       // 1: codes of a trellis (kernels/trellis.py); 0: equally spaced levels
#endif
#ifndef VALUE_TRELLIS
#define VALUE_TRELLIS 0
#endif
constexpr int RUNS = D / 8, K_STEPS = D / 16;        // a product takes 16 channels, or gives 16, at a time

struct Fields {             // where the w-bit field of each run sits inside 16-bit bins; half: the last has 8 bits at most, for two slots
  int width[RUNS], bin[RUNS], shift[RUNS], pos[RUNS], bins, half;   // a trellis: bin and pos of the bits beyond the lowest two
};
BOTH constexpr Fields make_fields(const int (&w)[RUNS]) {
  Fields f = {};
  int fill[RUNS] = {}, cut[RUNS] = {};
  bool open[RUNS] = {};
  for (int r = 0; r < RUNS; r++) {                  // first fit, widest runs come first
    int b = 0;
    while (fill[b] + w[r] > 16) b++;
    f.width[r] = w[r]; f.bin[r] = b;
    if (fill[b] + w[r] > 11 && !open[b]) { open[b] = true; cut[b] = fill[b]; }   // patterns up to 2047 are linear in fp16
    f.shift[r] = open[b] ? cut[b] : 0;
    f.pos[r] = fill[b] - f.shift[r];
    fill[b] += w[r];
    if (b + 1 > f.bins) f.bins = b + 1;
  }
  f.half = fill[f.bins - 1] <= 8;
  return f;
}
// Codes of a trellis: the lowest bit of run r is bit r % 16 of bin r / 16, the next one bit `low_bit` of bin `low_bin`, those beyond
// stand at the first free bits.
constexpr int SETS = RUNS > 16 ? 2 : 1;              // of up to 16 runs
constexpr bool SPLIT = RUNS > 8 && RUNS <= 12;
BOTH constexpr int low_bin(int r) { return RUNS <= 8 ? 0 : SPLIT ? (r < 8 ? 1 : 0) : SETS + r / 16; }
BOTH constexpr int low_bit(int r) { return RUNS <= 8 ? 8 + r : SPLIT && r >= 8 ? 4 + r : r % 16; }
BOTH constexpr Fields make_walk_fields(const int (&w)[RUNS]) {
  Fields f = {};
  int used[RUNS + 4] = {};
  for (int r = 0; r < RUNS; r++) {
    f.width[r] = w[r];
    used[r / 16] |= 1 << (r % 16);
    if (w[r] > 1) used[low_bin(r)] |= 1 << low_bit(r);
  }
  for (int r = 0; r < RUNS; r++) {
    const int n = w[r] - 2;
    if (n <= 0) continue;
    int b = 0, at = 0;
    while (at + n > 16 || (used[b] >> at & ((1 << n) - 1))) {
      if (++at + n > 16) { at = 0; b++; }
    }
    used[b] |= ((1 << n) - 1) << at;
    f.bin[r] = b;
    f.pos[r] = at;
  }
  while (f.bins < RUNS + 4 && used[f.bins]) f.bins++;
  f.half = used[f.bins - 1] < 256;
  return f;
}
constexpr int K_WIDTH[RUNS] = {KW}, V_WIDTH[RUNS] = {VW};
TABLE Fields KF = KEY_TRELLIS ? make_walk_fields(K_WIDTH) : make_fields(K_WIDTH);
TABLE Fields VF = VALUE_TRELLIS ? make_walk_fields(V_WIDTH) : make_fields(V_WIDTH);
constexpr int K_WORDS = 2 * KF.bins - KF.half, V_WORDS = 2 * VF.bins - VF.half;                   // 32-bit words per lane and tile of 16 tokens
constexpr int K_TILE = 32 * K_WORDS, V_TILE = 32 * V_WORDS;                   // words per tile
constexpr int K_BYTES = 8 * K_TILE * 4, V_BYTES = 8 * V_TILE * 4;             // per superblock of 128 tokens
constexpr int K_STRIDE = K_BYTES + (KEY_TRELLIS ? 128 : 0), V_STRIDE = V_BYTES + (VALUE_TRELLIS ? 128 : 0);   // with gains behind
#endif
