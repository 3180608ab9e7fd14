// Rows into packed tiles and back: `append_rows` codes new keys and values and stores them, `append_row` does so for one new row
// per sequence with a block for each (row, KV head), `decode_rows` reads slots as rows.
//
// Formula    kernels/layout.py (transform, layout), kernels/quantize.py (codes and scales); sums in float32
// Layout     as attend.cuh, in whose translation unit this file stands: KW, VW and MODE are shared
// Shapes     half the warps of a block take the keys of one (row, KV head) each, the other half the values;
//            append_row: KEY_WARPS warps the key, one the value, the others the product with the basis
// Exact      every product, difference and quotient is rounded on its own, as the plain operators do; only sums differ in order
#ifndef KVSINK_ROWS
#define KVSINK_ROWS

constexpr int ROW_THREADS = 512, SEGMENTS = 4, Z_STRIDE = D + 4;
TABLE float STEPS[6] = {KSTEP};                      // spacing of levels of 1 to 6 bits (kernels/levels.py)
TABLE float PER_UNIT[6] = {1.0f / STEPS[0], 1.0f / STEPS[1], 1.0f / STEPS[2], 1.0f / STEPS[3], 1.0f / STEPS[4], 1.0f / STEPS[5]};
#ifndef SINGLE_ROW_FIRST
#define SINGLE_ROW_FIRST 4  // of a warp's rows of the basis, those asked for before what depends on the length
#endif
constexpr bool SINGLE_ROW = MODE != 2 || D <= 128 || ROTARY == D || ROTARY <= 128;           // whether append_row serves
constexpr int KEY_WARPS = MODE == 2 ? 4 : 1, PROJECT_WARPS = MODE == 2 ? 16 : 0, SINGLE_ROW_THREADS = 32 * (KEY_WARPS + 1 + PROJECT_WARPS);

struct RowParams {
  const void *k, *v;                            // [B, Hkv, S, D] new rows, keys after RoPE; decode_rows: where to write rows
  long long k_stride[3], v_stride[3];           // in elements: batch, head, row
  const float* table;                           // [Hkv, 64, D] mean by slot, or null
  const float *start_cos, *start_sin;           // [P, ROTARY] rotation of block starts, or null
  const float *origin_cos, *origin_sin;         // [B, ROTARY]
  const float* basis;                           // block KLT: [Hkv, D, D] eigenvectors in columns; decode_rows: in rows
  const float* sigma;                           // block KLT: [Hkv, D]
  const float* v_mean;                          // [Hkv, D] or null
  const float* v_sigma;                         // trellis: [Hkv, D]
  const long long *length, *positions;          // [B or 1], length_row apart; [B or 1, S], rows position_row apart
  const long long* slots;                       // pages: [B] 128 times the page of a row and its slot there, negative for none; S is 1
  const unsigned char* asks;                    // pages: [B] whether a row is to stay exact
  unsigned char* named;                         // pages: of page 0 and its first head: 1 + the slot of the row in each place, or 0
  long long position_row, length_row, page_bytes, unit_bytes;
  int* stored_positions;                        // [B, L], or null
  unsigned char *k_codes, *v_codes;
  void* k_scale;
  u32* v_scale;
  void *exact_k, *exact_v;                      // side store [B, Hkv, E, D]; one new row per sequence may enter it
  int* exact_slot;                              // [B, E]
  float* exact_score;
  const float* score[SEGMENTS];                 // [B] score of the new row in each segment
  void *recent_k, *recent_v;                    // [B, Hkv, window, D] newest rows, at slot mod window
  int* recent_slot;                             // [window], or null
  u32 *arrived, *group_arrived;                 // [B] and [B, Hkv] zero
  int capacity[SEGMENTS];
  int segments, E, window, B, Hkv, S, L, bf16, key_hadamard, value_hadamard;
  int per;                                      // (head, row) pairs of a block, at most half its warps
  int first;                                    // decode_rows: first slot, S slots are read; pages: `length` says which each row is
  int places;                                   // pages: rows of one that may stay exact, up to 32
  float key_clip, value_clip;
};

#ifndef KVSINK_EMULATE
// Barrier ID among N threads of the block; who arrives does not wait.
template <int ID, int N> DEVICE void sync_part() { asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(N) : "memory"); }
template <int ID, int N> DEVICE void arrive_part() { asm volatile("bar.arrive %0, %1;" ::"n"(ID), "n"(N) : "memory"); }
DEVICE void fence_device() { __threadfence(); }
DEVICE u32 arrive_one(u32* at, u32 last) { return atomicInc(at, last); }
#else
DEVICE void fence_device() {}
DEVICE u32 arrive_one(u32* at, u32 last) { u32 old = *at; *at = old >= last ? 0 : old + 1; return old; }
#endif

// Half-split rotations of a row: by its origin and by the start of its block, or neither.
struct Angles {
  float origin_cos[CH], origin_sin[CH], start_cos[CH], start_sin[CH];
};
DEVICE void load_origin(Angles& t, const RowParams& p, int b, int lane) {
  if (!p.start_cos) return;
  load_channels(t.origin_cos, p.origin_cos ? p.origin_cos + (long long)b * ROTARY : 0, lane, ROTARY, 1.0f);
  load_channels(t.origin_sin, p.origin_sin ? p.origin_sin + (long long)b * ROTARY : 0, lane, ROTARY);
}
DEVICE void load_start(Angles& t, const RowParams& p, int slot, int lane) {
  if (!p.start_cos) return;
  load_channels(t.start_cos, p.start_cos + (long long)(slot / 64) * ROTARY, lane, ROTARY, 1.0f);
  load_channels(t.start_sin, p.start_sin + (long long)(slot / 64) * ROTARY, lane, ROTARY);
}
DEVICE void rotate(float (&x)[CH], const float (&c)[CH], const float (&s)[CH], int lane) {
#pragma unroll
  for (int i = 0; i < CH; i++) {
    const float z = shfl_float(x[i], partner(lane));
    if (lane < HALF_LANES) x[i] = sub(mul(x[i], c[i]), mul(z, s[i]));
    else if (lane < 2 * HALF_LANES) x[i] = add(mul(x[i], c[i]), mul(z, s[i]));
  }
}
DEVICE void invert(float (&c)[CH], float (&s)[CH]) {   // divides by the squared length of (cos, sin)
  float norm[CH], minus[CH];
#pragma unroll
  for (int i = 0; i < CH; i++) {
    norm[i] = fmaxf(add(mul(c[i], c[i]), mul(s[i], s[i])), 1e-12f);
    minus[i] = -s[i];
  }
  quotients(c, c, norm);
  quotients(s, minus, norm);
}
DEVICE void rotate_row(float (&x)[CH], Angles& t, const RowParams& p, bool back, int lane) {
  if (!p.start_cos) return;
  if (back) {
    invert(t.start_cos, t.start_sin);
    rotate(x, t.start_cos, t.start_sin, lane);
    rotate(x, t.origin_cos, t.origin_sin, lane);
  } else {
    invert(t.origin_cos, t.origin_sin);
    rotate(x, t.origin_cos, t.origin_sin, lane);
    rotate(x, t.start_cos, t.start_sin, lane);
  }
}

