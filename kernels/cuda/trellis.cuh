// Codes of a trellis (kernels/trellis.py) as operands: the levels of a lane's circles, two codes of one run a word.
//
// Formula    index = 4 m + 2 (u_t ^ u_(t-2)) + u_(t-1); a lane holds the whole of its circles, so shifts of a word give u_(t-1), u_(t-2)
//            1 and 2 bits: level / a = a number whose float16 has nothing in its lower byte: `prmt` takes the upper bytes of four codes
//            at a time from a table of two registers, and puts a zero below each
//            3 to 6 bits: level / a = j (1 + c/a j^2) in fp16
//            a is folded into the query (keys) or into the final scaling (values)
// Words      a pair of rows or slots x 8 runs is a byte of indices: byte c + 2 B is circle c (half of a word), runs 8 B … 8 B + 7;
//            at 64 channels B is the row. Nibble k of it, in word j, is run 8 B + 4 k + j; of 80 and 96 channels the last are unused
// Cost       about 21 operations for the indices of 32 codes and three for every four levels of 1 and 2 bits
#ifndef KVSINK_TRELLIS
#define KVSINK_TRELLIS

#ifndef WALK_LEVELS
#define WALK_LEVELS 0.3, 1.0, 4.0, 0.135, 1.25, 4.0, 8.0, 14.0   // of 1 and 2 bits: a, and the positive levels in it
#endif
#ifndef CUBIC
#define CUBIC 0.1674, 0.002607, 0.0840, 0.0003961, 0.0430, 5.63e-5, 0.0220, 7.99e-6   // a and c of 3 to 6 bits
#endif
TABLE double WALK_NUMBER[8] = {WALK_LEVELS}, WALK_CUBIC[8] = {CUBIC};
BOTH constexpr double walk_a(int width) { return width <= 2 ? WALK_NUMBER[3 * width - 3] : WALK_CUBIC[2 * width - 6]; }
BOTH constexpr double walk_number(int width, int index) {      // of 1 and 2 bits: a level in units of a
  const int half = 1 << width, at = index < half ? half - 1 - index : index - half;
  const double x = WALK_NUMBER[3 * width - 2 + at];
  return index < half ? -x : x;
}
BOTH constexpr float walk_level(int width, int index) {
  const double j = index - 0.5 * ((2 << width) - 1);
  return (float)(width <= 2 ? walk_a(width) * walk_number(width, index) : walk_a(width) * j + WALK_CUBIC[2 * width - 5] * (j * j * j));
}
BOTH constexpr float walk_unit(int width) { return (float)walk_a(width); }
BOTH constexpr u32 half_bits(double x) {             // of a normal float16 or 0
  if (x == 0) return 0;
  const u32 sign = x < 0 ? 0x8000u : 0;
  double y = x < 0 ? -x : x;
  int e = 15;
  while (y >= 2) { y /= 2; e++; }
  while (y < 1) { y *= 2; e--; }
  const double m = (y - 1) * 1024;
  int n = (int)m;
  if (m - n > 0.5 || (m - n == 0.5 && (n & 1))) n++;
  return sign | (u32)((e << 10) + n);
}
BOTH constexpr u32 twice(double x) { return half_bits(x) | half_bits(x) << 16; }
BOTH constexpr u32 upper_bytes(int width, int from) {           // of four levels; 1 bit: there are four, told twice
  u32 v = 0;
  for (int i = 0; i < 4; i++) v |= half_bits(walk_number(width, (from + i) & ((2 << width) - 1))) >> 8 << 8 * i;
  return v;
}
BOTH constexpr bool upper_alone(int width) {
  for (int i = 0; i < 2 << width; i++)
    if (half_bits(walk_number(width, i)) & 255u) return false;
  return true;
}
static_assert(upper_alone(1) && upper_alone(2), "a level with more than three digits");
template <int WIDTH> DEVICE u32 four_levels(u32 three) {        // the upper bytes of four levels
  constexpr u32 lo = upper_bytes(WIDTH, 0), hi = upper_bytes(WIDTH, 4);
  return take_bytes(lo, hi, three);
}
DEVICE float gain_of(u32 byte) {
  const u32 bits = byte ? (byte + (118u << 4)) << 19 : 0u;
  return bits_float(byte == 255 ? 0x7fc00000u : bits);
}
// The gains of two bytes, as float16 and without comparisons: it is asked for beside products.
DEVICE void gains_of(float& a, float& b, u32 bytes) {
  const u32 n = pick_bytes(bytes, 0u, 0x4140), beyond = (n + 0x00010001u) & 0x01000100u;   // of 255 alone
  const u32 some = hfma2_sat(n | 0x64006400u, 0x3c003c00u, 0xe400e400u);                   // 0 or 1: a row of zeros has no gain
  const u32 gain = hmul2(n * 64u + 0x18001800u + beyond * 0x28u, some);                    // 0x7fc0, not a number, for 255
  a = half_lo(gain);
  b = half_hi(gain);
}

