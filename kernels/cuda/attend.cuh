// Decode attention over packed keys and values: one query row per sequence, split over tokens, merged in the same launch.
//
// Formula    out = softmax(scale * q.K^ + mean) V^ over packed tokens, exact rows and the new row (kernels/attend.py, kernels/layout.py)
// Layout     token tiles of 16 are stored in the order of mma.m16n8k16 A fragments; a superblock is 128 tokens (kernels/layout.py)
// Columns    the 8 of a product are up to 4 query heads, twice: for a tile of the superblock's first block of 64 and for that of its
//            second; or, WIDE, 5 to 8 heads and one tile. More heads go in groups, a row of the grid each
// Needs      sm_80. No header is included, so NVRTC compiles it as it is.
#ifndef KVSINK_ATTEND
#define KVSINK_ATTEND

#ifndef STEP_PAIRS
#define STEP_PAIRS 2  // units (a pair of tiles, or one tile when WIDE) whose logits are computed before one softmax step
#endif
#ifndef ITEM_PAIRS
#define ITEM_PAIRS 4  // tile pairs that one warp loads at a time: 4 (a superblock), 2 or 1, not fewer than STEP_PAIRS
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef HEADS_PER_KV
#define HEADS_PER_KV 4
#endif
#ifndef MANY
#define MANY 0        // 1: a window of recent rows, or more than 8 exact ones, up to 64: those are products of the warps that compute
#endif
#ifndef MOST_HEADS
#define MOST_HEADS 8  // query heads of a group: 8, or 4 where shared memory is short
#endif

struct Params {
  const void* q;            // [B, Hkv * HEADS_PER_KV, D] fp16 or bf16, rotary applied
  const u32* k_codes;       // [B, Hkv, tiles, K_STRIDE / 4], or of page 0 and its first head
  const void* k_scale;      // [B, Hkv, tiles * 128, 2] fp16 scale, zero; block KLT: [B, Hkv, tiles * 128] fp16 gain
  const u32* v_codes;       // [B, Hkv, tiles, V_STRIDE / 4]
  const u32* v_scale;       // [B, Hkv, tiles * 128, 2] fp16 scale, zero; a trellis has none, on either side: 128 gains stand behind a tile
  const u32* mean;          // [Hkv, 4, K_STEPS, 32, 4] A fragments of the [64, D] table of the mean's logit
  const u32* rotation;      // [2 * tiles, 2, 4, HALF_RUNS] cos and sin of 64 * block, B-fragment order
  const u32* basis;         // block KLT: [Hkv, K_STEPS, K_STEPS, 32, 4] A fragments of `layout.key_rows`
  const float* origin_cos;  // [B, ROTARY] rotation by each row's origin (slot minus position), or null
  const float* origin_sin;
  const long long* length;  // [B], length_row apart: one past the last slot of a row
  const int* pages;         // [B, page_row] page of each superblock, or null: superblock i of a row is its i-th
  const int* exact_at;      // pages: [B, E] 32 times the page of each exact row, and its place there
  const unsigned char* mask;  // [B, mask_row] 1 where a slot is visible, or null: all are
  const void* exact_k;      // [B, Hkv, E, D] same dtype as q
  const void* exact_v;
  const int* exact_slot;    // [B, E] slot of each exact row, negative when the entry is empty
  const void* recent_k;     // [B, Hkv, window, D] rows of the newest slots, at slot mod window
  const void* recent_v;
  const void* new_k;        // [B, Hkv, N, D] rows that are not packed or not to be read packed
  const void* new_v;
  const float* value_mean;  // [Hkv, D] or null
  const float* value_sigma; // trellis: [Hkv, D]
  void* out;                // [B, Hkv * HEADS_PER_KV, D]
  float* partial;           // [Hkv * GROUPS, grid_x, COLUMNS * SLOT], every word 0xffffffff before the first launch and left so
  unsigned char* turned;    // AHEAD: [B, Hkv * GROUPS, tiles, 2, TURNED_BYTES] queries and the mean's logits of every block of 64 slots
  long long mask_row, length_row, page_row;   // between two rows: bytes of masks, elements of the others; 0 when all share one
  long long page_bytes, unit_bytes;           // pages: between two, and between the heads of one, of everything that stands in them
  int B, Hkv, share, tiles, E, N, extra;  // share: blocks of a group; extra: packed slots from `length` on that are to be read (strict), else 0
  int window;               // newest slots, the new row's among them, that are read as they came
  int q_bf16, key_hadamard, value_hadamard;
  float scale;              // softmax scale times log2(e)
};