// One scale and minimum per row. Returns them as two float16.
DEVICE u32 encode_uniform(u32 (&code)[CH], const float (&x)[CH], float clip, int width, int lane) {
  const float top = (float)((1 << width) - 1), far = -3.4e38f;
  float most = far, least = far;                   // least: of the negatives
#pragma unroll
  for (int i = 0; i < CH; i++) {
    most = fmaxf(most, holds(lane) ? x[i] : far);
    least = fmaxf(least, holds(lane) ? -x[i] : far);
  }
#pragma unroll
  for (int m = 16; m; m >>= 1) {                   // both at a time: each waits for its shuffle
    const float a = shfl_xor(most, m), b = shfl_xor(least, m);
    most = fmaxf(most, a);
    least = fmaxf(least, b);
  }
  const float hi = mul(clip, most), lo = mul(clip, -least);
  const float s = through_half(quotient(sub(hi, lo), top)), base = through_half(lo), step = fmaxf(s, HALF_TINY);
  float y[CH], under[CH];
#pragma unroll
  for (int i = 0; i < CH; i++) { y[i] = sub(x[i], base); under[i] = step; }
  quotients(y, y, under);
#pragma unroll
  for (int i = 0; i < CH; i++) code[i] = (u32)fminf(fmaxf(nearest_even(y[i]), 0.0f), top);
  return pack_half2(s, base);
}

// Numbers of 4 bits, one per run of 8 components: compile-time words, where a table indexed by lane would be a load.
BOTH constexpr u64 nibbles(const int (&x)[RUNS], const int (&y)[RUNS], int from) {
  u64 all = 0;
  for (int i = from; i < RUNS && i < from + 16; i++) all |= (u64)(x[i] + y[i]) << (4 * (i - from));
  return all;
}
constexpr int NOTHING[RUNS] = {};
template <u64 LO, u64 HI> struct OfRun {
  DEVICE_STATIC int at(int run) { return (int)((RUNS > 16 && run >= 16 ? HI : LO) >> (4 * (run & 15))) & 15; }
  BOTH static constexpr int most() {                 // up to 6
    int n = 1;
    for (int i = 0; i < 64; i += 4)
      for (int w = 2; w <= 6; w++)
        if ((LO >> i & 15) >= w || (HI >> i & 15) >= w) n = n < w ? w : n;
    return n;
  }
  BOTH static constexpr int searches() { return most() > 4 ? 4 : 2; }   // of a trellis of these widths
};
using KeyWidth = OfRun<nibbles(KF.width, NOTHING, 0), nibbles(KF.width, NOTHING, 16)>;
using KeyPlace = OfRun<nibbles(KF.shift, KF.pos, 0), nibbles(KF.shift, KF.pos, 16)>;
using KeyPosition = OfRun<nibbles(KF.pos, NOTHING, 0), nibbles(KF.pos, NOTHING, 16)>;
using KeyBin = OfRun<nibbles(KF.bin, NOTHING, 0), nibbles(KF.bin, NOTHING, 16)>;
using ValuePlace = OfRun<nibbles(VF.shift, VF.pos, 0), nibbles(VF.shift, VF.pos, 16)>;
using ValueBin = OfRun<nibbles(VF.bin, NOTHING, 0), nibbles(VF.bin, NOTHING, 16)>;
using ValueWidth = OfRun<nibbles(VF.width, NOTHING, 0), nibbles(VF.width, NOTHING, 16)>;
DEVICE u32 center_of(int run) {                    // 2^pos (2^w - 1) / 2 of a run, twice, as fp16 bits: `Center` of a run known at run time
  const float x = 0.5f * (float)(((1 << KeyWidth::at(run)) - 1) << KeyPosition::at(run));
  return pack_half2(x, x);
}
DEVICE float of_width(const float (&numbers)[6], int width) {
  float x = numbers[0];
#pragma unroll
  for (int w = 1; w < KeyWidth::most(); w++) x = width > w ? numbers[w] : x;
  return x;
}
DEVICE float step_of(int width) { return of_width(STEPS, width); }
DEVICE float levels_per_unit(int width) { return of_width(PER_UNIT, width); }
DEVICE float even_level(u32 code, int width) { return mul(step_of(width), (float)code - 0.5f * (float)((1 << width) - 1)); }

// The number of thresholds step * m, |m| < half, below x. They rise with m, so the one next to x decides.
DEVICE u32 even_code(float x, int width) {
  const float last = (float)((1 << (width - 1)) - 1);
  const float m = fminf(fmaxf(nearest_even(mul(x, levels_per_unit(width))), -last), last);   // in this order a NaN has the code 0
  return (u32)(m + last) + (x > mul(step_of(width), m) ? 1u : 0u);
}
DEVICE void encode_even(u32 (&code)[CH], const float (&y)[CH], float g, int width) {
  float x[CH], under[CH];
#pragma unroll
  for (int i = 0; i < CH; i++) under[i] = g;
  quotients(x, y, under);
#pragma unroll
  for (int i = 0; i < CH; i++) code[i] = even_code(x[i], width);
}

// The gain for which gain * sigma * level comes closest to x.
DEVICE float fit(const float (&x)[CH], const float (&sigma)[CH], const u32 (&code)[CH], int width) {
  float dot = 0, square = 0;
#pragma unroll
  for (int i = 0; i < CH; i++) {
    const float level = mul(even_level(code[i], width), sigma[i]);
    dot += x[i] * level;
    square += level * level;
  }
  warp_sums(dot, square);
  return through_half(quotient(dot, fmaxf(square, 1e-30f)));
}

