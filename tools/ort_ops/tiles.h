// AttendTiles: the kernels of kvsink.kernels.cuda over codes in tiles, on the stream that onnxruntime computes on.
//
// What is launched, and with what, is kvsink.kernels.cuda.launch and module; their arguments and machine code stand in images.h, which
// build_ort_ops writes. One new row per sequence is coded and attended to in its codes; the rows of a prompt attend by the runtime's own
// GroupQueryAttention over the decoded rows before them. Nothing is copied from the device, and a step allocates nothing: words that
// blocks leave for each other are made once a stream.
#pragma once
#include <algorithm>

#include "prompt.h"

namespace {

using namespace kvsink::cuda;

void* address(const Input& x) { return x && product(x.dims) ? const_cast<void*>(x.data) : nullptr; }

// Words of one stream that launches find empty and leave so, and queries turned ahead.
struct Place {
  Address partial = 0, arrived = 0, turned = 0;
  size_t turned_bytes = 0;
};

Place& place_of(void* stream, int multiprocessors) {
  static std::mutex lock;
  static std::map<std::pair<int, void*>, std::unique_ptr<Place>> places;
  int device = 0;
  g_driver("cuCtxGetDevice", &device);
  std::lock_guard<std::mutex> guard(lock);
  auto& held = places[{device, stream}];
  if (!held) {
    auto made = std::make_unique<Place>();
    const size_t words = static_cast<size_t>(multiprocessors) * kPartWords;
    g_driver("cuMemAlloc_v2", &made->partial, words * 4);
    g_driver("cuMemAlloc_v2", &made->arrived, size_t{kMostRows} * 4);
    g_driver("cuMemsetD32Async", made->partial, 0xffffffffu, words, stream);
    g_driver("cuMemsetD32Async", made->arrived, 0u, size_t{kMostRows}, stream);
    held = std::move(made);
  }
  return *held;
}

// The kernels of one variant: `Cubin` of kvsink.kernels.cuda.module.
struct Kernels {
  Loaded loaded;
  int groups, warps, threads, row_threads, single_row_threads, single_threads, shared, shared_single, shared_rows, turn_threads = 0,
      shared_turn = 0, turned = 0;
  void *attend, *single, *append, *append_row, *decode, *rows, *turn;

  explicit Kernels(const std::string& name) : loaded(name), groups(loaded.image().groups), warps(loaded.image().warps) {
    const auto sizes = loaded.numbers("kvsink_launch", 6);
    threads = sizes[0], row_threads = sizes[1], single_row_threads = sizes[2], single_threads = sizes[3];
    shared = sizes[4], shared_single = sizes[5], shared_rows = loaded.numbers("kvsink_by_warp", 1)[0];
    attend = loaded.function("attend_packed", shared), single = loaded.function("attend_single", shared_single);
    append = loaded.function("append_rows"), append_row = loaded.function("append_row"), decode = loaded.function("decode_rows");
    rows = shared_rows ? loaded.function("attend_rows", shared_rows) : nullptr;
    if (!loaded.image().ahead) return;
    const auto ahead = loaded.numbers("kvsink_turn", 3);
    turn_threads = ahead[0], shared_turn = ahead[1], turned = ahead[2], turn = loaded.function("turn_queries", shared_turn);
  }

  int share(int heads) const { return std::max(1, (loaded.multiprocessors - kSpare) / heads); }

  void run_append(RowArguments& a, void* stream) const {
    if (a.S == 1 && a.B <= kSingleRows && loaded.image().single_row) {
      launch(append_row, a.Hkv, a.B, single_row_threads, 0, stream, a);
      return;
    }
    const int64_t pairs = int64_t{a.B} * a.S * a.Hkv;
    launch(append, static_cast<unsigned>((pairs + a.per - 1) / a.per), 1, row_threads, 0, stream, a);
  }

