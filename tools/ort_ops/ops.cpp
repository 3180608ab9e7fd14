// Nodes of com.kvsink as a custom-op library of onnxruntime: OpenMP threads, vectorised loops, no other dependency.
//
// Built by `python -m kvsink.tools.build_ort_ops`. What each node does is written in kvsink.export.bodies, in ONNX operators; the
// sums here may run in another order. A kernel that cannot go on returns a status, so that the session's run fails with words.
#include <omp.h>

#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "runtime.h"

namespace packed {  // what the cache's own path on the CPU does, compiled beside this file
extern "C" {
#include "attend.h"
#include "walks.h"
}
constexpr int kFresh = SOURCES - 1;  // the place of new rows among those read as they came
}  // namespace packed

namespace {

using namespace kvsink;

int g_threads = 0;  // 0: as many as OpenMP would take

int threads() { return g_threads > 0 ? g_threads : omp_get_max_threads(); }

struct Runtime {
  ort::Api api;
  void check(ort::Status* status) const {
    if (status == nullptr) return;
    const std::string said = api.message(status);
    api.release(status);
    throw std::runtime_error("onnxruntime refused a call of the operator library: " + said);
  }
};

Runtime g_runtime;

using Dims = std::vector<int64_t>;

int64_t product(const Dims& dims, size_t from = 0, size_t to = SIZE_MAX) {
  int64_t n = 1;
  for (size_t i = from; i < std::min(to, dims.size()); i++) n *= dims[i];
  return n;
}

struct Input {
  const void* data = nullptr;
  ort::Type type = ort::kAny;
  Dims dims;

  explicit operator bool() const { return data != nullptr || !dims.empty(); }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  const float* floats() const {
    if (type != ort::kFloat) throw std::runtime_error("a tensor is not float32");
    return as<float>();
  }
  int64_t integer(int64_t i) const {
    if (type == ort::kInt64) return as<int64_t>()[i];
    if (type == ort::kInt32) return as<int32_t>()[i];
    throw std::runtime_error("a tensor is not int32 or int64");
  }
};

class Call {
 public:
  explicit Call(ort::Context* context) : context_(context) { g_runtime.check(g_runtime.api.input_count(context, &count_)); }

  Input input(size_t index) const {
    Input out;
    const ort::Value* value = nullptr;
    if (index >= count_) return out;
    const auto& api = g_runtime.api;
    g_runtime.check(api.input(context_, index, &value));
    if (value == nullptr) return out;
    ort::Shape* shape = nullptr;
    size_t rank = 0;
    g_runtime.check(api.shape_of(value, &shape));
    std::unique_ptr<ort::Shape, void (*)(ort::Shape*)> held(shape, [](ort::Shape* s) { g_runtime.api.release(s); });
    g_runtime.check(api.rank(shape, &rank));
    out.dims.resize(rank);
    g_runtime.check(api.dims(shape, out.dims.data(), rank));
    g_runtime.check(api.element_type(shape, &out.type));
    void* data = nullptr;
    g_runtime.check(api.data(const_cast<ort::Value*>(value), &data));
    out.data = data;
    return out;
  }

  template <typename T>
  T* output(size_t index, const Dims& dims) const {
    ort::Value* value = nullptr;
    void* data = nullptr;
    g_runtime.check(g_runtime.api.output(context_, index, dims.data(), dims.size(), &value));
    if (value == nullptr) throw std::runtime_error("an output is missing");
    g_runtime.check(g_runtime.api.data(value, &data));
    return static_cast<T*>(data);
  }
  size_t inputs() const { return count_; }
  ort::Context* context() const { return context_; }
  void* stream() const {
    void* out = nullptr;
    g_runtime.check(g_runtime.api.stream(context_, &out));
    return out;
  }

 private:
  ort::Context* context_;
  size_t count_ = 0;
};

class Attributes {
 public:
  explicit Attributes(const ort::Info* info) : info_(info) {}
  const ort::Info* info() const { return info_; }

  int64_t integer(const char* name) const {
    int64_t out = 0;
    return ask(g_runtime.api.attribute(info_, name, &out)) ? out : 0;
  }
  float number(const char* name, float missing) const {
    float out = 0;
    return ask(g_runtime.api.attribute(info_, name, &out)) ? out : missing;
  }
  std::string text(const char* name) const {
    size_t size = 0;
    ask(g_runtime.api.attribute(info_, name, static_cast<char*>(nullptr), &size));
    std::string out(size, '\0');
    if (size == 0 || !ask(g_runtime.api.attribute(info_, name, out.data(), &size))) return "";
    return out.c_str();
  }
  Dims integers(const char* name) const {
    size_t size = 0;
    ask(g_runtime.api.attribute(info_, name, static_cast<int64_t*>(nullptr), &size));
    Dims out(size);
    if (size == 0 || !ask(g_runtime.api.attribute(info_, name, out.data(), &size))) return {};
    return out;
  }

 private:
  static bool ask(ort::Status* status) {
    if (status != nullptr) g_runtime.api.release(status);
    return status == nullptr;
  }
  const ort::Info* info_;
};

struct Kernel {
  virtual ~Kernel() = default;
  virtual void run(const Call& call) const = 0;
};

// -- quantizers ------------------------------------------------------------------------------------------------------------

struct Coding {
  std::string kind;
  Dims widths, book;
  int64_t group, code_bits;
  bool gain;
  float clip;
  std::vector<Run> runs;