// What bin b has of the codes of channels 2 t and 2 t + 1 of a run, in the halves of a word.
template <bool TRELLIS> DEVICE u32 in_bin(u32 pair, int run, int width, int place, int bin, int b) {
  if (!TRELLIS) return bin == b ? pair << place : 0u;
  u32 word = b == run / 16 ? (pair & 0x00010001u) << run % 16 : 0u;
  if (width > 1 && b == low_bin(run)) word |= (pair >> 1 & 0x00010001u) << low_bit(run);
  if (width > 2 && b == bin) word |= (pair >> 2 & 0x000f000fu) << place;
  return word;
}
// Codes of one row into the words of its slot: word t * bins + b holds what bin b has of channels 2 t and 2 t + 1 of the runs. Lane i
// gets words i and i + 32.
template <int BINS> struct Words { u32 w[(4 * BINS + 31) / 32]; };
template <int BINS, bool TRELLIS> DEVICE Words<BINS> gather_words(const u32 (&c)[CH], int width, int place, int bin, int lane) {
  constexpr int EACH = CH / 2;                     // pairs of channels a lane has, from t = first on
  const int first = (CH * lane & 7) / 2, run = CH * lane >> 3;
  u32 pair[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) pair[i] = c[2 * i] | c[2 * i + 1] << 16;
  Words<BINS> mine = {};
#pragma unroll
  for (int i = 0; i < 4 * BINS; i++) {
    const int t = i / BINS, b = i % BINS;
    const u32 word = or_in_warp(holds(lane) && t / EACH * EACH == first ? in_bin<TRELLIS>(pair[t % EACH], run, width, place, bin, b) : 0u);
    if (lane == i % 32) mine.w[i / 32] = word;
  }
  return mine;
}
DEVICE int word_place(int slot, int word, int lane, int words) {
  const int q = slot & 127, sub_tile = (q & 63) / 16 * 2 + q / 64, wide = words % 4 == 0 ? 4 : words % 2 == 0 ? 2 : 1;
  return sub_tile * 128 * words + word / wide * 128 * wide + lane * 4 * wide + word % wide * 4;
}
// Word b of a slot's key: channels 2 t and 2 t + 1 of the runs.
DEVICE void store_key_word(unsigned char* tile, u32 word, int slot, int b, int t) {
  constexpr int full = KF.bins - KF.half;
  const int r = slot & 15;
  unsigned char* at = tile + word_place(slot, b < full ? (r & 1) * full + b : 2 * full, (r >> 1) * 4 + t, K_WORDS);
  if (b < full) {
    *(u32*)at = word;
  } else {                                         // the low bytes of its halves, beside those of the next slot
    at[r & 1] = (unsigned char)word;
    at[(r & 1) + 2] = (unsigned char)(word >> 16);
  }
}
DEVICE void store_key_words(unsigned char* tile, const u32 (&c)[CH], int slot, int lane) {
  constexpr int bins = KF.bins;
  const int run = CH * lane >> 3;
  const Words<bins> words = gather_words<bins, KEY_TRELLIS>(c, KeyWidth::at(run), KeyPlace::at(run), KeyBin::at(run), lane);
#pragma unroll
  for (int i = 0; i < (4 * bins + 31) / 32; i++) {
    const int t = (lane + 32 * i) / bins, b = (lane + 32 * i) % bins;
    if (t < 4) store_key_word(tile, words.w[i], slot, b, t);
  }
}
DEVICE void store_value_words(unsigned char* tile, const u32 (&c)[CH], int slot, int lane) {
  constexpr int bins = VF.bins, full = bins - VF.half;
  const int run = CH * lane >> 3, r = slot & 15;
  const Words<bins> words = gather_words<bins, VALUE_TRELLIS>(c, ValueWidth::at(run), ValuePlace::at(run), ValueBin::at(run), lane);
#pragma unroll
  for (int i = 0; i < (4 * bins + 31) / 32; i++) {
    const int t = (lane + 32 * i) / bins, b = (lane + 32 * i) % bins;
    if (t >= 4) continue;
#pragma unroll
    for (int hi = 0; hi < 2; hi++) {               // channels 2 t and 2 t + 1 of a run
      unsigned char* at = tile + word_place(slot, b < full ? (r & 1) * full + b : 2 * full, (2 * t + hi) * 4 + (r >> 2), V_WORDS) + 2 * (r >> 1 & 1);
      if (b < full) *(unsigned short*)at = (unsigned short)(words.w[i] >> (16 * hi));
      else at[r & 1] = (unsigned char)(words.w[i] >> (16 * hi));
    }
  }
}
// Bin b of channel x of the runs of a slot.
template <bool VALUES> DEVICE u32 read_unit(const unsigned char* tile, int slot, int x, int b) {
  constexpr int full = VALUES ? VF.bins - VF.half : KF.bins - KF.half, words = VALUES ? V_WORDS : K_WORDS;
  const int r = slot & 15, lane = VALUES ? x * 4 + (r >> 2) : (r >> 1) * 4 + (x >> 1), high = VALUES ? r >> 1 & 1 : x & 1;
  const unsigned char* at = tile + word_place(slot, b < full ? (r & 1) * full + b : 2 * full, lane, words) + 2 * high;
  return b < full ? *(const unsigned short*)at : at[r & 1];
}
template <bool VALUES> DEVICE u32 read_code(const unsigned char* tile, int slot, int channel) {
  const Fields& f = VALUES ? VF : KF;
  const int k = channel >> 3;
  return read_unit<VALUES>(tile, slot, channel & 7, f.bin[k]) >> (f.shift[k] + f.pos[k]) & ((1u << f.width[k]) - 1u);
}
template <bool VALUES> DEVICE float read_level(const unsigned char* tile, int slot, int channel) {   // of a trellis
  const Fields& f = VALUES ? VF : KF;
  const int k = channel >> 3, x = channel & 7, width = f.width[k];
  const auto bit = [&](int bin, int at) { return read_unit<VALUES>(tile, slot, x, bin) >> at & 1u; };
  const auto lowest = [&](int step) { return bit(step % RUNS / 16, step % RUNS % 16); };
  u32 m = width > 1 ? bit(low_bin(k), low_bit(k)) : 0u;
  if (width > 2) m |= (read_unit<VALUES>(tile, slot, x, f.bin[k]) >> f.pos[k] & ((1u << (width - 2)) - 1u)) << 1;
  return WALK_TABLE.level[width - 1][4 * m + 2 * (lowest(k) ^ lowest(k + RUNS - 2)) + lowest(k + RUNS - 1)];
}

// y[r] = x[r] M for the rows in shared memory: every thread one column, a part of the inner sum. Rows may be of several heads,
// `first` being that of row 0; `index` counts (head, row).
template <int N> struct Product { static constexpr int ROWS = N / 64, PARTS = N / D, LENGTH = (D + PARTS - 1) / PARTS; };
template <int N> DEVICE void project_rows(float* xs, float* sums, const float* matrices, int index, int rows, int heads, int per) {
  constexpr int ROWS = Product<N>::ROWS, PARTS = Product<N>::PARTS, LENGTH = Product<N>::LENGTH;
  const int c = TID % D, part = TID / D, from = part * LENGTH, to = from + LENGTH < D ? from + LENGTH : D;
  const int first = index / rows, last = (index + per - 1) / rows;
  if (part >= PARTS) return;
  float acc[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) acc[r] = 0;
  if (per == 1) {                                    // latency is all: many loads on their way
    const float* matrix = matrices + (long long)first * D * D;
#pragma unroll 32
    for (int d = from; d < to; d++) acc[0] += xs[d] * matrix[d * D + c];
  } else if (first == last) {
    const float* matrix = matrices + (long long)first * D * D;
#pragma unroll 16
    for (int d = from; d < to; d++) {
      const float u = matrix[d * D + c];
#pragma unroll
      for (int r = 0; r < ROWS; r++) acc[r] += xs[r * Z_STRIDE + d] * u;
    }
  } else {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int head = (index + r) / rows;
      if (r < per && head < heads) {
        const float* matrix = matrices + (long long)head * D * D;
#pragma unroll 16
        for (int d = from; d < to; d++) acc[r] += xs[r * Z_STRIDE + d] * matrix[d * D + c];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) sums[(part * ROWS + r) * Z_STRIDE + c] = acc[r];
}
template <int N> DEVICE void collect_row(float (&x)[CH], const float* sums, int r, int lane) {
  constexpr int ROWS = Product<N>::ROWS, PARTS = Product<N>::PARTS;
#pragma unroll
  for (int i = 0; i < CH; i++) {
    x[i] = 0;
    if (!holds(lane)) continue;
#pragma unroll
    for (int part = 0; part < PARTS; part++) x[i] += sums[(part * ROWS + r) * Z_STRIDE + CH * lane + i];
  }
}

// Whether the new row of sequence b is better than the worst exact row of some segment. A lane sees to places lane and lane + 32.
DEVICE bool may_enter(const RowParams& p, int b, int lane) {
  bool better = false;
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int place = lane + 32 * k;
    const float score = place < p.E ? p.exact_score[b * p.E + place] : 0.0f;
    for (int i = 0, from = 0; i < p.segments; from += p.capacity[i], i++)
      better = better || (place >= from && place < from + p.capacity[i] && p.score[i][b] > score);
  }
  return any_lane(better);
}
DEVICE bool last_to_come(u32* count, int all, int lane) {      // of `all` warps, when each has read what it must
  fence_device();
  int last = 0;
  sync_warp();
  if (lane == 0) last = arrive_one(count, all - 1) == (u32)all - 1;
  return shfl_int(last, 0);
}

