// Where the codes of a run of 8 channels stand inside the words of a slot: numbers of kernels/layout.py, one for every run.
#ifndef KVSINK_FIELDS
#define KVSINK_FIELDS

constexpr int RUNS = D / 8, K_STEPS = D / 16;        // a product takes 16 channels, or gives 16, at a time

struct Fields {             // the field of each run sits at bit shift + pos of a 16-bit bin; half: the last has 8 bits at most, for two slots
  int width[RUNS], bin[RUNS], shift[RUNS], pos[RUNS], bins, half;   // a trellis: bin and pos of the bits beyond the lowest two
};
// Codes of a trellis: the lowest bit of run r is bit r % 16 of bin r / 16, the next one bit `low_bit` of bin `low_bin`, those beyond
// stand at the first free bits.
constexpr int SETS = RUNS > 16 ? 2 : 1;              // of up to 16 runs
constexpr bool SPLIT = RUNS > 8 && RUNS <= 12;
BOTH constexpr int low_bin(int r) { return RUNS <= 8 ? 0 : SPLIT ? (r < 8 ? 1 : 0) : SETS + r / 16; }
BOTH constexpr int low_bit(int r) { return RUNS <= 8 ? 8 + r : SPLIT && r >= 8 ? 4 + r : r % 16; }
TABLE Fields KF = {{KEY_WIDTHS}, {KEY_BINS}, {KEY_SHIFTS}, {KEY_PLACES}, KEY_UNITS}, VF = {{VALUE_WIDTHS}, {VALUE_BINS}, {VALUE_SHIFTS}, {VALUE_PLACES}, VALUE_UNITS};
constexpr int K_WORDS = 2 * KF.bins - KF.half, V_WORDS = 2 * VF.bins - VF.half;                   // 32-bit words per lane and tile of 16 tokens
constexpr int K_TILE = 32 * K_WORDS, V_TILE = 32 * V_WORDS;                   // words per tile
constexpr int K_BYTES = 8 * K_TILE * 4, V_BYTES = 8 * V_TILE * 4;             // per superblock of 128 tokens
constexpr int K_STRIDE = K_BYTES + (KEY_TRELLIS ? 128 : 0), V_STRIDE = V_BYTES + (VALUE_TRELLIS ? 128 : 0);   // with gains behind
#endif
