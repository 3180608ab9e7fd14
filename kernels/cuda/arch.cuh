// What the kernels are written in: warp-wide matrix products, exchanges, 16-bit pairs, copies into shared memory that a barrier counts.
// TARGET is the compute capability that is compiled for, times ten; on a CPU `emulate.h` has the same words.
#ifndef KVSINK_ARCH
#define KVSINK_ARCH

#ifndef TARGET
#define TARGET 90
#endif
#ifndef SHARED_MOST
#define SHARED_MOST 232448    // bytes of shared memory that one block of the card can have
#endif

typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef KVSINK_EMULATE
#include "emulate.h"
#else
#define DEVICE __device__ __forceinline__
#define DEVICE_STATIC static __device__ __forceinline__
#define BOTH __host__ __device__
#define TABLE __device__ constexpr
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define ARGUMENT(T) const __grid_constant__ T
#define LAUNCH_MEMORY extern __shared__ __align__(128) unsigned char smem[];     // as many bytes as the launch asks for
#define BLOCK_MEMORY(N) __shared__ __align__(16) unsigned char smem[N];
#define TID ((int)threadIdx.x)
#define CTA_X ((int)blockIdx.x)
#define CTA_Y ((int)blockIdx.y)
#define GRID_X ((int)gridDim.x)
DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE u32 transpose8x8(u32 a) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}
DEVICE float exp2_fast(float x) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }
DEVICE u32 pack_half2(float lo, float hi) { u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }
DEVICE u32 pack_bf2(float lo, float hi) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }
DEVICE float half_lo(u32 v) { float r; asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(r) : "r"(v)); return r; }
DEVICE float half_hi(u32 v) { float r; asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "r"(v)); return r; }
DEVICE u32 hmul2(u32 a, u32 b) { u32 r; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 hfma2(u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
DEVICE u32 hfma2_sat(u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.sat.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
DEVICE float shfl_xor(float v, int m) { return __shfl_xor_sync(0xffffffffu, v, m); }
DEVICE int shfl_int(int v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
DEVICE bool any_lane(bool p) { return __any_sync(0xffffffffu, p); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_cta() { __syncthreads(); }
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
DEVICE u32 ballot_warp(bool p) { return __ballot_sync(0xffffffffu, p); }
DEVICE int popcount(u32 v) { return __popc(v); }
// Words other blocks write or poll: past L1, never reordered with each other's arrival, each word checked on its own.
DEVICE uint4 load_polled(const void* p) {
  uint4 v;
  asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE void store_polled(void* p, uint4 v) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
#if TARGET == 90 || TARGET == 100                      // elsewhere a thread has what it was compiled with
template <int N> DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
#else
template <int N> DEVICE void more_registers() {}
template <int N> DEVICE void fewer_registers() {}
#endif
DEVICE u32 float_bits(float v) { return __float_as_uint(v); }
DEVICE float bits_float(u32 v) { return __uint_as_float(v); }
DEVICE u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void barrier_init(u64* bar, u32 n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(bar)), "r"(n) : "memory"); }
DEVICE void barrier_arrive(u64* bar) { asm volatile("{.reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0];}" ::"r"(smem_address(bar)) : "memory"); }
DEVICE void barrier_expect(u64* bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(bar)), "r"(bytes) : "memory");
}
DEVICE void bulk_load(void* dst, const void* src, u32 bytes, u64* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(smem_address(dst)), "l"(src), "r"(bytes), "r"(smem_address(bar)) : "memory");
}
DEVICE void copy16(void* dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_address(dst)), "l"(src) : "memory");
}
DEVICE void arrive_when_copied(u64* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(bar)) : "memory");
}
#if TARGET >= 90
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Suspended by the hardware, not spinning: four waiting service warps would take issue slots from the arithmetic.
DEVICE void barrier_wait(u64* bar, u32 parity) {
  u32 done;
  do {
    asm volatile("{.reg .pred P; mbarrier.try_wait.parity.shared::cta.b64 P, [%1], %2, %3; selp.u32 %0, 1, 0, P;}"
                 : "=r"(done) : "r"(smem_address(bar)), "r"(parity), "r"(10000000u) : "memory");
  } while (!done);
}
#else
DEVICE void barrier_init_fence() { __threadfence_block(); }
DEVICE void barrier_wait(u64* bar, u32 parity) {
  for (u32 n = 0;; n++) {
    u32 done;
    asm volatile("{.reg .pred P; mbarrier.test_wait.parity.shared::cta.b64 P, [%1], %2; selp.u32 %0, 1, 0, P;}"
                 : "=r"(done) : "r"(smem_address(bar)), "r"(parity) : "memory");
    if (done) return;
    if (n > 4) __nanosleep(64);                      // waiting warps must not take issue slots from the arithmetic
  }
}
#endif
// A value that the compiler can neither foresee nor move.
DEVICE void in_place(u32& v) { asm volatile("" : "+r"(v)); }
DEVICE u32 funnel_right(u32 lo, u32 hi, u32 n) { return __funnelshift_r(lo, hi, n); }
DEVICE u32 pick_bytes(u32 a, u32 b, u32 which) { return __byte_perm(a, b, which); }
// The same where no nibble of `which` is above 7, which the compiler then need not see to.
DEVICE u32 take_bytes(u32 a, u32 b, u32 which) { u32 r; asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(which)); return r; }
DEVICE u32 select_bits(u32 mask, u32 a, u32 b) {     // of a where the mask has ones; in one operation, which the compiler leaves as it is
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(r) : "r"(mask), "r"(a), "r"(b));
  return r;
}
DEVICE u32 least_in_warp(u32 v) { return __reduce_min_sync(0xffffffffu, v); }
DEVICE u32 most_in_warp(u32 v) { return __reduce_max_sync(0xffffffffu, v); }
DEVICE u32 or_in_warp(u32 v) { return __reduce_or_sync(0xffffffffu, v); }
// y [64 rows, 128] = a [64 rows, 128] B of four warps, 16 rows each; B [128 columns, 128] of 16-bit numbers in blocks of 8 columns by
// 8 rows of a's channels, those of a column following each other, columns 2048 bytes apart (no swizzle).
#if TARGET == 90
DEVICE void wide_product(float (&y)[16][4], const u32 (&a)[8][4], const void* b) {
  const u64 at = (u64)(smem_address(b) & 0x3ffffu) >> 4 | 128ull / 16 << 16 | 2048ull / 16 << 32;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#define KVSINK_Y(i) "+f"(y[i][0]), "+f"(y[i][1]), "+f"(y[i][2]), "+f"(y[i][3])
#pragma unroll
  for (int k = 0; k < 8; k++)
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "{%64,%65,%66,%67}, %68, p, 1, 1, 0;}"
        : KVSINK_Y(0), KVSINK_Y(1), KVSINK_Y(2), KVSINK_Y(3), KVSINK_Y(4), KVSINK_Y(5), KVSINK_Y(6), KVSINK_Y(7), KVSINK_Y(8), KVSINK_Y(9),
          KVSINK_Y(10), KVSINK_Y(11), KVSINK_Y(12), KVSINK_Y(13), KVSINK_Y(14), KVSINK_Y(15)
        : "r"(a[k][0]), "r"(a[k][1]), "r"(a[k][2]), "r"(a[k][3]), "l"(at + 16 * k), "r"(k));
