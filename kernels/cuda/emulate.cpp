// Shared library around the emulated kernels: one fiber per thread, blocks one after another. For tests without a GPU.
#define KVSINK_EMULATE
#include "arch.cuh"
#include "channels.cuh"
#ifdef KVSINK_CODES_ALONE
#include "codes.cuh"
#else
#include "fields.cuh"
#include "trellis.cuh"
#include "read.cuh"
#include "attend.cuh"
#include "query.cuh"
#include "softmax.cuh"
#include "exact.cuh"
#include "merge.cuh"
#include "rounding.cuh"
#include "search.cuh"
#include "rows.cuh"
#include "schedule.cuh"
#include "turn.cuh"
#include "pages.cuh"
#endif

static const void *params, *fresh;
static void (*kernel)();
static void entry() {
  kernel();
  emu::done[emu::tid] = true;
  emu::yield();
}
static void run(void (*f)(), const void* p, int grid_x, int grid_y, int threads, int bytes) {
  const size_t stack = 256 << 10;
  params = p;
  kernel = f;
  emu::threads = threads;
  emu::grid_x = grid_x;
  char* stacks = (char*)malloc(stack * threads);
  emu::smem = (unsigned char*)aligned_alloc(128, (bytes + 127) / 128 * 128);
  for (emu::cta_y = 0; emu::cta_y < grid_y; emu::cta_y++)
    for (emu::cta_x = 0; emu::cta_x < grid_x; emu::cta_x++) {
      memset(emu::smem, 0xff, bytes);
      emu::cta_arrived = 0;
      for (int& n : emu::part_arrived) n = 0;
      for (auto& w : emu::warps) w.arrived = 0;
      for (int i = 0; i < threads; i++) {
        getcontext(&emu::fiber[i]);
        emu::fiber[i].uc_stack.ss_sp = stacks + i * stack;
        emu::fiber[i].uc_stack.ss_size = stack;
        emu::fiber[i].uc_link = nullptr;
        emu::done[i] = false;
        makecontext(&emu::fiber[i], entry, 0);
      }
      for (bool any = true; any;) {
        any = false;
        for (emu::tid = 0; emu::tid < threads; emu::tid++)
          if (!emu::done[emu::tid]) { any = true; swapcontext(&emu::scheduler, &emu::fiber[emu::tid]); }
      }
    }
  free(stacks);
  free(emu::smem);
}
#ifdef KVSINK_CODES_ALONE
extern "C" void run_codes(const Codes* p, int heads) {
  run([] { attend_codes(*(const Codes*)params); }, p, p->splits, heads, THREADS, SHARED_BYTES);
}
extern "C" void run_rotate(const Codes* p, int grid_x) {
  run([] { rotate_queries(*(const Codes*)params); }, p, grid_x, 1, ROTATE_THREADS, ROTATE_BYTES);
}
extern "C" void run_merge(const Codes* p, int grid_x) {
  run([] { merge_codes(*(const Codes*)params); }, p, grid_x, 1, 32 * MERGE_WARPS, MERGE_BYTES);
}
extern "C" int codes_bytes() { return (int)sizeof(Codes); }
extern "C" int smem_bytes() { return SHARED_BYTES; }
#else
extern "C" void run_attend(const Params* p, const RowParams* n) {
  fresh = n;
  run([] { attend_packed(*(const Params*)params, *(const RowParams*)fresh); }, p, p->share, p->Hkv * GROUPS, THREADS, SMEM_BYTES);
}
extern "C" void run_attend_single(const Params* p, const RowParams* n) {
  fresh = n;
  run([] { attend_single(*(const Params*)params, *(const RowParams*)fresh); }, p, p->share, p->Hkv * GROUPS, SINGLE_THREADS, Single::BYTES);
}
#if MODE == 2 && HEAD_DIM > 128
extern "C" void run_turn(const Params* p, int grid_x) {
  run([] { turn_queries(*(const Params*)params); }, p, grid_x, p->Hkv * GROUPS, 32 * TURN_WARPS, Turn::BYTES);
}
#endif
extern "C" int single_bytes() { return Single::BYTES <= SHARED_MOST ? Single::BYTES : 0; }
extern "C" int turned_bytes() { return 2 * TURNED_BYTES; }
#if HEADS_PER_KV <= 2
extern "C" void run_attend_rows(const Params* p, const RowParams* n) {
  fresh = n;
  run([] { attend_rows(*(const Params*)params, *(const RowParams*)fresh); }, p, p->share, p->Hkv * GROUPS, THREADS, WARP_SMEM);
}
extern "C" int rows_smem_bytes() { return WARP_SMEM; }
#endif
extern "C" void run_append(const RowParams* p, int blocks) {
  run([] { append_rows(*(const RowParams*)params); }, p, blocks, 1, ROW_THREADS, ROW_SMEM);
}
extern "C" void run_append_row(const RowParams* p) {
  run([] { append_row(*(const RowParams*)params); }, p, p->Hkv, p->B, SINGLE_ROW_THREADS, SINGLE_ROW_SMEM);
}
extern "C" void run_decode(const RowParams* p, int grid_x) {
  run([] { decode_rows(*(const RowParams*)params); }, p, grid_x, p->Hkv, ROW_THREADS, ROW_SMEM);
}
extern "C" void run_list(const PlaceParams* p, int sequences) {
  run([] { list_exact(*(const PlaceParams*)params); }, p, sequences, 1, 32, 128);
}
extern "C" void read_gains(float* out, int bytes) { gains_of(out[0], out[1], (u32)bytes); }
extern "C" int place_bytes() { return (int)sizeof(PlaceParams); }
extern "C" int attend_bytes() { return (int)sizeof(Params); }
extern "C" int row_bytes() { return (int)sizeof(RowParams); }
extern "C" int smem_bytes() { return SMEM_BYTES; }
extern "C" int slot_words() { return COLUMNS * SLOT; }
#endif