// The new row of sequence b takes the place of a segment's worst exact row if it is better. Every head decides alike; the
// last one to come writes slots and scores, when no other reads them any more.
DEVICE void enter_exact(const RowParams& p, Raw k, Raw v, int b, int head, int slot, int lane) {
  int named[2];
  float score[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int place = lane + 32 * i, held = place < p.E ? p.exact_slot[b * p.E + place] : -1;
    named[i] = held < -1 ? -held - 2 : held;
    score[i] = place < p.E ? p.exact_score[b * p.E + place] : 0.0f;
  }
  bool changed = false;
  const long long rows = ((long long)b * p.Hkv + head) * p.E * D + CH * lane;
  for (int i = 0, from = 0; i < p.segments; from += p.capacity[i], i++) {
    const float mine = p.score[i][b];
    const auto inside = [&](int place) { return place >= from && place < from + p.capacity[i]; };
    const float low = -warp_max(fmaxf(inside(lane) ? -score[0] : -3.4e38f, inside(lane + 32) ? -score[1] : -3.4e38f));
    if (!(mine > low)) continue;
    u32 late[2];                                     // of equally low rows the latest leaves (kernels/selection.py)
#pragma unroll
    for (int k = 0; k < 2; k++) late[k] = inside(lane + 32 * k) && score[k] <= low ? (u32)(named[k] + 2) : 0u;
    const u32 latest = most_in_warp(late[0] > late[1] ? late[0] : late[1]);
    const u32 first = ballot_warp(late[0] == latest), leaving = first ? first : ballot_warp(late[1] == latest);
    const int bit = popcount((leaving & (0u - leaving)) - 1u), at = first ? bit : bit + 32;
    changed = true;
    if (lane == bit) {
      named[first ? 0 : 1] = slot;
      score[first ? 0 : 1] = mine;
    }
    store_raw(p.exact_k, rows + (long long)at * D, k);
    store_raw(p.exact_v, rows + (long long)at * D, v);
  }
  if (!changed) return;
  bool repeat[2] = {false, false};
  for (int e = 0; e < p.E; e++) {
    const int other = e < 32 ? shfl_int(named[0], e) : shfl_int(named[1], e - 32);
#pragma unroll
    for (int i = 0; i < 2; i++) repeat[i] = repeat[i] || (e < lane + 32 * i && other == named[i] && named[i] >= 0);
  }
  if (!last_to_come(p.arrived + b, p.Hkv, lane)) return;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int place = lane + 32 * i;
    if (place >= p.E) continue;
    p.exact_slot[b * p.E + place] = repeat[i] ? -named[i] - 2 : named[i];
    p.exact_score[b * p.E + place] = score[i];
  }
}
// The new row into the window. The row it overwrites is not read any more: a window holds the row itself.
DEVICE void keep_recent(const RowParams& p, const Raw& row, bool values, int b, int head, int slot, int lane) {
  if (!p.window) return;
  store_raw(values ? p.recent_v : p.recent_k, (((long long)b * p.Hkv + head) * p.window + slot % p.window) * D + CH * lane, row);
  if (!values && b == 0 && head == 0 && lane == 0 && p.recent_slot) p.recent_slot[slot % p.window] = slot;
}

constexpr int PRODUCT_SMEM = MODE == 2 ? ROW_THREADS / 64 * Z_STRIDE * 4 * (1 + Product<ROW_THREADS>::PARTS) : 0;
constexpr int WALK_SMEM = KEY_TRELLIS || VALUE_TRELLIS ? ROW_THREADS / 32 * WALK_ROW * 4 : 0;   // where the product was
constexpr int ROW_SMEM = (PRODUCT_SMEM > WALK_SMEM ? PRODUCT_SMEM : WALK_SMEM) + 16;
constexpr int KEY_SEARCHES = KeyWidth::searches(), KEY_PARTS = 2 + 2 * KEY_SEARCHES;   // sums that the key's warps make together
constexpr int KEY_CH = D > 128 ? 2 : 1;              // channels that a lane of the key's warps has, 128 apart
constexpr int SINGLE_ROW_STRIDE = 40, SINGLE_ROW_PART = 4 * KEY_CH * SINGLE_ROW_STRIDE;   // sums of one warp; two banks of its columns never meet
constexpr int SINGLE_ROW_PRODUCT = MODE == 2 ? D + PROJECT_WARPS * SINGLE_ROW_PART + KEY_PARTS * KEY_WARPS : 4;   // floats
constexpr int SINGLE_ROW_WALK = SINGLE_ROW_PRODUCT + (KEY_TRELLIS ? (1 + KEY_SEARCHES) * D : 0);    // where the value is searched, behind the key
constexpr int SINGLE_ROW_SMEM = (SINGLE_ROW_WALK + (VALUE_TRELLIS ? WALK_ROW : 0)) * 4;