  explicit Coding(const Attributes& a, const std::string& prefix = "") {
    const auto named = [&](const char* name) { return prefix + name; };
    kind = a.text(named("kind").c_str()), widths = a.integers(named("widths").c_str()), book = a.integers(named("book").c_str());
    group = a.integer(named("group_size").c_str()), code_bits = a.integer(named("code_bits").c_str());
    gain = a.integer(named("gain").c_str()) != 0, clip = a.number(named("clip").c_str(), 1.0f), runs = runs_of(widths);
    for (const char* known : {"uniform", "uniform-int", "gauss", "lloyd", "lloyd-even", "vector", "static"})
      if (kind == known) return;
    if (!walk()) throw std::runtime_error("quantizer " + kind + " has no kernel");
    for (const int64_t width : widths)
      if (width < 1 || width > 6) throw std::runtime_error("a trellis has 1 to 6 bits a channel");
  }
  bool vector() const { return kind == "vector"; }
  bool walk() const { return kind == "trellis"; }
  bool sigma() const { return kind == "lloyd" || kind == "lloyd-even"; }
  int64_t dim() const { return vector() ? book[1] * book[3] : 8 * static_cast<int64_t>(widths.size()); }
  int64_t bytes() const {
    return vector() ? (book[1] * code_bits + 7) / 8 : std::accumulate(widths.begin(), widths.end(), int64_t{walk()});
  }
  int64_t scales() const {
    if (vector() || sigma()) return gain ? 1 : 0;
    return walk() || kind == "static" ? 0 : 2 * dim() / group;
  }
  int width() const { return static_cast<int>(widths.front()); }

  // Runs of equal width as kernels/cpu takes them.
  std::vector<int64_t> numbers() const {
    std::vector<int64_t> out;
    for (const Run& r : runs) out.insert(out.end(), {r.start, r.end, r.byte, r.width});
    return out;
  }
};

// The search for the best walks of a row.
struct Walks {
  int64_t dim, runs;
  std::vector<int64_t> run;
  std::vector<const float*> levels, edges;

  explicit Walks(const Coding& c) : dim(c.dim()), runs(static_cast<int64_t>(c.runs.size())), run(c.numbers()) {
    for (const Run& r : c.runs) levels.push_back(kSubsetLevels[r.width]), edges.push_back(kSubsetEdges[r.width]);
  }
  void write(const float* x, const float* sigma, uint8_t* out) const {
    std::vector<float> room(10 * dim);
    std::vector<uint16_t> code(dim);
    int64_t at = 0;
    const uint8_t gain =
        packed::kvsink_trellis_row(dim, runs, run.data(), levels.data(), edges.data(), x, sigma, room.data(), code.data());
    for (const int64_t* r = run.data(); r < run.data() + run.size(); at += (r[1] - r[0]) * r[3] / 8, r += 4)
      pack(code.data() + r[0], static_cast<int>(r[3]), r[1] - r[0], out + r[2]);
    out[at] = gain;
  }
};

struct QuantizeKV : Kernel {
  Coding c;
  std::unique_ptr<Walks> walks;
  explicit QuantizeKV(const Attributes& a) : c(a), walks(c.walk() ? std::make_unique<Walks>(c) : nullptr) {}

  void run(const Call& call) const override {
    const Input x = call.input(0), table = call.input(1);
    const int64_t dim = c.dim(), heads = x.dims[1], rows = x.dims[2], all = product(x.dims, 0, 3);
    if (x.dims.size() != 4 || x.dims[3] != dim) throw std::runtime_error("QuantizeKV: rows of another width than its codes");
    const float* from = x.floats();
    const float* tables = table ? table.floats() : nullptr;
    uint8_t* codes = call.output<uint8_t>(0, {x.dims[0], heads, rows, c.bytes()});
    half* scale = call.output<half>(1, {x.dims[0], heads, rows, c.scales()});
    const int64_t bytes = c.bytes(), scales = c.scales(), entry = c.vector() ? (c.book[0] > 1 ? product(c.book, 1) : 0) : dim;
#pragma omp parallel for num_threads(threads()) if (all > 32)
    for (int64_t i = 0; i < all; i++) {
      const float *row = from + i * dim, *own = tables ? tables + i / rows % heads * entry : nullptr;
      uint8_t* out = codes + i * bytes;
      half* numbers = scale + i * scales;
      if (c.vector()) {
        quantize_vector(row, own, c.book[1], c.book[2], c.book[3], static_cast<int>(c.code_bits), c.gain, out, numbers);
      } else if (walks) {
        walks->write(row, own, out);
      } else if (c.sigma()) {
        quantize_lloyd(row, own, dim, c.runs, c.gain, c.kind == "lloyd-even", out, numbers);
      } else if (c.kind == "static") {
        quantize_static(row, own, dim, c.width(), out);
      } else if (c.kind == "gauss") {
        quantize_gauss(row, dim, c.group, c.width(), out, numbers);
      } else {
        quantize_uniform(row, dim, c.group, c.width(), c.clip, c.kind == "uniform-int", out, numbers);
      }
    }
  }
};

// Rows of codes to rows of numbers.
struct Decoder {
  Coding c;
  std::vector<float> whole;      // what integer codes stand for
  std::vector<Table> tables_of;  // of every run of channels
  std::vector<int64_t> run;
  std::vector<std::vector<float>> levels;  // of every run, over and over up to sixteen numbers
  std::vector<const float*> pointers;
  packed::Side side = {};  // what rows of codes alone say of it
  int64_t covered = 0;     // channels that have bits

