// What a custom-op library needs of onnxruntime's C API, declared here because the runtime's packages bring no header.
//
// The API is a table of function pointers to which versions only append, so that a slot keeps its number: see
// onnxruntime_c_api.h, version 1.31, and its notes on versions. Numbers below are places in that table. The struct of a custom
// operator is read as far as the version in its first field says; 16 is the first whose functions return a status.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kVersion = 16;

struct Status;
struct Value;
struct Info;     // of a node, when its kernel is made
struct Context;  // of a node, when it runs
struct Shape;
struct Options;
struct Domain;
struct Attribute;  // of an operator of the runtime's own, and such an operator
struct Operator;
struct Memory;     // where a tensor lies

struct Base {
  const void* const* (*api)(uint32_t version);
  const char* (*version)();
};

enum Type : int { kAny = 0, kFloat = 1, kUint8 = 2, kInt32 = 6, kInt64 = 7, kBool = 9, kHalf = 10 };
enum Place : int { kDevice = 0, kHost = -2 };  // memory of an input; the CPU's is both
enum Presence : int { kRequired = 0, kOptional = 1 };

struct CustomOp {
  uint32_t version;
  void* (*create)(const CustomOp*, const void*, const Info*);  // before version 16; unused
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  Type (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  Type (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void*, Context*);  // before version 16; unused
  void (*destroy)(void*);
  Presence (*input_presence)(const CustomOp*, size_t);
  Presence (*output_presence)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_least)(const CustomOp*);
  int (*variadic_input_alike)(const CustomOp*);
  int (*variadic_output_least)(const CustomOp*);
  int (*variadic_output_alike)(const CustomOp*);
  Status* (*create_v2)(const CustomOp*, const void*, const Info*, void**);
  Status* (*compute_v2)(void*, Context*);
};

// The calls made here, each with its place in the table.
struct Api {
  const void* const* table = nullptr;

  template <int place, typename Result, typename... Args>
  Result call(Args... args) const {
    return reinterpret_cast<Result (*)(Args...)>(const_cast<void*>(table[place]))(args...);
  }
  Status* create_status(int code, const char* text) const { return call<0, Status*>(code, text); }
  Status* create_domain(const char* name, Domain** out) const { return call<26, Status*>(name, out); }
  Status* domain_add(Domain* domain, const CustomOp* op) const { return call<27, Status*>(domain, op); }
  Status* add_domain(Options* options, Domain* domain) const { return call<28, Status*>(options, domain); }
  Status* data(Value* value, void** out) const { return call<51, Status*>(value, out); }
  Status* element_type(const Shape* shape, Type* out) const { return call<60, Status*>(shape, out); }
  Status* rank(const Shape* shape, size_t* out) const { return call<61, Status*>(shape, out); }
  Status* dims(const Shape* shape, int64_t* out, size_t rank) const { return call<62, Status*>(shape, out, rank); }
  Status* shape_of(const Value* value, Shape** out) const { return call<65, Status*>(value, out); }
  Status* attribute(const Info* info, const char* name, float* out) const { return call<85, Status*>(info, name, out); }
  Status* attribute(const Info* info, const char* name, int64_t* out) const { return call<86, Status*>(info, name, out); }
  Status* attribute(const Info* info, const char* name, char* out, size_t* size) const {
    return call<87, Status*>(info, name, out, size);
  }
  Status* input_count(const Context* context, size_t* out) const { return call<88, Status*>(context, out); }
  Status* input(const Context* context, size_t index, const Value** out) const {
    return call<90, Status*>(context, index, out);
  }
  Status* output(Context* context, size_t index, const int64_t* dims, size_t rank, Value** out) const {
    return call<91, Status*>(context, index, dims, rank, out);
  }
  const char* message(const Status* status) const { return call<2, const char*>(status); }
  Status* tensor(const Memory* memory, void* data, size_t bytes, const int64_t* dims, size_t rank, Type type, Value** out) const {
    return call<49, Status*>(memory, data, bytes, dims, rank, static_cast<int>(type), out);
  }
  Status* memory(const char* name, int allocator, int device, int kind, Memory** out) const {
    return call<68, Status*>(name, allocator, device, kind, out);
  }
  Status* attribute(const char* name, const int64_t* number, Attribute** out) const {
    return call<211, Status*>(name, static_cast<const void*>(number), 1, 1, out);
  }
  Status* attribute(const char* name, const float* number, Attribute** out) const {
    return call<211, Status*>(name, static_cast<const void*>(number), 1, 3, out);
  }
  Status* create_operator(const Info* info, const char* name, const char* domain, int version, const char* const* types,
                          const Type* values, int count, Attribute* const* attributes, int given, int inputs, int outputs,
                          Operator** out) const {
    return call<213, Status*>(info, name, domain, version, types, values, count, attributes, given, inputs, outputs, out);
  }
  Status* invoke(const Context* context, const Operator* op, const Value* const* inputs, int count, Value* const* outputs,
                 int many) const {
    return call<214, Status*>(context, op, inputs, count, outputs, many);
  }
  void release(Value* value) const { call<96, void>(value); }
  void release(Memory* memory) const { call<94, void>(memory); }
  void release(Attribute* attribute) const { call<212, void>(attribute); }
  void release(Operator* op) const { call<215, void>(op); }
  void release(Status* status) const { call<93, void>(status); }
  void release(Shape* shape) const { call<99, void>(shape); }
  Status* stream(const Context* context, void** out) const { return call<193, Status*>(context, out); }
  Status* attribute(const Info* info, const char* name, int64_t* out, size_t* size) const {
    return call<163, Status*>(info, name, out, size);
  }
};

}  // namespace ort
