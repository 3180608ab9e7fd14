// What a prompt asks for beside the kernels of the cache, in float16: `enter_rows` chooses the rows that stay exact
// (kvsink.kernels.selection), `lay_exact` lays them over decoded slots, `to_rows` puts the heads of a row side by side.
typedef unsigned short half_bits;

constexpr int SEGMENTS = 4, MOST = 64, POOL = 2 * MOST;  // segments, places of one, places and candidates

struct EnterParams {
  const half_bits *k, *v;       // [B, H, S, D] new rows, keys after RoPE
  half_bits *exact_k, *exact_v; // [B, H, E, D]
  int* slot;                    // [B, E]
  float* score;                 // [B, E]
  const float* best[SEGMENTS];  // [B, count] scores of the candidates of each segment
  const long long* row[SEGMENTS];  // [B, count] their places among the new rows
  int capacity[SEGMENTS], count[SEGMENTS];
  int segments, E, H, S, D, first;  // first: slot of the first new row
};

extern "C" __global__ void __launch_bounds__(256) enter_rows(const __grid_constant__ EnterParams p) {
  __shared__ float score[POOL];
  __shared__ int slot[POOL], from[MOST], merged[MOST];
  const int b = blockIdx.x, thread = threadIdx.x;
  const float never = __int_as_float(0xff800000);
  for (int g = 0, at = 0; g < p.segments; at += p.capacity[g++]) {
    const int held = p.capacity[g], pool = held + p.count[g];
    for (int i = thread; i < pool; i += blockDim.x) {
      float mine = i < held ? p.score[b * p.E + at + i] : p.best[g][b * p.count[g] + i - held];
      int named = i < held ? p.slot[b * p.E + at + i] : (int)p.row[g][b * p.count[g] + i - held] + p.first;
      if (i < held && named < -1) named = -named - 2;  // a place marked as a repeat still names its row
      score[i] = mine > never ? mine : never;
      slot[i] = named;
    }
    __syncthreads();
    for (int i = thread; i < pool; i += blockDim.x) {
      int rank = 0;
      for (int j = 0; j < pool; j++) {
        const bool same = score[j] == score[i];
        rank += score[j] > score[i] || (same && (slot[j] < slot[i] || (slot[j] == slot[i] && j < i)));
      }
      if (rank < held) from[rank] = i;
    }
    __syncthreads();
    for (int c = thread; c < 2 * p.H * p.D; c += blockDim.x) {  // a channel of one side and head: read, then written
      const int head = c % (p.H * p.D) / p.D, d = c % p.D;
      const half_bits* fresh = c < p.H * p.D ? p.k : p.v;
      half_bits* exact = (c < p.H * p.D ? p.exact_k : p.exact_v) + ((long long)(b * p.H + head) * p.E + at) * p.D + d;
      half_bits kept[MOST];
      for (int i = 0; i < held; i++) {
        const long long row = from[i] < held ? 0 : p.row[g][b * p.count[g] + from[i] - held];
        kept[i] = from[i] < held ? exact[from[i] * p.D] : fresh[((long long)(b * p.H + head) * p.S + row) * p.D + d];
      }
      for (int i = 0; i < held; i++) exact[i * p.D] = kept[i];
    }
    for (int i = thread; i < held; i += blockDim.x) {
      const float mine = score[from[i]];
      merged[at + i] = mine > never ? slot[from[i]] : -1;
      p.score[b * p.E + at + i] = mine;
    }
    __syncthreads();
  }
  for (int i = thread; i < p.E; i += blockDim.x) {
    bool repeat = false;
    for (int j = 0; j < i; j++) repeat |= merged[j] == merged[i];
    p.slot[b * p.E + i] = repeat && merged[i] >= 0 ? -merged[i] - 2 : merged[i];
  }
}

struct LayParams {
  half_bits *k, *v;                    // [B, H, S, D] slots 0 ... S - 1
  const half_bits *exact_k, *exact_v;  // [B, H, E, D]
  const int* slot;                     // [B, E]
  int E, H, S, D;
};

extern "C" __global__ void __launch_bounds__(256) lay_exact(const __grid_constant__ LayParams p) {
  const int e = blockIdx.x, head = blockIdx.y % p.H, b = blockIdx.y / p.H, slot = p.slot[b * p.E + e];
  if (slot < 0 || slot >= p.S) return;
  const long long to = ((long long)(b * p.H + head) * p.S + slot) * p.D, from = ((long long)(b * p.H + head) * p.E + e) * p.D;
  for (int d = threadIdx.x; d < p.D; d += blockDim.x) p.k[to + d] = p.exact_k[from + d], p.v[to + d] = p.exact_v[from + d];
}

struct RowsParams {
  const uint4* x;  // [B, H, S, D / 8]
  uint4* y;        // [B, S, H, D / 8]
  int H, S, D;
};

extern "C" __global__ void __launch_bounds__(256) to_rows(const __grid_constant__ RowsParams p) {
  const int row = blockIdx.x, b = blockIdx.y, wide = p.D / 8;
  for (int i = threadIdx.x; i < p.H * wide; i += blockDim.x)
    p.y[((long long)b * p.S + row) * p.H * wide + i] = p.x[((long long)(b * p.H + i / wide) * p.S + row) * wide + i % wide];
}