  Decoder(const Decoder&) = delete;
  explicit Decoder(const Coding& coding) : c(coding), whole(256), run(c.numbers()) {
    const float less = c.kind == "static" ? static_cast<float>(1 << (c.width() - 1)) : 0.0f;
    for (int i = 0; i < 256; i++) whole[i] = static_cast<float>(i) - less;
    for (const Run& r : c.runs) {
      const float* known = levels_of(r.width);
      const int entries = (c.walk() ? 2 : 1) << r.width;
      tables_of.emplace_back(r.width, known);
      levels.emplace_back(std::max(16, entries));
      for (size_t i = 0; i < levels.back().size(); i++) levels.back()[i] = known[i % entries];
      covered += r.end - r.start;
    }
    for (const auto& of : levels) pointers.push_back(of.data());
    side.dim = c.dim(), side.row_bytes = c.bytes(), side.walk = c.walk();
    side.runs = static_cast<int64_t>(c.runs.size()), side.run = run.data(), side.levels = pointers.data();
  }

  const float* levels_of(int width) const {
    if (c.walk()) return kWalkLevels[width];
    if (c.kind == "lloyd-even") return kEvenLevels[width];
    return c.kind == "lloyd" || c.kind == "gauss" ? kLevels[width] : whole.data();
  }

  // One row; own: deviations, steps or the book of its head.
  void row(const uint8_t* codes, const half* numbers, const float* own, float* y) const {
    const int64_t dim = c.dim();
    const float gain = c.gain && c.scales() ? static_cast<float>(numbers[0]) : 1.0f;
    if (c.vector()) {
      const int64_t width = c.book[3], bytes = c.bytes();
      for (int64_t at = 0; at < c.book[1]; at++) {
        const float* value = own + (at * c.book[2] + field(codes, static_cast<int>(c.code_bits), at, bytes)) * width;
        for (int64_t j = 0; j < width; j++) y[at * width + j] = value[j] * gain;
      }
      return;
    }
    if (c.walk()) {
      const float g = packed::kvsink_gain_of(codes[c.bytes() - 1]);
      packed::kvsink_levels(&side, codes, 1, 0, y);
#pragma omp simd
      for (int64_t j = 0; j < dim; j++) y[j] = y[j] * own[j] * g;
      return;
    }
    if (c.sigma()) {
      if (covered < dim) std::fill(y, y + dim, 0.0f);
      for (size_t r = 0; r < c.runs.size(); r++)
        look_up(codes + c.runs[r].byte, c.runs[r].end - c.runs[r].start, tables_of[r], y + c.runs[r].start);
#pragma omp simd
      for (int64_t j = 0; j < dim; j++) y[j] = y[j] * own[j] * gain;
      return;
    }
    look_up(codes, dim, tables_of[0], y);
    if (c.kind == "static") {
#pragma omp simd
      for (int64_t j = 0; j < dim; j++) y[j] *= own[j];
      return;
    }
    for (int64_t g = 0; g < dim / c.group; g++) {
      const float step = static_cast<float>(numbers[2 * g]), base = static_cast<float>(numbers[2 * g + 1]);
      float* part = y + g * c.group;
      if (c.kind == "uniform-int") {
#pragma omp simd
        for (int64_t j = 0; j < c.group; j++) part[j] = (part[j] - base) * step;
      } else {
#pragma omp simd
        for (int64_t j = 0; j < c.group; j++) part[j] = part[j] * step + base;
      }
    }
  }
};

struct DequantizeKV : Kernel {
  Decoder decoder;

  explicit DequantizeKV(const Attributes& a) : decoder(Coding(a)) {}