  void run_attend(AttendArguments& a, const RowArguments& fresh, int heads, Place& place, void* stream) const {
    const bool alone = a.B == 1 && a.share == a.tiles && a.E <= kFew && shared_single;
    if (turned && !alone) {
      const size_t bytes = size_t(a.B) * heads * a.tiles * turned;
      if (place.turned_bytes < bytes) {  // a longer cache than any before; a captured graph of one before keeps what it was given
        g_driver("cuMemAlloc_v2", &place.turned, bytes);
        place.turned_bytes = bytes;
      }
      a.turned = reinterpret_cast<void*>(place.turned);
      launch(turn, share(heads), heads, turn_threads, shared_turn, stream, a);
    }
    if (alone) {
      launch(single, a.share, heads, single_threads, shared_single, stream, a, fresh);
      return;
    }
    const int64_t many = int64_t{warps} * a.share;
    const bool whole = (a.B + many - 1) / many * many * a.tiles <= a.B * std::max<double>(kRowCost, 1.1 * a.tiles);
    const bool by_warp = whole && rows && !loaded.image().many;
    launch(by_warp ? rows : attend, a.share, heads, threads, by_warp ? shared_rows : shared, stream, a, fresh);
  }
};

struct AttendTiles : Kernel {
  enum { kMask, kQ, kK, kV, kPositions, kState, kTable = kState + 8, kStartCos, kStartSin, kBasis, kSigma, kVMean, kVSigma, kTileMean,
         kTileTurn, kTileBasis, kTileRows, kKBack, kVBack, kCandidates };
  std::string name;
  float scale, key_clip, value_clip;
  int key_hadamard, value_hadamard;
  Dims segments;
  int64_t room;
  std::vector<std::unique_ptr<PromptAttention>> prompt;  // for all KV heads at a time, a half of them, ...

  explicit AttendTiles(const Attributes& a)
      : name(a.text("kernels")), scale(a.number("scale", 1.0f)), key_clip(a.number("key_clip", 1.0f)),
        value_clip(a.number("value_clip", 1.0f)), key_hadamard(static_cast<int>(a.integer("key_hadamard"))),
        value_hadamard(static_cast<int>(a.integer("value_hadamard"))), segments(a.integers("segments")),
        room(a.integer("room") ? a.integer("room") : kRoom) {
    const int64_t groups = a.integer("heads") / a.integer("kv_heads");
    int64_t many = a.integer("kv_heads");
    prompt.push_back(std::make_unique<PromptAttention>(a.info(), many * groups, many, scale));
    for (; many % 2 == 0; prompt.push_back(std::make_unique<PromptAttention>(a.info(), many * groups, many, scale))) many /= 2;
  }

  void run(const Call& call) const override {
    void* stream = call.stream();
    const Input mask = call.input(kMask), q = call.input(kQ), k = call.input(kK), v = call.input(kV), positions = call.input(kPositions);
    Kernels& kernels = held<Kernels>(name);
    void* state[8] = {};
    int64_t slots = 0, exact = 0;
    for (int i = 0; i < 8; i++) {
      const Input past = call.input(kState + i);
      if (!past) continue;
      if (i == 0 || i == 4) (i == 0 ? slots : exact) = past.dims.at(2);
      state[i] = call.output<uint8_t>(1 + i, past.dims);
      const int64_t bytes = product(past.dims) * size_of(past.type);
      if (state[i] != past.data && bytes)  // where past and present are one tensor, nothing moves
        g_driver("cuMemcpyDtoDAsync_v2", reinterpret_cast<Address>(state[i]), reinterpret_cast<Address>(past.data),
                 static_cast<size_t>(bytes), stream);
    }
    const int64_t fresh = k.dims[2], total = mask.dims.at(1), first = total - fresh;
    if (slots % 128) throw std::runtime_error("AttendTiles: a cache has a multiple of 128 slots");
    if (total > slots || (first < 0 && fresh > 1))
      throw std::runtime_error("AttendTiles: " + std::to_string(fresh) + " rows behind " + std::to_string(first) + " do not fit " +
                               std::to_string(slots) + " slots; make the cache longer");
    if (fresh > 1) attend_prompt(call, kernels, q, k, v, state, exact, first, slots, stream);
    RowArguments a = rows(k.dims, slots);
    const auto input = [&](int i) { return address(call.input(i)); };
    a.k = address(k), a.v = address(v), a.table = input(kTable), a.start_cos = input(kStartCos), a.start_sin = input(kStartSin);
    a.basis = input(kBasis), a.sigma = input(kSigma), a.v_mean = input(kVMean), a.v_sigma = input(kVSigma);
    a.length = address(positions), a.length_row = positions.dims[0] > 1 ? fresh : 0;  // rows held: the position of the first new one
    a.k_codes = state[0], a.k_scale = state[1], a.v_codes = state[2], a.v_scale = state[3];
    kernels.run_append(a, stream);
    if (fresh > 1)
      enter(call, k, v, state, exact, first, stream);
    else
      attend_row(call, kernels, q, a, state, exact, slots, stream);
  }

 private:
  RowArguments rows(const Dims& fresh, int64_t slots) const {
    RowArguments a = {};
    a.B = static_cast<int>(fresh[0]), a.Hkv = static_cast<int>(fresh[1]), a.S = static_cast<int>(fresh[2]), a.L = static_cast<int>(slots);
    a.k_stride[0] = a.v_stride[0] = fresh[1] * fresh[2] * fresh[3], a.k_stride[1] = a.v_stride[1] = fresh[2] * fresh[3];
    a.k_stride[2] = a.v_stride[2] = fresh[3];
    a.key_hadamard = key_hadamard, a.value_hadamard = value_hadamard, a.key_clip = key_clip, a.value_clip = value_clip;
    a.per = static_cast<int>(std::min<int64_t>(8, fresh[0] * fresh[2]));
    return a;
  }