constexpr int QUARTERS = RUNS / 8 * 2 + RUNS % 8 / 2;   // of eight runs, in two steps; the last ones have one step
constexpr int INDEX_WORDS = RUNS <= 8 ? 1 : 2 * SETS;
struct Indices { u32 n[INDEX_WORDS][4]; };           // of a tile in one lane: the three lowest bits of every index

// u: lowest bits of 32 codes; before: those two steps back; m: the second bits of the codes.
DEVICE void three_bits(u32 (&n)[4], u32 u, u32 before, u32 m) {
  const u32 z1 = u ^ before, m0 = m & 0x55555555u, m1 = m & 0xaaaaaaaau;       // the fourth bit of a nibble must be 0
  const u32 even = select_bits(0x55555555u, before >> 1, z1 << 1);             // bit 2 k of a run holds u_(t-1), the next one z1
  const u32 odd = select_bits(0x55555555u, u, z1);
  n[0] = select_bits(0x33333333u, even, m0 << 2);
  n[1] = select_bits(0x33333333u, odd, m1 << 1);
  n[2] = select_bits(0x33333333u, even >> 2, m0);
  n[3] = select_bits(0x33333333u, odd >> 2, m1 >> 1);
}

template <bool VALUES> struct Walked {
  static constexpr int WORDS = VALUES ? V_WORDS : K_WORDS, BINS = VALUES ? VF.bins : KF.bins, HALF = VALUES ? VF.half : KF.half;
  BOTH static constexpr int width(int r) { return VALUES ? VF.width[r] : KF.width[r]; }
  BOTH static constexpr int bin(int r) { return VALUES ? VF.bin[r] : KF.bin[r]; }
  BOTH static constexpr int pos(int r) { return VALUES ? VF.pos[r] : KF.pos[r]; }
  BOTH static constexpr bool beyond_one(int set) {   // whether some run of a set has more than the lowest bit
    bool any = false;
    for (int r = 16 * set; r < RUNS && r < 16 * set + 16; r++) any = any || width(r) > 1;
    return any;
  }
  DEVICE_STATIC u32 word(const u32 (&w)[WORDS], int bin, int row) {            // units of a bin of row `row` of the tile's two
    return HALF && bin == BINS - 1 ? w[WORDS - 1] >> 8 * row : w[row * (BINS - HALF) + bin];
  }
};