constexpr int GROUPS = HEADS_PER_KV <= 4 ? 1 : (HEADS_PER_KV + MOST_HEADS - 1) / MOST_HEADS, R = (HEADS_PER_KV + GROUPS - 1) / GROUPS;
constexpr bool WIDE = R > 4;
constexpr int COLUMNS = WIDE ? 8 : 4, TILES = WIDE ? 1 : 2, SERVICE = COLUMNS, THREADS = (WARPS + SERVICE) * 32;

// AHEAD: where the basis would take more shared memory than the codes, and every warp would read all of it for each superblock, a launch
// ahead of attention (`turn_queries`) takes the query to it for all blocks, and to the mean's logits. A block of 64 slots then has
// [RUNS / 4, HELD, 4, 4] words of the query's B fragments (run / 4, head, t, run) and [4, HELD / 2, 8, 2, 2] float logits (pair of tiles, two
// heads, g, row, head).
constexpr bool AHEAD = MODE == 2 && D > 128;
constexpr int HELD = WIDE ? 8 : R > 2 ? 4 : 2, TURNED_QUERY = AHEAD ? 16 * RUNS * HELD : 0, TURNED_BYTES = AHEAD ? TURNED_QUERY + 256 * HELD : 0;
constexpr int IN_TURN_BLOCKS = WIDE && ITEM_PAIRS < 4 ? 1 : 2;   // blocks of an item

constexpr int KS_BYTES = KEY_TRELLIS ? 128 : MODE == 2 ? 256 : 512, VS_BYTES = VALUE_TRELLIS ? 128 : 512, HALF_RUNS = ROTARY / 16;
constexpr int ROT_TABLE = 64 * HALF_RUNS, ROT_BYTES = MODE == 0 || AHEAD ? 0 : ROT_TABLE;   // of a superblock
constexpr int KI_BYTES = K_BYTES * ITEM_PAIRS / 4, VI_BYTES = V_BYTES * ITEM_PAIRS / 4;   // codes of one item
constexpr int K_SCALE = KS_BYTES / 128, V_SCALE = VS_BYTES / 128;              // bytes per token
constexpr int IN_VALUES = KI_BYTES + KS_BYTES + VS_BYTES, IN_ROT = IN_VALUES + VI_BYTES, IN_TURN = IN_ROT + ROT_BYTES;       // offsets inside a stage
constexpr int IN_MASK = IN_TURN + IN_TURN_BLOCKS * TURNED_BYTES;
constexpr int STAGE_BYTES = IN_MASK + 128;
constexpr int PART = D + 4;                                                    // floats per head of a warp's partial: channels, max, sum
constexpr int QUADS = CH <= 4 ? 1 : CH / 4, SLOT = 128 * QUADS + 4;           // of one that goes to another block: four a lane, max, sum
constexpr int MEAN_BYTES = MODE == 0 ? 0 : 128 * D, BASIS_BYTES = MODE == 2 ? 2 * D * D : 0, TABLE_BYTES = AHEAD ? 0 : MEAN_BYTES + BASIS_BYTES;
constexpr int PAIR_WARPS = 4;                        // that attend in attend_single

constexpr int OFF_MEAN = WARPS * STAGES * STAGE_BYTES;
constexpr int OFF_BASIS = OFF_MEAN + MEAN_BYTES;
constexpr int OFF_PART = OFF_MEAN + TABLE_BYTES;
constexpr int RAW_ROW = (RUNS + 3) / 4 * 4 + 4, RAW_SIZE = MODE == 0 ? 0 : COLUMNS * 4 * RAW_ROW * 4, RAW_BYTES = AHEAD ? 0 : RAW_SIZE;
constexpr int QT_BYTES = MODE == 2 ? 0 : COLUMNS * D * 2;
constexpr int OFF_RAW = OFF_PART + WARPS * R * PART * 4;                        // query, B-fragment order; two rows of the batch
constexpr int OFF_QT = OFF_RAW + 2 * RAW_BYTES;                                // transformed query, COLUMNS x D fp16; two rows of the batch
constexpr int OFF_SUM = OFF_QT + 2 * QT_BYTES;                                 // sums of the transformed query, 2 x COLUMNS
struct Queries { static constexpr int HEADS = COLUMNS, RAW = OFF_RAW, QT = OFF_QT, SUM = OFF_SUM, RAW_STEP = RAW_BYTES, QT_STEP = QT_BYTES; };
constexpr int OFF_BAR = OFF_SUM + 64;
constexpr int SMEM_BYTES = OFF_BAR + 8 * (WARPS * STAGES + 8);
static_assert(SMEM_BYTES <= SHARED_MOST, "more shared memory than a block can have");
// attend_single: the same places, with the query in the basis and its sums where the basis, which it reads from L2, would stand; AHEAD: after
// the stages of its four warps.
constexpr int ROTATED_BYTES = MODE == 2 ? (WIDE ? 2 : 1) * K_STEPS * (256 + 32) : 0;
struct Single {
  static constexpr int HEADS = COLUMNS, MEAN = AHEAD ? PAIR_WARPS * STAGE_BYTES : OFF_MEAN, ROTATED = MEAN + MEAN_BYTES;
  static constexpr int PARTS = AHEAD ? ROTATED + ROTATED_BYTES : OFF_PART, RAW = AHEAD ? PARTS + PAIR_WARPS * R * PART * 4 : OFF_RAW;
  static constexpr int QT = OFF_QT, SUM = OFF_SUM, RAW_STEP = 0, QT_STEP = 0, BAR = AHEAD ? RAW + RAW_SIZE : OFF_BAR;
  static constexpr int BYTES = AHEAD ? BAR + 8 * PAIR_WARPS : SMEM_BYTES;
};
static_assert(WARPS * STAGES >= PAIR_WARPS && HEADS_PER_KV <= 32, "warps, heads");