  // One new row: attention reads the codes, and offers the row to the exact ones.
  void attend_row(const Call& call, const Kernels& kernels, const Input& q, const RowArguments& coded, void* const* state, int64_t exact,
                  int64_t slots, void* stream) const {
    const auto input = [&](int i) { return address(call.input(i)); };
    Place& place = place_of(stream, kernels.loaded.multiprocessors);
    RowArguments fresh = coded;
    if (exact) {
      if (fresh.B * (fresh.Hkv + 1) > kMostRows) throw std::runtime_error("AttendTiles: more sequences than its kernels see to; feed fewer");
      fresh.exact_k = state[4], fresh.exact_v = state[5], fresh.exact_slot = state[6], fresh.exact_score = state[7];
      fresh.E = static_cast<int>(exact), fresh.segments = static_cast<int>(segments.size());
      fresh.arrived = reinterpret_cast<void*>(place.arrived);
      fresh.group_arrived = reinterpret_cast<void*>(place.arrived + 4 * static_cast<Address>(fresh.B));
      for (size_t g = 0; g < segments.size(); g++)
        fresh.score[g] = input(kCandidates + 2 * g), fresh.capacity[g] = static_cast<int>(segments[g]);
    }
    AttendArguments p = {};
    const int heads = fresh.Hkv * kernels.groups, tiles = static_cast<int>(slots / 128);
    p.q = address(q), p.k_codes = state[0], p.k_scale = state[1], p.v_codes = state[2], p.v_scale = state[3];
    p.mean = input(kTileMean), p.rotation = input(kTileTurn), p.basis = input(kTileBasis), p.length = coded.length;
    p.length_row = coded.length_row, p.exact_k = state[4], p.exact_v = state[5], p.exact_slot = state[6];
    p.new_k = coded.k, p.new_v = coded.v, p.value_mean = coded.v_mean, p.value_sigma = input(kVBack);
    p.out = call.output<uint16_t>(0, {q.dims[0], 1, q.dims[1] * q.dims[3]}), p.partial = reinterpret_cast<void*>(place.partial);
    p.B = fresh.B, p.Hkv = fresh.Hkv, p.share = std::min(kernels.share(heads), fresh.B * tiles), p.tiles = tiles;
    p.E = static_cast<int>(exact), p.N = 1, p.key_hadamard = key_hadamard, p.value_hadamard = value_hadamard;
    p.scale = scale * 1.4426950408889634f;
    kernels.run_attend(p, fresh, heads, place, stream);
  }

  // Of one sequence as many KV heads at a time as have room for their rows in 16 bit, else all.
  const PromptAttention& attention_of(int64_t batch, int64_t total, int64_t dim) const {
    size_t i = 0;
    while (batch == 1 && i + 1 < prompt.size() && 4 * prompt[i]->kv_heads * total * dim > room) i++;
    return *prompt[i];
  }