struct Superblock { unsigned char *k_codes, *v_codes, *k_scale, *v_scale; long long unit; };   // unit: of a page's head, in bytes
DEVICE Superblock superblock_of(const RowParams& p, int b, int head, int slot) {
  long long at = ((long long)b * p.Hkv + head) * (p.L / 128) + slot / 128, unit = 0;
  int keys = K_STRIDE, values = V_STRIDE, of_keys = KS_BYTES, of_values = VS_BYTES;
  if (p.slots) {
    at = unit = p.slots[b] / 128 * p.page_bytes + head * p.unit_bytes;
    keys = values = of_keys = of_values = 1;
  }
  return {p.k_codes + at * keys, p.v_codes + at * values, (unsigned char*)p.k_scale + at * of_keys, (unsigned char*)p.v_scale + at * of_values, unit};
}
// New row i into a place of its page, if it asks for one and is among the first. Rows of a page that are new come one behind the
// other; what an earlier use of the page left in places behind them is dropped. Who reads `named` here counts entries that no row of
// the launch changes. ALONE: it is the only row of its page.
template <bool ALONE = false> DEVICE void keep_in_page(const RowParams& p, const Raw& row, bool values, int i, long long unit, int lane) {
  if (!p.places) return;
  const int slot = (int)(p.slots[i] & 127);
  unsigned char* named = p.named + unit;
  // New rows of the page on one side of this one, one behind the other, and those of them that ask for a place.
  int before = 0, asked = 0, after = 0;
  const auto count = [&](int way, int room, int& rows, int& asking) {
    for (int j = lane + 1;; j += 32) {
      const bool linked = j <= room && p.slots[i + way * j] == p.slots[i] + way * j;
      const u32 all = ballot_warp(linked);
      rows += popcount(all);
      asking += popcount(ballot_warp(linked && p.asks[i + way * j]));
      if (all != 0xffffffffu) return;
    }
  };
  if constexpr (!ALONE) count(-1, slot < i ? slot : i, before, asked);
  const int held = lane < p.places ? named[lane] : 0, place = popcount(ballot_warp(held > 0 && held <= slot - before)) + asked;
  if (p.asks[i] && place < p.places) {
    store_raw(values ? p.exact_v : p.exact_k, unit / 2 + place * D + CH * lane, row);
    if (!values && lane == 0) named[place] = (unsigned char)(slot + 1);
  }
  if (values || before) return;
  if constexpr (!ALONE) {
    int rows = 0;
    count(1, 127 - slot < p.B - 1 - i ? 127 - slot : p.B - 1 - i, rows, after);
  }
  if (lane < p.places && lane >= place + after + (p.asks[i] ? 1 : 0)) named[lane] = 0;
}
template <int TOGETHER> DEVICE void code_value(float (&x)[CH], const float (&mean)[CH], const RowParams& p, const Superblock& at, int head, int slot, float* row, int lane) {
  u32 c[CH];
  if (p.v_mean)
#pragma unroll
    for (int i = 0; i < CH; i++) x[i] = sub(x[i], mean[i]);
  if (p.value_hadamard) hadamard(x, lane);
  if constexpr (VALUE_TRELLIS) {
    float sigma[CH];
    load_channels(sigma, p.v_sigma + head * D, lane);
    const u32 gain = encode_walk<ValueWidth, TOGETHER>(c, x, sigma, row, lane);
    if (lane == 0) at.v_codes[V_BYTES + slot % 128] = (unsigned char)gain;
  } else {
    const u32 scale = encode_uniform(c, x, p.value_clip, VF.width[0], lane);
    if (lane == 0) ((u32*)at.v_scale)[slot % 128] = scale;
  }
  store_value_words(at.v_codes, c, slot, lane);
}
DEVICE void code_key(float (&x)[CH], float (&sigma)[CH], const RowParams& p, const Superblock& at, int slot, float* row, int lane) {
  u32 c[CH];
  if constexpr (KEY_TRELLIS) {
    const u32 gain = encode_walk<KeyWidth, AMONG>(c, x, sigma, row, lane);
    if (lane == 0) at.k_codes[K_BYTES + slot % 128] = (unsigned char)gain;
  } else if (MODE == 2) {
    float y[CH], square = 0;
    const int width = KeyWidth::at(CH * lane >> 3);
#pragma unroll
    for (int i = 0; i < CH; i++) sigma[i] = fmaxf(sigma[i], HALF_TINY);
    quotients(y, x, sigma);
#pragma unroll
    for (int i = 0; i < CH; i++) {
      square += y[i] * y[i];
      if (!holds(lane)) sigma[i] = 0;
    }
    float gain = root(warp_sum(square) / (float)D);
#pragma unroll 1                                       // small code: fetching instructions takes longer than the branch
    for (int n = 0; n < 2; n++) {
      encode_even(c, y, fmaxf(gain, HALF_TINY), width);
      gain = fit(x, sigma, c, width);
    }
    if (lane == 0) ((unsigned short*)at.k_scale)[slot % 128] = (unsigned short)pack_half2(gain, 0.0f);
  } else {
    if (p.key_hadamard) hadamard(x, lane);
    const u32 scale = encode_uniform(c, x, p.key_clip, KF.width[0], lane);
    if (lane == 0) ((u32*)at.k_scale)[slot % 128] = scale;
  }
  store_key_words(at.k_codes, c, slot, lane);
}
// The key of a row less the mean of its slot, in the basis of its block.
DEVICE void center_key(float (&x)[CH], float (&t)[CH], Angles& angles, const RowParams& p, int lane) {
  if (MODE == 0) return;
  if (MODE == 2) rotate_row(x, angles, p, true, lane);
  else rotate_row(t, angles, p, false, lane);
#pragma unroll
  for (int i = 0; i < CH; i++) x[i] = sub(x[i], t[i]);
}
DEVICE const float* mean_of_slot(const RowParams& p, int head, int slot) { return p.table + ((long long)head * 64 + (slot & 63)) * D; }

// Codes and stores as many (head, row) as half the warps of a block of N threads.
template <int N> DEVICE void append_unit(const RowParams& p, int unit, unsigned char* smem) {
  constexpr int ROWS = N / 64;
  const int lane = TID & 31, warp = TID >> 5, r = warp % ROWS, rows = p.B * p.S, index = unit * p.per + r;
  const bool values = warp >= ROWS, inside = r < p.per && index < p.Hkv * rows;
  const int head = inside ? index / rows : 0, row_index = inside ? index - head * rows : 0;
  const int b = row_index / p.S, s = row_index - b * p.S, slot = (int)p.length[b * p.length_row] + s;
  const bool live = inside && slot < p.L && !(p.slots && p.slots[b] < 0);   // what does not fit is dropped; the cache says so beforehand
  float *xs = (float*)smem, *sums = xs + ROWS * Z_STRIDE;
  Raw row = {};
  float x[CH] = {}, t[CH] = {};
  Angles angles = {};
  if (live) {
    const long long* st = values ? p.v_stride : p.k_stride;
    row = load_raw(values ? p.v : p.k, b * st[0] + head * st[1] + s * st[2] + CH * lane);
    if (values) {
      load_channels(t, p.v_mean ? p.v_mean + head * D : 0, lane);
    } else if (MODE != 0) {
      load_origin(angles, p, b, lane);
      load_start(angles, p, slot, lane);
      load_channels(t, mean_of_slot(p, head, slot), lane);
    }
    widen(x, row, p.bf16);
  }
  if (live && !values) center_key(x, t, angles, p, lane);
  if (MODE == 2) {
    if (!values && holds(lane))
#pragma unroll
      for (int i = 0; i < CH; i++) xs[r * Z_STRIDE + CH * lane + i] = x[i];
    sync_cta();
    project_rows<N>(xs, sums, p.basis, unit * p.per, rows, p.Hkv, p.per);
    sync_cta();
    if (!values) collect_row<N>(x, sums, r, lane);
    if (WALK_SMEM) sync_cta();
  }
  if (!live) return;
  float* walked = (float*)smem + (WALK_SMEM ? warp * WALK_ROW : 0);
  const Superblock superblock = superblock_of(p, b, head, slot);
  if (s + p.window >= p.S) keep_recent(p, row, values, b, head, slot, lane);
  if (values) {
    code_value<AMONG>(x, t, p, superblock, head, slot, walked, lane);
    if (p.slots) keep_in_page(p, load_raw(p.v, b * p.v_stride[0] + head * p.v_stride[1] + CH * lane), true, b, superblock.unit, lane);
    return;
  }
  float sigma[CH] = {};
  if (MODE == 2) load_channels(sigma, p.sigma + head * D, lane);
  code_key(x, sigma, p, superblock, slot, walked, lane);
  if (p.slots) {
    keep_in_page(p, load_raw(p.k, b * p.k_stride[0] + head * p.k_stride[1] + CH * lane), false, b, superblock.unit, lane);
    return;
  }
  if (p.stored_positions && head == 0 && lane == 0) p.stored_positions[(long long)b * p.L + slot] = (int)p.positions[b * p.position_row + s];
  if (p.segments) {
    const Raw v = load_raw(p.v, b * p.v_stride[0] + head * p.v_stride[1] + s * p.v_stride[2] + CH * lane);
    enter_exact(p, row, v, b, head, slot, lane);
  }
}