  void run(const Call& call) const override {
    const Coding& c = decoder.c;
    const Input codes = call.input(0), scale = call.input(1), table = call.input(2);
    const int64_t dim = c.dim(), heads = codes.dims[1], rows = codes.dims[2], all = product(codes.dims, 0, 3);
    const int64_t bytes = c.bytes(), scales = scale ? scale.dims[3] : 0, entry = c.vector() ? (c.book[0] > 1 ? product(c.book, 1) : 0) : dim;
    if (codes.dims.size() != 4 || codes.dims[3] != bytes) throw std::runtime_error("DequantizeKV: codes of another width");
    if (scales != c.scales()) throw std::runtime_error("DequantizeKV: scales of another width");
    const float* tables = table ? table.floats() : nullptr;
    const auto* from = codes.as<uint8_t>();
    const auto* numbers = scale ? scale.as<half>() : nullptr;
    float* out = call.output<float>(0, {codes.dims[0], heads, rows, dim});
#pragma omp parallel for num_threads(threads()) if (all > 64)
    for (int64_t i = 0; i < all; i++)
      decoder.row(from + i * bytes, numbers + i * scales, tables ? tables + i / rows % heads * entry : nullptr, out + i * dim);
  }
};

// -- rotations -------------------------------------------------------------------------------------------------------------

struct HadamardRotate : Kernel {
  int64_t order;
  bool inverse;
  explicit HadamardRotate(const Attributes& a) : order(a.integer("order")), inverse(a.integer("inverse") != 0) {
    if (order < 1 || core_of(order) == 0) throw std::runtime_error("HadamardRotate: no matrix of order " + std::to_string(order));
  }
  void run(const Call& call) const override {
    const Input x = call.input(0);
    const int64_t size = product(x.dims);
    if (x.dims.empty() || x.dims.back() % order) throw std::runtime_error("HadamardRotate: channels do not split into runs");
    const float* from = x.floats();
    float* out = call.output<float>(0, x.dims);
#pragma omp parallel for num_threads(threads()) if (size > 8192)
    for (int64_t i = 0; i < size / order; i++) {
      std::copy(from + i * order, from + (i + 1) * order, out + i * order);
      hadamard(out + i * order, order, inverse);
    }
  }
};

struct ChannelReorder : Kernel {
  explicit ChannelReorder(const Attributes&) {}
  void run(const Call& call) const override {
    const Input x = call.input(0), permutation = call.input(1);
    const int64_t heads = x.dims[1], rows = x.dims[2], dim = x.dims[3];
    const float* from = x.floats();
    float* out = call.output<float>(0, x.dims);
    for (int64_t b = 0; b < x.dims[0]; b++)
      for (int64_t c = 0; c < heads * dim; c++) {
        const int64_t p = permutation.integer(c);
        const float* column = from + (b * heads + p / dim) * rows * dim + p % dim;
        float* to = out + (b * heads + c / dim) * rows * dim + c % dim;
        for (int64_t s = 0; s < rows; s++) to[s * dim] = column[s * dim];
      }
  }
};

// cos and sin [B or 1, S, R] of the rows of x [B, H, S, D]
struct Angles {
  const float *cos, *sin;
  int64_t rotary, rows, stride;
  Angles(const Input& c, const Input& s)
      : cos(c.floats()), sin(s.floats()), rotary(c.dims[2]), rows(c.dims[1]), stride(c.dims[0] > 1 ? rows * rotary : 0) {}
  int64_t at(int64_t b, int64_t row) const { return b * stride + row * rotary; }
};

struct UndoRope : Kernel {
  explicit UndoRope(const Attributes&) {}
  void run(const Call& call) const override {
    const Input x = call.input(0);
    const Angles angles(call.input(1), call.input(2));
    const int64_t heads = x.dims[1], rows = x.dims[2], dim = x.dims[3];
    const float* from = x.floats();
    float* out = call.output<float>(0, x.dims);
#pragma omp parallel for num_threads(threads()) if (rows > 64)
    for (int64_t i = 0; i < x.dims[0] * rows; i++) {
      std::vector<float> cos(angles.rotary), sin(angles.rotary);
      const int64_t b = i / rows, s = i % rows, at = angles.at(b, s);
      for (int64_t j = 0; j < angles.rotary; j++) {
        const float c = angles.cos[at + j], t = angles.sin[at + j], norm = std::max(c * c + t * t, 1e-12f);
        cos[j] = c / norm, sin[j] = -(t / norm);
      }
      for (int64_t h = 0; h < heads; h++) {
        const int64_t row = ((b * heads + h) * rows + s) * dim;
        rope(from + row, cos.data(), sin.data(), angles.rotary, dim, out + row);
      }
    }
  }
};

struct CenterRoped : Kernel {
  explicit CenterRoped(const Attributes&) {}
  void run(const Call& call) const override {
    const Input x = call.input(0), mean = call.input(1);
    const Angles angles(call.input(2), call.input(3));
    const int64_t heads = x.dims[1], rows = x.dims[2], dim = x.dims[3];
    const float *from = x.floats(), *mu = mean.floats();
    float* out = call.output<float>(0, x.dims);
#pragma omp parallel for num_threads(threads()) if (rows > 64)
    for (int64_t i = 0; i < product(x.dims, 0, 3); i++) {
      const int64_t b = i / rows / heads, h = i / rows % heads, at = angles.at(b, i % rows);
      float* y = out + i * dim;
      rope(mu + h * dim, angles.cos + at, angles.sin + at, angles.rotary, dim, y);
      for (int64_t j = 0; j < dim; j++) y[j] = from[i * dim + j] - y[j];
    }
  }
};

struct RotateBlock : Kernel {
  int64_t block;
  bool start;
  explicit RotateBlock(const Attributes& a) : block(a.integer("block")), start(a.integer("start") != 0) {
    if (block < 1) throw std::runtime_error("RotateBlock: block is not positive");
  }
  void run(const Call& call) const override {
    const Input x = call.input(0), cos = call.input(1), sin = call.input(2), positions = call.input(3);
    const int64_t heads = x.dims[1], rows = x.dims[2], dim = x.dims[3], rotary = cos.dims[1], many = positions.dims[0] > 1;
    const float *from = x.floats(), *c = cos.floats(), *s = sin.floats();
    float* out = call.output<float>(0, x.dims);
#pragma omp parallel for num_threads(threads()) if (rows > 64)
    for (int64_t i = 0; i < product(x.dims, 0, 3); i++) {
      const int64_t position = positions.integer(i / rows / heads * rows * many + i % rows);
      const int64_t at = start ? std::min(std::max<int64_t>(position, 0) / block, cos.dims[0] - 1)
                               : (position % block + block) % block;
      rope(from + i * dim, c + at * rotary, s + at * rotary, rotary, dim, out + i * dim);
    }
  }
};

struct MeanRows : Kernel {
  int64_t block;
  explicit MeanRows(const Attributes& a) : block(a.integer("block")) {
    if (block < 1) throw std::runtime_error("MeanRows: block is not positive");
  }
  void run(const Call& call) const override {
    const Input table = call.input(0), positions = call.input(1);
    const int64_t batch = positions.dims[0], heads = table.dims[0], rows = positions.dims[1], dim = table.dims[2];
    const float* from = table.floats();
    float* out = call.output<float>(0, {batch, heads, rows, dim});
#pragma omp parallel for num_threads(threads()) if (rows > 64)
    for (int64_t i = 0; i < batch * heads * rows; i++) {
      const int64_t position = positions.integer(i / rows / heads * rows + i % rows);
      const float* row = from + (i / rows % heads * table.dims[1] + (position % block + block) % block) * dim;
      std::copy(row, row + dim, out + i * dim);
    }
  }
};

// -- sinks -----------------------------------------------------------------------------------------------------------------

// places of the `count` largest, equal ones by their slot, or by place; what is no number comes last (kernels/selection.py)
std::vector<int64_t> top(const float* score, int64_t size, int64_t count, const int64_t* slot = nullptr) {
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), int64_t{0});
  const auto number = [score](int64_t a) { return score[a] == score[a] ? score[a] : -std::numeric_limits<float>::infinity(); };
  const auto larger = [number, slot](int64_t a, int64_t b) {
    const float x = number(a), y = number(b);
    return x > y || (x == y && (slot ? std::make_pair(slot[a], a) < std::make_pair(slot[b], b) : a < b));
  };
  std::partial_sort(order.begin(), order.begin() + std::min(count, size), order.end(), larger);
  order.resize(std::min(count, size));
  return order;
}