  // Rows of a prompt: the runtime's own attention over the rows before them, decoded, and themselves.
  void attend_prompt(const Call& call, const Kernels& kernels, const Input& q, const Input& k, const Input& v, void* const* state,
                     int64_t exact, int64_t first, int64_t slots, void* stream) const {
    const int64_t batch = q.dims[0], fresh = q.dims[2], dim = q.dims[3], kv_heads = k.dims[1], groups = q.dims[1] / kv_heads;
    int32_t total = static_cast<int32_t>(first + fresh);
    const PromptAttention& attention = attention_of(batch, total, dim);
    const int64_t many = attention.kv_heads;
    const Dims every = {batch, many, total, dim}, one = {batch}, shape = {batch, fresh, q.dims[1] * dim};
    const Dims wide = {batch, fresh, many * groups * dim}, narrow = {batch, fresh, many * dim};
    const bool whole = many == kv_heads;
    uint16_t* const attended = whole ? nullptr : call.output<uint16_t>(0, shape);
    const PromptKernels& own = held<PromptKernels>(kPromptKernels);
    const auto part = [](void* begin, int64_t bytes, int64_t heads, int64_t head) -> void* {  // of a tensor with `heads` equal parts
      return begin ? static_cast<char*>(begin) + bytes / heads * head : nullptr;
    };
    for (int64_t head = 0; head < kv_heads; head += many) {
      Room room((whole ? 1 : 2) * Room::bytes_of(product(wide), 2) + 2 * Room::bytes_of(product(narrow), 2) +
                    2 * Room::bytes_of(product(every), 2) + Room::bytes_of(batch, 4), stream);
      const ort::Value* given[7] = {};
      for (int i = 0; i < 3; i++) {
        const Input& x = i == 0 ? q : i == 1 ? k : v;
        void* to = nullptr;
        given[i] = room.tensor(i == 0 ? wide : narrow, ort::kHalf, &to);
        RowsArguments r = {};
        r.x = part(address(x), product(x.dims) * 2, kv_heads, head), r.y = to;
        r.H = static_cast<int>(x.dims[1] / kv_heads * many), r.S = static_cast<int>(fresh), r.D = static_cast<int>(dim);
        launch(own.rows, static_cast<unsigned>(fresh), static_cast<unsigned>(batch), 256, 0, stream, r);
      }
      void *keys = nullptr, *values = nullptr, *last = nullptr, *rows_out = nullptr;
      ort::Value* out[3] = {nullptr, room.tensor(every, ort::kHalf, &keys), room.tensor(every, ort::kHalf, &values)};
      if (first) {  // one tensor is past and present, so that nothing of it is copied
        const Dims before = {batch, many, first, dim};
        const auto table = [&](int i) {
          const Input x = call.input(i);
          return x ? part(address(x), product(x.dims) * size_of(x.type), kv_heads, head) : nullptr;
        };
        const auto codes = [&](int i) {
          const Input x = call.input(kState + i);
          return x ? part(state[i], product(x.dims) * size_of(x.type) / batch, kv_heads, head) : nullptr;
        };
        RowArguments a = rows(before, slots);
        a.k_stride[0] = a.v_stride[0] = many * total * dim, a.k_stride[1] = a.v_stride[1] = total * dim;
        a.k = keys, a.v = values, a.start_cos = address(call.input(kStartCos)), a.start_sin = address(call.input(kStartSin));
        a.table = table(kTable), a.basis = table(kTileRows), a.sigma = table(kKBack), a.v_mean = table(kVMean), a.v_sigma = table(kVBack);
        a.k_codes = codes(0), a.k_scale = codes(1), a.v_codes = codes(2), a.v_scale = codes(3);
        launch(kernels.decode, static_cast<unsigned>((batch * first + 7) / 8), a.Hkv, kernels.row_threads, 0, stream, a);
        if (exact) {
          LayArguments l = {};
          l.k = keys, l.v = values, l.exact_k = codes(4), l.exact_v = codes(5), l.slot = state[6];
          l.E = static_cast<int>(exact), l.H = a.Hkv, l.S = total, l.D = static_cast<int>(dim);
          launch(own.lay, l.E, a.B * a.Hkv, 128, 0, stream, l);
        }
        given[3] = out[1], given[4] = out[2];
      }
      given[5] = room.tensor(one, ort::kInt32, &last), given[6] = room.number(&total);
      g_driver("cuMemsetD32Async", reinterpret_cast<Address>(last), static_cast<unsigned>(total - 1), static_cast<size_t>(batch), stream);
      if (whole)
        g_runtime.check(g_runtime.api.output(call.context(), 0, shape.data(), shape.size(), &out[0]));
      else
        out[0] = room.tensor(wide, ort::kHalf, &rows_out);
      attention.run(call.context(), given, out);
      const size_t width = static_cast<size_t>(wide[2]) * 2, pitch = static_cast<size_t>(shape[2]) * 2;
      if (!whole) copy_columns(attended + head * groups * dim, pitch, rows_out, width, static_cast<size_t>(batch * fresh), stream);
    }
  }

  // The running selection over the rows of a prompt.
  void enter(const Call& call, const Input& k, const Input& v, void* const* state, int64_t exact, int64_t first, void* stream) const {
    if (!exact) return;
    EnterArguments e = {};
    e.k = address(k), e.v = address(v), e.exact_k = state[4], e.exact_v = state[5], e.slot = state[6], e.score = state[7];
    for (size_t g = 0; g < segments.size(); g++) {
      const Input best = call.input(kCandidates + 2 * g), row = call.input(kCandidates + 2 * g + 1);
      e.best[g] = address(best), e.row[g] = address(row);
      e.capacity[g] = static_cast<int>(segments[g]), e.count[g] = static_cast<int>(best.dims.at(1));
    }
    e.segments = static_cast<int>(segments.size()), e.E = static_cast<int>(exact), e.H = static_cast<int>(k.dims[1]);
    e.S = static_cast<int>(k.dims[2]), e.D = static_cast<int>(k.dims[3]), e.first = static_cast<int>(first);
    launch(held<PromptKernels>(kPromptKernels).enter, static_cast<unsigned>(k.dims[0]), 1, 256, 0, stream, e);
  }
};

}  // namespace