// Block KLT: sums of N numbers over the key's warps. `part` is written once between two barriers of other uses.
template <int N> DEVICE void key_sums(float (&v)[N], float* part, int warp, int lane) {
#pragma unroll
  for (int m = 16; m; m >>= 1)
#pragma unroll
    for (int n = 0; n < N; n++) v[n] += shfl_xor(v[n], m);
  if (lane == 0)
#pragma unroll
    for (int n = 0; n < N; n++) part[n * KEY_WARPS + warp] = v[n];
  sync_part<2, 32 * KEY_WARPS>();
#pragma unroll
  for (int n = 0; n < N; n++) {
    float sums[4];
    load_floats(sums, part + n * KEY_WARPS);
    v[n] = sums[0] + sums[1] + (sums[2] + sums[3]);
  }
}

// Lanes of the key's warps that have channels, and the first of them: 8 (lane / 2) + 2 warp + lane % 2.
DEVICE bool key_holds(int lane) { return D >= 128 || lane < D / 4; }
DEVICE int key_run(int lane, int n) { return 16 * n + (key_holds(lane) ? lane >> 1 : 0); }
DEVICE int key_channel(int warp, int lane, int n) { return 8 * key_run(lane, n) + 2 * warp + (lane & 1); }

// A trellis: the codes of this lane's channels, and the byte of the row's gain. The searches from all gains run side by side.
DEVICE u32 code_by_walks(u32 (&code)[KEY_CH], float (&y)[KEY_CH], const float (&sigma)[KEY_CH], const float* sigmas, float* part, int warp, int lane) {
  constexpr int N = KEY_SEARCHES;
  float *weights = part + KEY_PARTS * KEY_WARPS, every[CH], most = 0;
  load_channels(every, sigmas, lane);
#pragma unroll
  for (int i = 0; i < CH; i++) most = fmaxf(most, fmaxf(every[i], HALF_TINY));
  float seen[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < KEY_CH; i++) {
    const bool finite = sub(y[i], y[i]) == 0.0f;
    seen[0] += finite ? y[i] * y[i] : 0.0f;
    seen[1] += finite ? 0.0f : 1.0f;
  }
  key_sums(seen, part, warp, lane);
  const bool whole = seen[1] == 0.0f;
  const float size = whole ? root(seen[0] / (float)D) : 0.0f, top = warp_max(most);
  float weight[KEY_CH], v[N][KEY_CH], fits[2 * N] = {}, error[N];
#pragma unroll
  for (int i = 0; i < KEY_CH; i++) {
    const int at = key_channel(warp, lane, i);
    const float share = quotient(sigma[i], top);
    y[i] = whole ? y[i] : 0.0f;
    weight[i] = key_holds(lane) ? mul(share, share) : 0.0f;
    if (key_holds(lane)) weights[at] = weight[i];
#pragma unroll
    for (int n = 0; n < N; n++) {
      v[n][i] = quotient(y[i], first_gain<N>(n, size));
      if (key_holds(lane)) weights[(n + 1) * D + at] = v[n][i];
    }
  }
  sync_warp();                                       // a warp's circles are its own
  const int start = (lane >> 2 & 1) + (N == 4 ? lane >> 4 << 1 : 0), circle = 2 * warp + (lane >> 3 & 1);
  const u32 walk = best_walk<KeyWidth, ALONE>(weights, weights + (start + 1) * D, circle, lane);
  u32 found[N][KEY_CH], gain[N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    const u32 mine = (u32)shfl_int((int)walk, 8 * (lane & 1) + 4 * (n & 1) + 16 * (n >> 1));
#pragma unroll
    for (int i = 0; i < KEY_CH; i++) {
      float level;
      found[n][i] = walked_code<KeyWidth>(level, mine, v[n][i], key_run(lane, i));
      const float weighted = mul(weight[i], level);
      fits[2 * n] += mul(weighted, y[i]);
      fits[2 * n + 1] += mul(weighted, level);
    }
  }
  key_sums(fits, part + 2 * KEY_WARPS, warp, lane);
#pragma unroll
  for (int n = 0; n < N; n++) gain[n] = fitted_gain(error[n], fits[2 * n], fits[2 * n + 1]);
  int best = 0;
#pragma unroll
  for (int n = 1; n < N; n++)
    if (error[n] < error[0]) { error[0] = error[n]; gain[0] = gain[n]; best = n; }
#pragma unroll
  for (int i = 0; i < KEY_CH; i++) {
    code[i] = 0;
#pragma unroll
    for (int n = 0; n < N; n++) code[i] = key_holds(lane) && n == best ? found[n][i] : code[i];
  }
  return whole ? gain[0] : 255u;
}

// Rotations of this lane's channels: by the block's start, to be taken back, and by the row's origin.
struct KeyAngles { float cos[2][KEY_CH], sin[2][KEY_CH]; };
constexpr bool OWN_PARTNER = KEY_CH == 2 && ROTARY == D;   // the other channel of a rotation is the lane's other one
constexpr int TURN_LANES = ROTARY / 8;               // or stands so many lanes on
DEVICE void ask_angles(KeyAngles& a, const RowParams& p, int b, int slot, bool live, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < KEY_CH; i++) {
    const int c = key_channel(warp, lane, i);
    const bool turned = c < ROTARY;
    a.cos[0][i] = turned && live ? p.start_cos[(long long)(slot / 64) * ROTARY + c] : 1;
    a.sin[0][i] = turned && live ? p.start_sin[(long long)(slot / 64) * ROTARY + c] : 0;
    a.cos[1][i] = turned && p.origin_cos ? p.origin_cos[b * ROTARY + c] : 1;
    a.sin[1][i] = turned && p.origin_sin ? p.origin_sin[b * ROTARY + c] : 0;
  }
}
DEVICE void turn_key(float (&x)[KEY_CH], const KeyAngles& a, int lane) {
  const bool first = lane < TURN_LANES, turned = lane < 2 * TURN_LANES;
#pragma unroll
  for (int n = 0; n < 2; n++) {
    float other[KEY_CH];
#pragma unroll
    for (int i = 0; i < KEY_CH; i++)
      other[i] = OWN_PARTNER ? (i ? x[0] : -x[KEY_CH - 1]) : (first ? -1.0f : 1.0f) * shfl_float(x[i], (first ? lane + TURN_LANES : lane - TURN_LANES) & 31);
#pragma unroll
    for (int i = 0; i < KEY_CH; i++) {
      float c = a.cos[n][i], s = a.sin[n][i];
      if (n == 0) {
        const float norm = fmaxf(add(mul(c, c), mul(s, s)), 1e-12f);
        c = quotient(c, norm);
        s = quotient(-s, norm);
      }
      if (OWN_PARTNER || (i == 0 && turned)) x[i] = add(mul(x[i], c), mul(other[i], s));
    }
  }
}