template <bool VALUES> DEVICE void indices(Indices& x, const u32 (&w)[Walked<VALUES>::WORDS]) {
  using W = Walked<VALUES>;
  if constexpr (RUNS <= 8) {
    const u32 a = W::word(w, 0, 0), b = W::word(w, 0, 1), u = pick_bytes(a, b, 0x6420);
    const u32 before = select_bits(0xfcfcfcfcu, u << 2, u >> 6);
    three_bits(x.n[0], u, before, W::beyond_one(0) ? pick_bytes(a, b, 0x7531) : 0u);
  } else {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 u[SETS];
#pragma unroll
      for (int h = 0; h < SETS; h++) {
        const u32 units = W::word(w, h, row);
        u[h] = pick_bytes(units, units, 0x3120);
      }
#pragma unroll
      for (int h = 0; h < SETS; h++) {
        // from the byte before; that of the first run is the last byte, of 80 and 96 channels where the runs in it end
        const u32 carried = SPLIT ? (u[h] << 10 & 0xffff0000u) | (u[h] >> (RUNS + 6) & 0xffffu) : funnel_right(u[(h + SETS - 1) % SETS], u[h], 22);
        const u32 before = select_bits(0xfcfcfcfcu, u[h] << 2, carried);
        u32 m = 0;
        if (W::beyond_one(h)) {
          const u32 units = W::word(w, low_bin(16 * h), row);
          m = pick_bytes(units, SPLIT ? W::word(w, 0, row) >> 4 : units, SPLIT ? 0x7520 : 0x3120);
        }
        three_bits(x.n[row * SETS + h], u[h], before, m);
      }
    }
  }
}

// Level / a of 3 to 6 bits: `three` holds the lowest bits of the index at bits 4 K of its bytes, `rest` the bits beyond them. The
// index stands at bit `at` of the 10 of a float16's fraction, which seven bits overrun at 4.
template <bool VALUES, int RUN, int K> DEVICE u32 curved(u32 three, u32 rest) {
  constexpr int width = Walked<VALUES>::width(RUN), at = K == 0 ? 1 : width < 6 ? 4 : 3, pos = Walked<VALUES>::pos(RUN), to = at + 3;
  constexpr u32 low = 7u << at, high = ((1u << (width - 2)) - 1u) << to;
  const u32 bytes = pick_bytes(three, 0u, 0x4140), b = pos > to ? rest >> (pos > to ? pos - to : 0) : rest << (pos > to ? 0 : to - pos);
  const u32 index = ((at == 4 ? bytes : at == 3 ? bytes >> 1 : bytes << 1) & (low | low << 16)) | (b & (high | high << 16)) | 0x64006400u;   // 1024 + index 2^at
  constexpr u32 unit = twice(1.0 / (1 << at)), off = twice(-(1024.0 / (1 << at) + 0.5 * ((2 << width) - 1)));
  constexpr u32 bend = twice(WALK_CUBIC[2 * width - 5] / WALK_CUBIC[2 * width - 6]), one = twice(1.0);
  const u32 j = hfma2(index, unit, off);
  return hmul2(j, hfma2(hmul2(j, j), bend, one));
}

// Levels of runs RUN and, where there is one, RUN + 4, RUN % 8 < 4, of both circles of a word.
template <bool VALUES, int RUN> DEVICE void walk_levels(u32& a, u32& b, const Indices& x, const u32 (&w)[Walked<VALUES>::WORDS], int row) {
  using W = Walked<VALUES>;
  constexpr int other = RUN + 4 < RUNS ? RUN + 4 : RUN, wa = W::width(RUN), wb = W::width(other), set = RUN / 16;
  const u32 three = RUNS <= 8 ? x.n[0][RUN % 4] >> 16 * row : x.n[row * SETS + set][RUN % 4] >> 16 * (RUN / 8 % 2);
  u32 four = 0;
  if constexpr (wa <= 2) {
    four = four_levels<wa>(three);
    a = pick_bytes(0u, four, 0x6040);
  } else {
    a = curved<VALUES, RUN, 0>(three, W::word(w, W::bin(RUN), row));
  }
  if constexpr (wb <= 2) {
    if constexpr (wa != wb) four = four_levels<wb>(three);
    b = pick_bytes(0u, four, 0x7050);
  } else {
    b = curved<VALUES, other, 1>(three, W::word(w, W::bin(other), row));
  }
}
#endif