void write_top(const Call& call, int64_t batch, int64_t size, int64_t count, int64_t divide, const std::vector<float>& score) {
  const int64_t k = std::min(count, size);
  float* best = call.output<float>(0, {batch, k});
  int64_t* index = call.output<int64_t>(1, {batch, k});
  for (int64_t b = 0; b < batch; b++) {
    const auto order = top(score.data() + b * size, size, k);
    for (int64_t j = 0; j < k; j++) best[b * k + j] = score[b * size + order[j]], index[b * k + j] = order[j] / divide;
  }
}

struct SelectSinks : Kernel {
  int64_t count;
  bool entries;
  explicit SelectSinks(const Attributes& a) : count(a.integer("count")), entries(a.integer("entries") != 0) {}
  void run(const Call& call) const override {
    const Input hidden = call.input(0), valid = call.input(1), channels = call.input(2), weights = call.input(3);
    const int64_t batch = hidden.dims[0], rows = hidden.dims[1], width = hidden.dims[2];
    const float *from = hidden.floats(), *weight = weights.floats(), lowest = -std::numeric_limits<float>::infinity();
    const auto* seen = valid.as<uint8_t>();
    const int64_t each = entries ? width : 1;
    std::vector<float> score(batch * rows * each, lowest);
    for (int64_t i = 0; i < batch * rows; i++) {
      if (!seen[i]) continue;
      if (entries) {
        for (int64_t c = 0; c < width; c++) score[i * width + c] = std::fabs(from[i * width + c]);
      } else {
        for (int64_t j = 0; j < channels.dims[0]; j++)
          score[i] = std::max(score[i], std::fabs(from[i * width + channels.integer(j)]) * weight[j]);
      }
    }
    write_top(call, batch, rows * each, count, each, score);
  }
};

struct SelectFirst : Kernel {
  int64_t count;
  explicit SelectFirst(const Attributes& a) : count(a.integer("count")) {}
  void run(const Call& call) const override {
    const Input positions = call.input(0), valid = call.input(1);
    const int64_t batch = valid.dims[0], rows = valid.dims[1], many = positions.dims[0] > 1;
    const auto* seen = valid.as<uint8_t>();
    std::vector<float> score(batch * rows, -std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < batch * rows; i++) {
      const int64_t position = positions.integer(i / rows * rows * many + i % rows);
      if (position >= 0 && position < count && seen[i]) score[i] = (1.0f - static_cast<float>(position) * 1e-6f) * 1e30f;
    }
    write_top(call, batch, rows, count, 1, score);
  }
};