// Block KLT: the key by four warps, whose lanes have the channels of `key_channel`, so that a warp's words are its own.
DEVICE void append_key(const RowParams& p, int head, int b, int slot, bool live, float* xs, float* sums, int warp, int lane) {
  constexpr int BOTH_SIDES = 32 * (KEY_WARPS + PROJECT_WARPS);
  const bool rotates = p.start_cos != 0, holds_any = key_holds(lane);
  u32 bits[KEY_CH];
  float x[KEY_CH], sigma[KEY_CH], mean[KEY_CH] = {};
#pragma unroll
  for (int i = 0; i < KEY_CH; i++) {
    const int c = key_channel(warp, lane, i);
    bits[i] = ((const unsigned short*)p.k)[b * p.k_stride[0] + head * p.k_stride[1] + c];
    sigma[i] = fmaxf(p.sigma[head * D + c], HALF_TINY);
    if (live) mean[i] = p.table[((long long)head * 64 + (slot & 63)) * D + c];
  }
  KeyAngles angles = {};
  if (rotates) ask_angles(angles, p, b, slot, live, warp, lane);
  arrive_part<3, BOTH_SIDES>();                      // all of this is asked for: the rest of the basis may follow
#pragma unroll
  for (int i = 0; i < KEY_CH; i++) x[i] = p.bf16 ? bits_float(bits[i] << 16) : half_lo(bits[i]);
  if (rotates) turn_key(x, angles, lane);
#pragma unroll
  for (int i = 0; i < KEY_CH; i++)
    if (holds_any) xs[key_channel(warp, lane, i)] = sub(x[i], mean[i]);
  sync_part<1, BOTH_SIDES>();
  sync_part<1, BOTH_SIDES>();
  float some[4][KEY_CH] = {}, y[KEY_CH];
#pragma unroll
  for (int part = 0; part < PROJECT_WARPS; part++)
#pragma unroll
    for (int i = 0; i < KEY_CH; i++)
      some[part & 3][i] += holds_any ? sums[part * SINGLE_ROW_PART + (warp + 4 * i) * SINGLE_ROW_STRIDE + lane] : 0.0f;
  if (!live) return;
  float* over = sums + PROJECT_WARPS * SINGLE_ROW_PART;
  const Superblock superblock = superblock_of(p, b, head, slot);
#pragma unroll
  for (int i = 0; i < KEY_CH; i++) {
    x[i] = some[0][i] + some[1][i] + (some[2][i] + some[3][i]);
    y[i] = quotient(x[i], sigma[i]);
  }
  u32 code[KEY_CH] = {};
  if constexpr (KEY_TRELLIS) {
    const u32 gain = code_by_walks(code, y, sigma, p.sigma + head * D, over, warp, lane);
    if (warp == 0 && lane == 0) superblock.k_codes[K_BYTES + slot % 128] = (unsigned char)gain;
  } else {
    float square[1] = {0};
#pragma unroll
    for (int i = 0; i < KEY_CH; i++) square[0] += y[i] * y[i];
    key_sums(square, over, warp, lane);
    float gain = root(square[0] / (float)D);
#pragma unroll 1                                       // small code: fetching instructions takes longer than the branch
    for (int n = 0; n < 2; n++) {
      float fitted[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < KEY_CH; i++) {
        const int width = KeyWidth::at(key_run(lane, i));
        code[i] = even_code(quotient(y[i], fmaxf(gain, HALF_TINY)), width);
        const float level = holds_any ? mul(even_level(code[i], width), sigma[i]) : 0.0f;
        fitted[0] += x[i] * level;
        fitted[1] += level * level;
      }
      over += KEY_WARPS * (n + 1);
      key_sums(fitted, over, warp, lane);
      gain = through_half(quotient(fitted[0], fmaxf(fitted[1], 1e-30f)));
    }
    if (warp == 0 && lane == 0) ((unsigned short*)superblock.k_scale)[slot % 128] = (unsigned short)pack_half2(gain, 0.0f);
  }
  constexpr int bins = KF.bins;
  u32 mine = 0;
#pragma unroll
  for (int b = 0; b < bins; b++) {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < KEY_CH; i++) {
      const int run = key_run(lane, i);
      word |= holds_any ? in_bin<KEY_TRELLIS>(code[i], run, KeyWidth::at(run), KeyPlace::at(run), KeyBin::at(run), b) << 16 * (lane & 1) : 0u;
    }
    word = or_in_warp(word);
    if (lane == b) mine = word;
  }
  if (lane < bins) store_key_word(superblock.k_codes, mine, slot, lane, warp);
}

// Its product with the basis: D / 16 rows by every warp, four neighbouring columns per lane, into the order of `append_key`.
DEVICE void project_single_row(const float* matrix, const float* xs, float* sums, int warp, int lane) {
  constexpr int EACH = PROJECT_WARPS ? D / PROJECT_WARPS : 1, BOTH_SIDES = 32 * (KEY_WARPS + PROJECT_WARPS);
  constexpr int AHEAD = EACH < 8 ? EACH : 8 / KEY_CH;   // rows that are on their way at a time
  const int from = warp * EACH, column = key_holds(lane) ? 4 * lane : 0;
  float u[AHEAD][4 * KEY_CH], acc[4 * KEY_CH] = {};
  const auto ask = [&](int i, int row) {
#pragma unroll
    for (int n = 0; n < KEY_CH; n++) {
      float four[4];
      load_floats(four, matrix + (from + row) * D + 128 * n + column);
#pragma unroll
      for (int j = 0; j < 4; j++) u[i][4 * n + j] = four[j];
    }
  };
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    if (i == SINGLE_ROW_FIRST) sync_part<3, BOTH_SIDES>();
    ask(i, i);
  }
  if (SINGLE_ROW_FIRST >= AHEAD) sync_part<3, BOTH_SIDES>();
  sync_part<1, BOTH_SIDES>();
#pragma unroll
  for (int row = 0; row < EACH; row++) {
    const float at = xs[from + row];
#pragma unroll
    for (int j = 0; j < 4 * KEY_CH; j++) acc[j] += at * u[row % AHEAD][j];
    if (row + AHEAD < EACH) ask(row % AHEAD, row + AHEAD);
  }
#pragma unroll
  for (int n = 0; n < KEY_CH; n++) {
    float2* to = (float2*)(sums + warp * SINGLE_ROW_PART + (4 * n + 2 * (lane & 1)) * SINGLE_ROW_STRIDE + 2 * (lane >> 1));
    if (!key_holds(lane)) break;
    to[0] = float2{acc[4 * n], acc[4 * n + 1]};
    to[SINGLE_ROW_STRIDE / 2] = float2{acc[4 * n + 2], acc[4 * n + 3]};
  }
  sync_part<1, BOTH_SIDES>();
}