#undef KVSINK_Y
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
#else
DEVICE void wide_product(float (&y)[16][4], const u32 (&a)[8][4], const void* b) {
  const int lane = TID & 31;
#pragma unroll
  for (int n = 0; n < 16; n++) {
    const u32* column = (const u32*)((const char*)b + n * 2048 + (lane >> 2) * 16) + (lane & 3);
#pragma unroll
    for (int i = 0; i < 4; i++) y[n][i] = 0;
#pragma unroll
    for (int k = 0; k < 8; k++) mma(y[n], a[k][0], a[k][1], a[k][2], a[k][3], column[k * 64], column[k * 64 + 32]);
  }
}
#endif
#endif

constexpr float NEG_INF = -1e30f;

// Copies that barrier `bar`, made for COPIERS arrivals, counts: by the copy engine from 9.0 on, 16 bytes a lane below. The lanes of
// a warp for which `copies` holds call: one lane of the first kind, all of the second.
constexpr bool BULK = TARGET >= 90;
constexpr u32 COPIERS = BULK ? 1 : 32;
DEVICE bool copies(int lane) { return !BULK || lane == 0; }
DEVICE void copies_begin(u64* bar, u32 bytes) {
  if constexpr (BULK) barrier_expect(bar, bytes);
}
DEVICE void copy(void* dst, const void* src, u32 bytes, u64* bar, int lane) {
  if constexpr (BULK) {
    bulk_load(dst, src, bytes, bar);
  } else {
    for (u32 i = 16 * lane; i < bytes; i += 512) copy16((char*)dst + i, (const char*)src + i);
  }
}
DEVICE void copies_end(u64* bar) {
  if constexpr (!BULK) arrive_when_copied(bar);
}
// Small copies of N bytes, 16 a lane: the copy engine takes some twenty instructions for each. All lanes then arrive when copied.
template <int N> DEVICE void copy_by_lanes(void* dst, const void* src, int lane) {
#pragma unroll
  for (int i = 0; i < N; i += 512)
    if (i + 512 <= N || i + 16 * lane < N) copy16((char*)dst + i + 16 * lane, (const char*)src + i + 16 * lane);
}
DEVICE float warp_sum(float v) {
#pragma unroll
  for (int m = 16; m; m >>= 1) v += shfl_xor(v, m);
  return v;
}
DEVICE float shfl_float(float v, int lane) { return bits_float((u32)shfl_int((int)float_bits(v), lane)); }
#endif