struct PreserveSinks : Kernel {
  Dims segments;
  explicit PreserveSinks(const Attributes& a) : segments(a.integers("segments")) {}
  void run(const Call& call) const override {
    const Input slot = call.input(0), score = call.input(1), old[2] = {call.input(2), call.input(3)};
    const Input fresh[2] = {call.input(4), call.input(5)}, begin = call.input(6);
    const int64_t batch = slot.dims[0], places = slot.dims[1], heads = fresh[0].dims[1];
    int32_t* out_slot = call.output<int32_t>(0, slot.dims);
    float* out_score = call.output<float>(1, slot.dims);
    float* out[2];
    for (int side = 0; side < 2; side++) out[side] = call.output<float>(2 + side, old[side].dims);
    int64_t at = 0;
    for (size_t g = 0; g < segments.size(); at += segments[g++]) {
      const int64_t capacity = segments[g];
      const Input best = call.input(7 + 2 * g), index = call.input(8 + 2 * g);
      const int64_t more = best.dims[1];
      for (int64_t b = 0; b < batch; b++) {
        std::vector<float> every(score.floats() + b * places + at, score.floats() + b * places + at + capacity);
        every.insert(every.end(), best.floats() + b * more, best.floats() + (b + 1) * more);
        std::vector<int64_t> named(capacity + more);
        for (int64_t j = 0; j < capacity + more; j++) {
          named[j] = j < capacity ? slot.integer(b * places + at + j) : index.integer(b * more + j - capacity) + begin.integer(b);
          if (named[j] < -1) named[j] = -named[j] - 2;  // a place marked as a repeat
        }
        const auto order = top(every.data(), capacity + more, capacity, named.data());
        for (int64_t j = 0; j < capacity; j++) {
          const int64_t from = order[j], to = b * places + at + j;
          const bool enters = every[from] > -std::numeric_limits<float>::infinity();
          out_score[to] = enters ? every[from] : -std::numeric_limits<float>::infinity();
          out_slot[to] = static_cast<int32_t>(enters ? named[from] : -1);
          for (int side = 0; side < 2; side++) {
            const int64_t dim = old[side].dims[3], rows = fresh[side].dims[2];
            const int64_t row = from < capacity ? at + from : index.integer(b * more + from - capacity);
            for (int64_t h = 0; h < heads; h++) {
              const float* source = from < capacity ? old[side].floats() + ((b * heads + h) * places + row) * dim
                                                    : fresh[side].floats() + ((b * heads + h) * rows + row) * dim;
              std::copy(source, source + dim, out[side] + ((b * heads + h) * places + at + j) * dim);
            }
          }
        }
      }
    }
    for (int64_t b = 0; b < batch; b++)
      for (int64_t i = places - 1; i > 0; i--) {
        int32_t& own = out_slot[b * places + i];
        for (int64_t j = 0; j < i && own >= 0; j++)
          if (out_slot[b * places + j] == own) own = -own - 2;
      }
  }
};

struct LayRows : Kernel {
  explicit LayRows(const Attributes&) {}
  void run(const Call& call) const override {
    const Input past = call.input(0), fresh = call.input(1), begin = call.input(2), exact = call.input(3), slot = call.input(4);
    const int64_t batch = past.dims[0], heads = past.dims[1], slots = past.dims[2], rows = fresh.dims[2], dim = past.dims[3];
    const int64_t places = exact ? exact.dims[2] : 0;
    const float *one = past.floats(), *two = fresh.floats(), *three = exact ? exact.floats() : nullptr;
    for (int64_t b = 0; b < batch; b++)
      if (begin.integer(b) < 0 || begin.integer(b) + rows > slots) throw std::runtime_error("LayRows: no room for the new rows");
    float* out = call.output<float>(0, past.dims);
#pragma omp parallel for num_threads(threads()) if (slots > 256)
    for (int64_t i = 0; i < batch * heads; i++) {
      float* to = out + i * slots * dim;
      const int64_t held = begin.integer(i / heads);
      std::copy(one + i * slots * dim, one + (i + 1) * slots * dim, to);
      std::copy(two + i * rows * dim, two + (i + 1) * rows * dim, to + held * dim);
      for (int64_t e = 0; e < places; e++) {
        const int64_t at = slot.integer(i / heads * places + e);
        if (at >= 0 && at < held) std::copy(three + (i * places + e) * dim, three + (i * places + e + 1) * dim, to + at * dim);
      }
    }
  }
};

// -- attention -------------------------------------------------------------------------------------------------------------

// q [B, Hq, S, D] over as many keys [B, H, slots, D] and values [B, H, slots, Dv] as the mask has columns
void attend_rows(const Input& q, const float* keys, int64_t kv, int64_t slots, const float* values, int64_t wide, const Input& mask,
                 float scale, float* out) {
  const int64_t length = mask.dims[3];
  if (length > slots) throw std::runtime_error("a mask has more columns than there are keys");
  const int64_t batch = q.dims[0], heads = q.dims[1], rows = q.dims[2], dim = q.dims[3], groups = heads / kv;
  const float* query = q.floats();
  const bool* seen = mask.type == ort::kBool ? mask.as<bool>() : nullptr;
  const float* added = seen ? nullptr : mask.floats();
  const int64_t per_batch = mask.dims[0] > 1 ? product(mask.dims, 1) : 0, per_head = mask.dims[1] > 1 ? rows * length : 0;
  // A task is a tile of the query rows that share a key-value head, over a piece of the slots.
  constexpr int64_t kRows = 12;
  const int64_t shared = groups * rows, tiles = (shared + kRows - 1) / kRows, jobs = batch * kv * tiles;
  const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>((4 * threads() + jobs - 1) / jobs, length / 256));
  const int64_t size = kRows * (wide + 2);
  std::vector<float> work(jobs * pieces * size);