// Registers move from service warps to those that compute. The block owns what it was launched with; asking for more waits for ever.
constexpr bool SHIFTS = THREADS > 256;
constexpr int COMPUTE_REGISTERS = WARPS == 4 ? 240 : WARPS == 12 ? (WIDE ? 128 : 144) : WARPS == 16 ? (WIDE ? 96 : 104) : WIDE ? 168 : 200;
constexpr int SERVICE_REGISTERS = WARPS == 4 ? 128 : WARPS == 12 ? (WIDE ? 48 : 80) : WARPS == 16 ? (WIDE ? 48 : 64) : WIDE ? 88 : 104;
static_assert(!SHIFTS || WARPS * 32 * COMPUTE_REGISTERS + SERVICE * 32 * SERVICE_REGISTERS <= 65536 / THREADS / 8 * 8 * THREADS, "registers");
static_assert(WARPS % 4 == 0, "register counts change per four warps");

constexpr float LAZY_LOW = 4.0f, LAZY_HIGH = 8.0f;   // log2: a new reference puts the largest weight at 2^4; it moves when one passes 2^8
constexpr int Q_SHIFT = 8;                           // the query carries 2^8, the rest of 2^24 (a trellis: 2^0) goes to the token's scale

struct Place { int kv, first, heads; };              // what a row of the grid attends for: KV head, its first query head and how many
DEVICE Place place_of(int y) {
  const int first = y % GROUPS * R, rest = HEADS_PER_KV - first;
  return {y / GROUPS, first, rest < R ? rest : R};
}
struct Stored { const unsigned char *keys, *values, *of_keys, *of_values; };   // codes of a superblock, and the numbers beside them
DEVICE Stored stored(const Params& p, int b, int kv, int i) {          // superblock i of a row
  long long at = ((long long)b * p.Hkv + kv) * p.tiles + i;
  int keys = K_STRIDE, values = V_STRIDE, of_keys = KS_BYTES, of_values = VS_BYTES;
  if (p.pages) {
    const int page = p.pages[b * p.page_row + i];    // behind a row's end anything may stand: it is asked for and not seen
    at = (page > 0 ? page : 0) * p.page_bytes + kv * p.unit_bytes;
    keys = values = of_keys = of_values = 1;
  }
  const unsigned char *k = (const unsigned char*)p.k_codes + at * keys, *v = (const unsigned char*)p.v_codes + at * values;
  return {k, v, KEY_TRELLIS ? k + K_BYTES : (const unsigned char*)p.k_scale + at * of_keys,
          VALUE_TRELLIS ? v + V_BYTES : (const unsigned char*)p.v_scale + at * of_values};
}
DEVICE long long in_page(const Params& p, int at, int kv) {            // of an exact row, in elements
  return ((at >> 5) * p.page_bytes + kv * p.unit_bytes) / 2 + (at & 31) * D;
}
DEVICE int recent_of(const Params& p, int length) {  // first slot that is read as it came
  if (!MANY || !p.window) return length + 1;
  const int first = length + 1 - p.window;
  return first > 0 ? first : 0;
}
DEVICE int end_of(const Params& p, int b) {          // one past the last slot whose codes are read
  const int length = (int)p.length[b * p.length_row], held = length + p.extra, recent = recent_of(p, length), most = p.tiles * 128;
  const int end = held < recent ? held : recent;
  return end < most ? end : most;
}
DEVICE int superblocks(int end) { return end < 1 ? 1 : (end + 127) / 128; }

struct Partial { float o[CH], m, l; };               // one head: this lane's channels, largest logit, sum of weights
DEVICE Partial nothing() { Partial a = {}; a.m = NEG_INF; return a; }

struct State {                                       // online softmax of one warp: columns 2 t and 2 t + 1 of each lane
  float o[K_STEPS][4], m[2], l[2], z[2];
  bool fresh;
};
#endif
