// What the rows of a prompt ask for beside the kernels of the cache: the runtime's own attention, device memory, kernels of prompt.cu.
#pragma once
#include "driver.h"

namespace {

using namespace kvsink::cuda;

constexpr int64_t kRoom = 32 << 20;  // bytes of rows in 16 bit that a prompt of one sequence attends to at a time

int64_t size_of(ort::Type type) { return type == ort::kUint8 ? 1 : type == ort::kHalf ? 2 : 4; }

struct PromptKernels {
  Loaded loaded;
  void *enter, *lay, *rows;
  explicit PromptKernels(const std::string& name)
      : loaded(name), enter(loaded.function("enter_rows")), lay(loaded.function("lay_exact")), rows(loaded.function("to_rows")) {}
};

// The runtime's own GroupQueryAttention, for the rows of a prompt.
class PromptAttention {
 public:
  const int64_t kv_heads;
  PromptAttention(const ort::Info* info, int64_t heads, int64_t kv, float scale) : kv_heads(kv) {
    const auto& api = g_runtime.api;
    const int64_t rotary = 0;
    ort::Attribute* given[4] = {};
    g_runtime.check(api.attribute("num_heads", &heads, &given[0]));
    g_runtime.check(api.attribute("kv_num_heads", &kv_heads, &given[1]));
    g_runtime.check(api.attribute("do_rotary", &rotary, &given[2]));
    g_runtime.check(api.attribute("scale", &scale, &given[3]));
    const char* types[] = {"T", "M", "T_CACHE", "T_KV_SCALE"};  // the last two since its cache can hold codes
    const ort::Type values[] = {ort::kHalf, ort::kInt32, ort::kHalf, ort::kFloat};
    ort::Status* refused = nullptr;
    for (const int count : {4, 2}) {
      if (refused) api.release(refused);
      refused = api.create_operator(info, "GroupQueryAttention", "com.microsoft", 1, types, values, count, given, 4, 7, 3, &op_);
      if (!refused) break;
    }
    for (ort::Attribute* one : given) api.release(one);
    g_runtime.check(refused);
  }
  PromptAttention(const PromptAttention&) = delete;
  ~PromptAttention() { g_runtime.api.release(op_); }

  void run(ort::Context* context, const ort::Value* const* inputs, ort::Value* const* outputs) const {
    g_runtime.check(g_runtime.api.invoke(context, op_, inputs, 7, outputs, 3));
  }

 private:
  ort::Operator* op_ = nullptr;
};

// Device memory of a prompt, given back in the order of the stream, and tensors in it.
class Room {
 public:
  Room(size_t bytes, void* stream) : stream_(stream) {
    g_driver("cuMemAllocAsync", &begin_, bytes, stream);
    int device = 0;
    g_driver("cuCtxGetDevice", &device);
    g_runtime.check(g_runtime.api.memory("Cuda", 0, device, 0, &there_));
    g_runtime.check(g_runtime.api.memory("Cpu", 0, 0, 0, &here_));
  }
  Room(const Room&) = delete;
  ~Room() {
    for (ort::Value* value : made_) g_runtime.api.release(value);
    g_runtime.api.release(there_), g_runtime.api.release(here_);
    try {
      g_driver("cuMemFreeAsync", begin_, stream_);
    } catch (const std::exception&) {  // what went wrong before is told already
    }
  }
  static size_t bytes_of(int64_t count, int64_t size) { return static_cast<size_t>((count * size + 255) / 256 * 256); }

  // The next tensor on the device; its address too.
  ort::Value* tensor(const Dims& dims, ort::Type type, void** address) {
    const size_t bytes = bytes_of(product(dims), size_of(type));
    *address = reinterpret_cast<void*>(begin_ + used_), used_ += bytes;
    return add(there_, *address, static_cast<size_t>(product(dims) * size_of(type)), dims, type);
  }
  ort::Value* number(int32_t* value) { return add(here_, value, sizeof(int32_t), {1}, ort::kInt32); }

 private:
  ort::Value* add(ort::Memory* memory, void* data, size_t bytes, const Dims& dims, ort::Type type) {
    ort::Value* value = nullptr;
    g_runtime.check(g_runtime.api.tensor(memory, data, bytes, dims.data(), dims.size(), type, &value));
    made_.push_back(value);
    return value;
  }
  void* stream_;
  Address begin_ = 0;
  size_t used_ = 0;
  ort::Memory *there_ = nullptr, *here_ = nullptr;
  std::vector<ort::Value*> made_;
};

}  // namespace
