// Shared library around the emulated kernel, called from emulate_test.py.
#define KVSINK_EMULATE
#include "attend_packed.cuh"

static const Params* params;
static void entry() {
  attend_packed(*params);
  emu::done[emu::tid] = true;
  emu::yield();
}
extern "C" int run_emulated(const Params* p, int grid_x) {
  const size_t stack = 256 << 10;
  params = p;
  emu::threads = THREADS;
  emu::grid_x = grid_x;
  char* stacks = (char*)malloc(stack * THREADS);
  emu::smem = (unsigned char*)aligned_alloc(128, (SMEM_BYTES + 127) / 128 * 128);
  for (emu::cta_y = 0; emu::cta_y < p->Hkv; emu::cta_y++)
    for (emu::cta_x = 0; emu::cta_x < grid_x; emu::cta_x++) {
      memset(emu::smem, 0xff, SMEM_BYTES);
      emu::cta_arrived = 0;
      for (auto& w : emu::warps) w.arrived = 0;
      for (int i = 0; i < THREADS; i++) {
        getcontext(&emu::fiber[i]);
        emu::fiber[i].uc_stack.ss_sp = stacks + i * stack;
        emu::fiber[i].uc_stack.ss_size = stack;
        emu::fiber[i].uc_link = nullptr;
        emu::done[i] = false;
        makecontext(&emu::fiber[i], entry, 0);
      }
      for (bool any = true; any;) {
        any = false;
        for (emu::tid = 0; emu::tid < THREADS; emu::tid++)
          if (!emu::done[emu::tid]) { any = true; swapcontext(&emu::scheduler, &emu::fiber[emu::tid]); }
      }
    }
  free(stacks);
  free(emu::smem);
  return 0;
}
extern "C" int smem_bytes() { return SMEM_BYTES; }
extern "C" int param_bytes() { return (int)sizeof(Params); }