// The only new row of sequence CTA_Y, head CTA_X, by one block. Latency is all: what depends on nothing is asked for first, then
// what depends on the length; the basis is on its way while the key is rotated.
DEVICE void append_single_row(const RowParams& p, unsigned char* smem) {
  const int lane = TID & 31, warp = TID >> 5, head = CTA_X, b = CTA_Y;
  if constexpr (MODE == 2) {
    float *xs = (float*)smem, *sums = xs + D;
    if (warp > KEY_WARPS) {
      project_single_row(p.basis + (long long)head * D * D, xs, sums, warp - KEY_WARPS - 1, lane);
      return;
    }
  }
  const int slot = (int)p.length[b * p.length_row];
  const bool live = slot < p.L && !(p.slots && p.slots[b] < 0);   // what does not fit is dropped; the cache says so beforehand
  const Superblock superblock = live ? superblock_of(p, b, head, slot) : Superblock{};
  const auto fresh = [&](const void* rows, const long long* stride) { return load_raw(rows, b * stride[0] + head * stride[1] + CH * lane); };
  float x[CH], t[CH];
  if (warp == KEY_WARPS) {
    const Raw row = fresh(p.v, p.v_stride);
    load_channels(t, p.v_mean ? p.v_mean + head * D : 0, lane);
    widen(x, row, p.bf16);
    if (!live) return;
    keep_recent(p, row, true, b, head, slot, lane);
    code_value<ALONE>(x, t, p, superblock, head, slot, (float*)smem + SINGLE_ROW_WALK, lane);
    if (p.stored_positions && head == 0 && lane == 0) p.stored_positions[(long long)b * p.L + slot] = (int)p.positions[b * p.position_row];
    if (p.slots) {
      keep_in_page<true>(p, row, true, b, superblock.unit, lane);
      keep_in_page<true>(p, fresh(p.k, p.k_stride), false, b, superblock.unit, lane);
    }
    return;
  }
  if constexpr (MODE == 2) {
    append_key(p, head, b, slot, live, (float*)smem, (float*)smem + D, warp, lane);
    if (!live || warp) return;
    if (p.window) keep_recent(p, fresh(p.k, p.k_stride), false, b, head, slot, lane);
  } else {
    Angles angles = {};
    const Raw row = fresh(p.k, p.k_stride);
    if (MODE != 0) load_origin(angles, p, b, lane);
    if (!live) return;
    if (MODE != 0) {
      load_start(angles, p, slot, lane);
      load_channels(t, mean_of_slot(p, head, slot), lane);
    }
    widen(x, row, p.bf16);
    center_key(x, t, angles, p, lane);
    code_key(x, t, p, superblock, slot, (float*)smem, lane);
    keep_recent(p, row, false, b, head, slot, lane);
  }
  if (p.segments) enter_exact(p, fresh(p.k, p.k_stride), fresh(p.v, p.v_stride), b, head, slot, lane);
}

KERNEL(SINGLE_ROW_THREADS) append_row(ARGUMENT(RowParams) p) {
  BLOCK_MEMORY(SINGLE_ROW_SMEM)
  if constexpr (SINGLE_ROW) append_single_row(p, smem);
}

KERNEL(ROW_THREADS, 2) append_rows(ARGUMENT(RowParams) p) {
  BLOCK_MEMORY(ROW_SMEM)
  append_unit<ROW_THREADS>(p, CTA_X, smem);
}

KERNEL(ROW_THREADS, 2) decode_rows(ARGUMENT(RowParams) p) {
  BLOCK_MEMORY(ROW_SMEM)
  constexpr int ROWS = ROW_THREADS / 64;
  const int lane = TID & 31, warp = TID >> 5, head = CTA_Y, r = warp % ROWS, index = CTA_X * ROWS + r;
  const bool values = warp >= ROWS, live = index < p.B * p.S;
  const int b = live ? index / p.S : 0, s = live ? index - b * p.S : 0, slot = p.slots ? (int)p.length[b] : p.first + s;
  float *xs = (float*)smem, *sums = xs + ROWS * Z_STRIDE;
  const Superblock superblock = superblock_of(p, b, head, slot);
  float x[CH] = {}, t[CH] = {};
  Angles angles = {};
  if (values) {
    const unsigned char* codes = superblock.v_codes;
    if constexpr (VALUE_TRELLIS) {
      const float gain = gain_of(codes[V_BYTES + slot % 128]);
      float sigma[CH];
      load_channels(sigma, p.v_sigma + head * D, lane);
      if (holds(lane))
#pragma unroll
        for (int i = 0; i < CH; i++) x[i] = mul(mul(read_level<true>(codes, slot, CH * lane + i), sigma[i]), gain);
    } else {
      const u32 scale = ((const u32*)superblock.v_scale)[slot % 128];
      if (holds(lane))
#pragma unroll
        for (int i = 0; i < CH; i++) x[i] = add(mul((float)read_code<true>(codes, slot, CH * lane + i), half_lo(scale)), half_hi(scale));
    }
    if (p.value_hadamard) hadamard(x, lane, true);
    load_channels(t, p.v_mean ? p.v_mean + head * D : 0, lane);
  } else {
    const unsigned char* codes = superblock.k_codes;
    if (MODE != 0) {
      load_channels(t, mean_of_slot(p, head, slot), lane);
      if (MODE == 1) {
        load_origin(angles, p, b, lane);
        load_start(angles, p, slot, lane);
      }
    }
    if (MODE == 2) {
      const float gain = KEY_TRELLIS ? gain_of(codes[K_BYTES + slot % 128]) : half_lo(((const unsigned short*)superblock.k_scale)[slot % 128]);
      float sigma[CH];
      load_channels(sigma, p.sigma + head * D, lane);
      if (holds(lane))
#pragma unroll
        for (int i = 0; i < CH; i++) {
          float level;
          if constexpr (KEY_TRELLIS) level = read_level<false>(codes, slot, CH * lane + i);
          else level = even_level(read_code<false>(codes, slot, CH * lane + i), KeyWidth::at(CH * lane >> 3));
          xs[r * Z_STRIDE + CH * lane + i] = mul(mul(level, sigma[i]), gain);
        }
    } else {
      const u32 scale = ((const u32*)superblock.k_scale)[slot % 128];
      if (holds(lane))
#pragma unroll
        for (int i = 0; i < CH; i++) x[i] = add(mul((float)read_code<false>(codes, slot, CH * lane + i), half_lo(scale)), half_hi(scale));
      if (p.key_hadamard) hadamard(x, lane, true);
      if (MODE == 1) rotate_row(t, angles, p, false, lane);
    }
  }
  if (MODE == 2) {
    sync_cta();
    project_rows<ROW_THREADS>(xs, sums, p.basis + (long long)head * D * D, 0, ROWS, 1, ROWS);
    sync_cta();
    if (!values) collect_row<ROW_THREADS>(x, sums, r, lane);
  }
#pragma unroll
  for (int i = 0; i < CH; i++) x[i] = add(x[i], t[i]);
  if (MODE == 2 && !values) {
    load_origin(angles, p, b, lane);
    load_start(angles, p, slot, lane);
    rotate_row(x, angles, p, false, lane);
  }
  if (live) {
    const long long* st = values ? p.v_stride : p.k_stride;
    Raw row = narrow(x, p.bf16);
    if (p.slots) {                                   // as it came, where it stands in a place of its page
      const u32 held = ballot_warp(lane < p.places && p.named[superblock.unit + lane] == slot % 128 + 1);
      if (held) row = load_raw(values ? p.exact_v : p.exact_k, superblock.unit / 2 + popcount((held & (0u - held)) - 1u) * D + CH * lane);
    }
    store_raw((void*)(values ? p.v : p.k), b * st[0] + head * st[1] + s * st[2] + CH * lane, row);
  }
}
#endif
