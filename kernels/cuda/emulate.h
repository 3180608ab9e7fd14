// Runs the kernels on a CPU: one fiber per thread, warp-wide instructions as meeting points. For correctness only.
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define DEVICE static inline
#define DEVICE_STATIC static inline
#define BOTH
#define TABLE constexpr
#define KERNEL(...) static void
#define ARGUMENT(T) const T&
#define LAUNCH_MEMORY unsigned char* smem = EMULATED_SMEM;
#define BLOCK_MEMORY(N) LAUNCH_MEMORY
struct uint4 { u32 x, y, z, w; };
struct uint2 { u32 x, y; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };

namespace emu {
constexpr int LANES = 32, MAX_THREADS = 1024;
struct Copy { void* dst; const void* src; u32 bytes; };
struct Barrier { u32 phase = 0, expected = 0, got = 0, count = 0, pending = 0; std::vector<Copy> copies; };
struct Meet { int arrived = 0, generation = 0; u32 in[LANES][8]; u32 out[LANES][8]; };
static ucontext_t scheduler, fiber[MAX_THREADS];
static bool done[MAX_THREADS];
static int tid, cta_x, cta_y, grid_x, threads;
static Meet warps[MAX_THREADS / LANES];
static int cta_arrived, cta_generation, part_arrived[4], part_generation[4], alive;
static unsigned char* smem;
static Barrier barriers[32768];
static void yield() { swapcontext(&fiber[tid], &scheduler); }
template <class F> void meet(u32* in, int n, u32* out, int m, F f) {
  Meet& w = warps[tid / LANES];
  int lane = tid % LANES, mine = w.generation;
  for (int i = 0; i < n; i++) w.in[lane][i] = in[i];
  if (++w.arrived == LANES) { f(w); w.arrived = 0; w.generation++; }
  else while (w.generation == mine) yield();
  for (int i = 0; i < m; i++) out[i] = w.out[lane][i];
}
static float h2f(u32 v) { unsigned short s = (unsigned short)v; _Float16 h; memcpy(&h, &s, 2); return (float)h; }
static u32 f2h(float f) { _Float16 h = (_Float16)f; unsigned short s; memcpy(&s, &h, 2); return s; }
static float asf(u32 v) { float f; memcpy(&f, &v, 4); return f; }
static u32 asu(float v) { u32 f; memcpy(&f, &v, 4); return f; }
}  // namespace emu
#define TID emu::tid
#define CTA_X emu::cta_x
#define CTA_Y emu::cta_y
#define GRID_X emu::grid_x
#define EMULATED_SMEM emu::smem