#pragma omp parallel num_threads(threads()) if (jobs * pieces > 1)
  {
    std::vector<float> tile(kRows * dim);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < jobs * pieces; task++) {
      const int64_t job = task / pieces, piece = task % pieces, head = job / tiles, first = job % tiles * kRows;
      const int64_t b = head / kv, count = std::min(kRows, shared - first);
      const int64_t begin = length * piece / pieces, end = length * (piece + 1) / pieces;
      int64_t bias[kRows];
      for (int64_t r = 0; r < count; r++) {
        const int64_t h = head % kv * groups + (first + r) / rows, s = (first + r) % rows;
        const float* from = query + ((b * heads + h) * rows + s) * dim;
        for (int64_t j = 0; j < dim; j++) tile[r * dim + j] = from[j] * scale;
        bias[r] = b * per_batch + h * per_head + s * length + begin;
      }
      float *mine = work.data() + task * size, *mass = mine + kRows * wide, *largest = mass + kRows;
      const auto add = [&](int64_t r, int64_t l, float score) {
        if (seen) return seen[bias[r] + l] ? score : std::numeric_limits<float>::lowest();
        return score + added[bias[r] + l];
      };
      attend_piece(tile.data(), count, keys + (head * slots + begin) * dim, values + (head * slots + begin) * wide, end - begin,
                   dim, wide, add, mine, mass, largest);
    }
#pragma omp for
    for (int64_t i = 0; i < jobs * kRows; i++) {
      const int64_t job = i / kRows, r = i % kRows, head = job / tiles, at = job % tiles * kRows + r;
      if (at >= shared) continue;
      const int64_t b = head / kv, h = head % kv * groups + at / rows, s = at % rows;
      float* to = out + ((b * heads + h) * rows + s) * wide;
      float most = std::numeric_limits<float>::lowest(), total = 0;
      std::fill(to, to + wide, 0.0f);
      for (int64_t p = 0; p < pieces; p++) most = std::max(most, work[(job * pieces + p) * size + kRows * (wide + 1) + r]);
      for (int64_t p = 0; p < pieces; p++) {
        const float* mine = work.data() + (job * pieces + p) * size;
        const float share = exp_below(mine[kRows * (wide + 1) + r] - most);
        total += share * mine[kRows * wide + r];
        for (int64_t j = 0; j < wide; j++) to[j] += share * mine[r * wide + j];
      }
      for (int64_t j = 0; j < wide; j++) to[j] /= std::max(total, 1e-30f);
    }
  }
}

struct Attend : Kernel {
  float scale;
  explicit Attend(const Attributes& a) : scale(a.number("scale", 1.0f)) {}

  void run(const Call& call) const override {
    const Input q = call.input(0), k = call.input(1), v = call.input(2), mask = call.input(3);
    float* out = call.output<float>(0, {q.dims[0], q.dims[1], q.dims[2], v.dims[3]});
    attend_rows(q, k.floats(), k.dims[1], k.dims[2], v.floats(), v.dims[3], mask, scale, out);
  }
};

}  // namespace

#include "attend_packed.h"
#include "tiles.h"

namespace {

// -- registration ----------------------------------------------------------------------------------------------------------

ort::Status* failed(const std::exception& error) { return g_runtime.api.create_status(1, error.what()); }

using Types = std::vector<ort::Type>;

struct Op : ort::CustomOp {
  const char* op_name;
  Types in, out;
  size_t required;
  const char* runs_on = nullptr;  // a provider's name, or the CPU; on CUDA the first input, of which sizes are read, is the host's

  Op(const char* name_, Types in_, size_t required_, Types out_, ort::Status* (*make)(const CustomOp*, const void*, const ort::Info*, void**))
      : ort::CustomOp{}, op_name(name_), in(std::move(in_)), out(std::move(out_)), required(required_) {
    using Self = const ort::CustomOp*;
    version = ort::kVersion;
    name = [](Self op) { return static_cast<const Op*>(op)->op_name; };
    provider = [](Self op) { return static_cast<const Op*>(op)->runs_on; };
    input_type = [](Self op, size_t i) { return static_cast<const Op*>(op)->in[i]; };
    input_count = [](Self op) { return static_cast<const Op*>(op)->in.size(); };
    output_type = [](Self op, size_t i) { return static_cast<const Op*>(op)->out[i]; };
    output_count = [](Self op) { return static_cast<const Op*>(op)->out.size(); };
    destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    input_presence = [](Self op, size_t i) { return i < static_cast<const Op*>(op)->required ? ort::kRequired : ort::kOptional; };
    output_presence = [](Self, size_t) { return ort::kRequired; };
    input_memory = [](Self op, size_t i) -> int { return static_cast<const Op*>(op)->runs_on && i == 0 ? ort::kHost : ort::kDevice; };
    variadic_input_least = variadic_output_least = [](Self) { return 1; };
    variadic_input_alike = variadic_output_alike = [](Self) { return 0; };
    create_v2 = make;
    compute_v2 = [](void* kernel, ort::Context* context) -> ort::Status* {
      try {
        static_cast<const Kernel*>(kernel)->run(Call(context));
        return nullptr;
      } catch (const std::exception& error) {
        return failed(error);
      }
    };
  }
};

template <typename K>
Op make(const char* name, Types in, size_t required, Types out) {
  return Op(name, std::move(in), required, std::move(out),
            [](const ort::CustomOp*, const void*, const ort::Info* info, void** kernel) -> ort::Status* {
              try {
                *kernel = static_cast<Kernel*>(new K(Attributes(info)));
                return nullptr;
              } catch (const std::exception& error) {
                return failed(error);
              }
            });
}

constexpr auto kFloat = ort::kFloat;
constexpr size_t kMostSegments = 16;

Types preserve_inputs() {
  Types types = {ort::kInt32, kFloat, kFloat, kFloat, kFloat, kFloat, ort::kInt64};
  for (size_t i = 0; i < kMostSegments; i++) types.insert(types.end(), {kFloat, ort::kInt64});
  return types;
}

const std::vector<Op>& ops() {
  static const std::vector<Op> all = {
      make<QuantizeKV>("QuantizeKV", {kFloat, kFloat}, 1, {ort::kUint8, ort::kHalf}),
      make<DequantizeKV>("DequantizeKV", {ort::kUint8, ort::kHalf, kFloat}, 1, {kFloat}),
      make<HadamardRotate>("HadamardRotate", {kFloat}, 1, {kFloat}),
      make<ChannelReorder>("ChannelReorder", {kFloat, ort::kAny}, 2, {kFloat}),
      make<UndoRope>("UndoRope", {kFloat, kFloat, kFloat}, 3, {kFloat}),
      make<CenterRoped>("CenterRoped", {kFloat, kFloat, kFloat, kFloat}, 4, {kFloat}),
      make<RotateBlock>("RotateBlock", {kFloat, kFloat, kFloat, ort::kAny}, 4, {kFloat}),
      make<MeanRows>("MeanRows", {kFloat, ort::kAny}, 2, {kFloat}),
      make<SelectSinks>("SelectSinks", {kFloat, ort::kBool, ort::kAny, kFloat}, 4, {kFloat, ort::kInt64}),
      make<SelectFirst>("SelectFirst", {ort::kAny, ort::kBool}, 2, {kFloat, ort::kInt64}),
      make<PreserveSinks>("PreserveSinks", preserve_inputs(), 7, {ort::kInt32, kFloat, kFloat, kFloat}),
      make<LayRows>("LayRows", {kFloat, kFloat, ort::kInt64, kFloat, ort::kAny}, 3, {kFloat}),
      make<Attend>("Attend", {kFloat, kFloat, kFloat, ort::kAny}, 4, {kFloat}),
      make<AttendPacked>("AttendPacked",
                         {kFloat, kFloat, kFloat, ort::kAny, ort::kInt32, ort::kUint8, ort::kHalf, ort::kUint8, ort::kHalf, kFloat, kFloat,
                          ort::kAny, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat},
                         6, {kFloat}),
  };
  return all;
}

Op on_cuda(Op op) {
  op.runs_on = "CUDAExecutionProvider";
  return op;
}

const std::vector<Op>& cuda_ops() {
  constexpr auto kHalf = ort::kHalf, kUint8 = ort::kUint8, kInt32 = ort::kInt32, kInt64 = ort::kInt64;
  static const std::vector<Op> all = {
      on_cuda(make<AttendTiles>("AttendTiles",
                                {kInt64, kHalf,  kHalf,  kHalf,  kInt64, kUint8, kHalf,  kUint8, kHalf,  kHalf,  kHalf,
                                 kInt32, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kInt32, kInt32,
                                 kInt32, kFloat, kFloat, kFloat, kFloat, kInt64, kFloat, kInt64, kFloat, kInt64, kFloat, kInt64},
                                6, {kHalf, kUint8, kHalf, kUint8, kHalf, kHalf, kHalf, kInt32, kFloat})),
  };
  return all;
}

}  // namespace

extern "C" {

const char* kvsink_kernels() {  // names of the variants that have machine code for CUDA, a space behind each
  static const std::string names = [] {
    std::string out;
    for (const Image& image : kImages) out += std::string(image.name) + " ";
    return out;
  }();
  return names.c_str();
}

void kvsink_set_threads(int threads) { g_threads = threads; }

const char* kvsink_format() { return "kvsink-onnx-2"; }  // FORMAT of kvsink.export.manifest, whose nodes these are

ort::Status* RegisterCustomOps(ort::Options* options, const ort::Base* base) {
  const void* const* table = base->api(ort::kVersion);
  if (table == nullptr) return nullptr;  // a runtime before 1.16 says so itself when it meets the nodes
  g_runtime.api.table = table;
  ort::Domain* domain = nullptr;  // lives as long as the library
  if (ort::Status* status = g_runtime.api.create_domain("com.kvsink", &domain)) return status;
  for (const Op& op : ops())
    if (ort::Status* status = g_runtime.api.domain_add(domain, &op)) return status;
  if (!kImages.empty())
    for (const Op& op : cuda_ops())
      if (ort::Status* status = g_runtime.api.domain_add(domain, &op)) return status;
  return g_runtime.api.add_domain(options, domain);
}
}