static float b2f(u32 v) { return emu::asf(v << 16); }
template <class F> void product(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, F widened) {
  u32 in[6] = {a0, a1, a2, a3, b0, b1}, out[4];
  emu::meet(in, 6, out, 4, [=](emu::Meet& w) {
    float A[16][16], B[16][8];
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3;
      for (int i = 0; i < 4; i++)
        for (int h = 0; h < 2; h++) A[g + 8 * (i & 1)][2 * t + h + 8 * (i >> 1)] = widened(w.in[l][i] >> (16 * h) & 0xffff);
      for (int i = 0; i < 2; i++)
        for (int h = 0; h < 2; h++) B[2 * t + h + 8 * i][g] = widened(w.in[l][4 + i] >> (16 * h) & 0xffff);
    }
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {
        float s = 0;
        for (int k = 0; k < 16; k++) s += A[(l >> 2) + 8 * (i >> 1)][k] * B[k][2 * (l & 3) + (i & 1)];
        w.out[l][i] = emu::asu(s);
      }
  });
  for (int i = 0; i < 4; i++) d[i] += emu::asf(out[i]);
}
DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { product(d, a0, a1, a2, a3, b0, b1, emu::h2f); }
DEVICE void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { product(d, a0, a1, a2, a3, b0, b1, b2f); }
DEVICE u32 transpose8x8(u32 a) {
  u32 r;
  emu::meet(&a, 1, &r, 1, [](emu::Meet& w) {
    unsigned short M[8][8];
    for (int l = 0; l < 32; l++) for (int h = 0; h < 2; h++) M[l >> 2][2 * (l & 3) + h] = (unsigned short)(w.in[l][0] >> (16 * h));
    for (int l = 0; l < 32; l++) w.out[l][0] = (u32)M[2 * (l & 3)][l >> 2] | (u32)M[2 * (l & 3) + 1][l >> 2] << 16;
  });
  return r;
}
DEVICE u32 shuffle_bits(u32 v, int src) {
  u32 in[2] = {v, (u32)src}, out;
  emu::meet(in, 2, &out, 1, [](emu::Meet& w) { for (int l = 0; l < 32; l++) w.out[l][0] = w.in[w.in[l][1] & 31][0]; });
  return out;
}
DEVICE float shfl_xor(float v, int m) { return emu::asf(shuffle_bits(emu::asu(v), (emu::tid & 31) ^ m)); }
DEVICE int shfl_int(int v, int lane) { return (int)shuffle_bits((u32)v, lane); }
DEVICE bool any_lane(bool p) {
  u32 in = p, out;
  emu::meet(&in, 1, &out, 1, [](emu::Meet& w) { u32 a = 0; for (int l = 0; l < 32; l++) a |= w.in[l][0]; for (int l = 0; l < 32; l++) w.out[l][0] = a; });
  return out != 0;
}
DEVICE void sync_warp() { u32 z = 0; emu::meet(&z, 1, &z, 0, [](emu::Meet&) {}); }
DEVICE void sync_cta() {
  int mine = emu::cta_generation;
  if (++emu::cta_arrived == emu::threads) { emu::cta_arrived = 0; emu::cta_generation++; }
  else while (emu::cta_generation == mine) emu::yield();
}
template <int ID, int N> DEVICE void arrive_part() {
  if (++emu::part_arrived[ID] == N) { emu::part_arrived[ID] = 0; emu::part_generation[ID]++; }
}
template <int ID, int N> DEVICE void sync_part() {
  int mine = emu::part_generation[ID];
  arrive_part<ID, N>();
  while (emu::part_generation[ID] == mine) emu::yield();
}
DEVICE float exp2_fast(float x) { return exp2f(x); }
DEVICE u32 pack_half2(float lo, float hi) { return emu::f2h(lo) | emu::f2h(hi) << 16; }
DEVICE u32 bf16_bits(float x) { u32 u = emu::asu(x); return (u + 0x7fff + (u >> 16 & 1)) >> 16; }
DEVICE u32 pack_bf2(float lo, float hi) { return bf16_bits(lo) | bf16_bits(hi) << 16; }
DEVICE float half_lo(u32 v) { return emu::h2f(v); }
DEVICE float half_hi(u32 v) { return emu::h2f(v >> 16); }
DEVICE u32 hmul2(u32 a, u32 b) { return pack_half2(half_lo(a) * half_lo(b), half_hi(a) * half_hi(b)); }
DEVICE u32 hfma2(u32 a, u32 b, u32 c) { return pack_half2(half_lo(a) * half_lo(b) + half_lo(c), half_hi(a) * half_hi(b) + half_hi(c)); }
DEVICE u32 hfma2_sat(u32 a, u32 b, u32 c) {
  const u32 x = hfma2(a, b, c);
  const auto one = [](float v) { return v > 1 ? 1.0f : v > 0 ? v : 0.0f; };
  return pack_half2(one(half_lo(x)), one(half_hi(x)));
}
DEVICE void prefetch(const void*) {}
DEVICE u32 ballot_warp(bool p) {
  u32 in = p, out;
  emu::meet(&in, 1, &out, 1, [](emu::Meet& w) {
    u32 a = 0;
    for (int l = 0; l < 32; l++) a |= (w.in[l][0] & 1) << l;
    for (int l = 0; l < 32; l++) w.out[l][0] = a;
  });
  return out;
}
DEVICE void in_place(u32&) {}
DEVICE u32 funnel_right(u32 lo, u32 hi, u32 n) { return (u32)(((u64)hi << 32 | lo) >> (n & 31)); }
DEVICE u32 pick_bytes(u32 a, u32 b, u32 which) {
  const u64 both = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) r |= (u32)(both >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
  return r;
}
DEVICE u32 select_bits(u32 mask, u32 a, u32 b) { return (a & mask) | (b & ~mask); }
DEVICE u32 take_bytes(u32 a, u32 b, u32 which) {
  if (which & 0x8888) { fprintf(stderr, "a byte above the seventh is asked for\n"); abort(); }
  return pick_bytes(a, b, which);
}
template <class F> u32 over_warp(u32 v, F f) {
  u32 out;
  emu::meet(&v, 1, &out, 1, [=](emu::Meet& w) {
    u32 a = w.in[0][0];
    for (int l = 1; l < 32; l++) a = f(a, w.in[l][0]);
    for (int l = 0; l < 32; l++) w.out[l][0] = a;
  });
  return out;
}
DEVICE u32 least_in_warp(u32 v) { return over_warp(v, [](u32 a, u32 b) { return a < b ? a : b; }); }
DEVICE u32 most_in_warp(u32 v) { return over_warp(v, [](u32 a, u32 b) { return a > b ? a : b; }); }
DEVICE u32 or_in_warp(u32 v) { return over_warp(v, [](u32 a, u32 b) { return a | b; }); }
DEVICE void wide_product(float (&y)[16][4], const u32 (&a)[8][4], const void* b) {
  const int lane = emu::tid & 31, g = lane >> 2, t = lane & 3;
  for (int n = 0; n < 16; n++) {
    for (int i = 0; i < 4; i++) y[n][i] = 0;
    for (int k = 0; k < 8; k++) {                    // columns n * 8 + g, channels 16 k + 2 t, + 1 and 8 further
      const u32* column = (const u32*)((const char*)b + n * 2048 + k * 256 + g * 16) + t;
      mma(y[n], a[k][0], a[k][1], a[k][2], a[k][3], column[0], column[32]);
    }
  }
}
DEVICE int popcount(u32 v) { return __builtin_popcount(v); }
DEVICE uint4 load_polled(const void* p) { return *(const uint4*)p; }
DEVICE void store_polled(void* p, uint4 v) { *(uint4*)p = v; }
template <int N> DEVICE void more_registers() {}
template <int N> DEVICE void fewer_registers() {}
DEVICE float bits_float(u32 v) { return emu::asf(v); }
DEVICE u32 float_bits(float v) { return emu::asu(v); }
DEVICE emu::Barrier& barrier(u64* b) { return emu::barriers[((unsigned char*)b - emu::smem) / 8 % 32768]; }
DEVICE void barrier_init(u64* b, u32 n) { barrier(b) = emu::Barrier(); barrier(b).count = barrier(b).pending = n; }
DEVICE void barrier_init_fence() {}
DEVICE void barrier_arrive(u64* b) {
  emu::Barrier& x = barrier(b);
  if (x.pending == 0) { fprintf(stderr, "one arrival too many\n"); abort(); }
  x.pending--;
}
DEVICE void barrier_expect(u64* b, u32 bytes) { barrier_arrive(b); barrier(b).expected += bytes; }
DEVICE void bulk_load(void* dst, const void* src, u32 bytes, u64* b) {
  if ((size_t)dst % 16 || (size_t)src % 16 || bytes % 16) { fprintf(stderr, "unaligned bulk copy\n"); abort(); }
  memset(dst, 0xff, bytes);                          // data arrives when somebody waits for it
  barrier(b).copies.push_back({dst, src, bytes});
  barrier(b).got += bytes;
}
// Below 9.0: what this thread has asked for since it last arrived, counted by the barrier at which it then arrives.
static std::vector<emu::Copy> asked[emu::MAX_THREADS];
DEVICE void copy16(void* dst, const void* src) {
  if ((size_t)dst % 16 || (size_t)src % 16) { fprintf(stderr, "unaligned copy\n"); abort(); }
  memset(dst, 0xff, 16);
  asked[emu::tid].push_back({dst, src, 16});
}
DEVICE void arrive_when_copied(u64* b) {
  for (auto& c : asked[emu::tid]) barrier(b).copies.push_back(c);
  asked[emu::tid].clear();
  barrier_arrive(b);
}
DEVICE void barrier_wait(u64* b, u32 parity) {
  emu::Barrier& x = barrier(b);
  while ((x.phase & 1) == parity) {
    if (x.pending) { emu::yield(); continue; }
    if (x.got != x.expected) { fprintf(stderr, "%u bytes copied, %u expected\n", x.got, x.expected); abort(); }
    for (auto& c : x.copies) memcpy(c.dst, c.src, c.bytes);
    x.copies.clear();
    x.expected = x.got = 0;
    x.pending = x.count;
    x.phase++;
  }
}
