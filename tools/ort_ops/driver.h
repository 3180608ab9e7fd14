// The driver of CUDA for a library of operators: machine code of images.h on the device at hand, and launches. libcuda is opened at
// first use, so that the library loads where there is none.
#pragma once
#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "images.h"

namespace kvsink::cuda {

using Address = unsigned long long;

// The driver's library, which a processor alone does not have.
class Driver {
 public:
  template <typename... Args>
  void operator()(const char* name, Args... args) {
    const int code = reinterpret_cast<int (*)(Args...)>(find(name))(args...);
    if (code) throw std::runtime_error(std::string("CUDA driver error ") + std::to_string(code) + " in " + name);
  }

 private:
  void* find(const char* name) {
    std::lock_guard<std::mutex> guard(lock_);
    if (!library_) library_ = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library_) throw std::runtime_error("libcuda.so.1 is not found");
    void*& found = known_[name];
    if (!found) found = dlsym(library_, name);
    if (!found) throw std::runtime_error(std::string("the driver has no ") + name);
    return found;
  }
  std::mutex lock_;
  void* library_ = nullptr;
  std::map<const char*, void*> known_;
};

inline Driver g_driver;

inline int device_number(int attribute) {
  int device = 0, value = 0;
  g_driver("cuCtxGetDevice", &device);
  g_driver("cuDeviceGetAttribute", &value, attribute, device);
  return value;
}

// Machine code of one variant on the device at hand.
class Loaded {
 public:
  explicit Loaded(const std::string& name) {
    constexpr int kMajor = 75, kMinor = 76, kMultiprocessors = 16;
    const int capability = 10 * device_number(kMajor) + device_number(kMinor);
    std::set<std::string> built;
    for (const Image& image : kImages) {
      if (name != image.name) continue;
      built.insert(std::to_string(image.capability / 10) + "." + std::to_string(image.capability % 10));
      if (image.capability == capability) image_ = &image;
    }
    if (!image_) {
      std::string has = built.empty() ? "nothing" : "";
      for (const std::string& one : built) has += (has.empty() ? "" : ", ") + one;
      throw std::runtime_error("the library has kernels of this model for " + has + ", the card is " + std::to_string(capability / 10) +
                               "." + std::to_string(capability % 10) + "; build it again there");
    }
    g_driver("cuModuleLoadData", &module_, static_cast<const void*>(image_->begin));
    multiprocessors = device_number(kMultiprocessors);
  }
  const Image& image() const { return *image_; }
  int multiprocessors = 0;

  void* function(const char* name, int shared = 0) {
    void* found = nullptr;
    g_driver("cuModuleGetFunction", &found, module_, name);
    constexpr int kMostShared = 8;
    if (shared > 0) g_driver("cuFuncSetAttribute", found, kMostShared, shared);
    return found;
  }
  std::vector<int> numbers(const char* name, size_t count) {
    Address where = 0;
    size_t size = 0;
    std::vector<int> out(count);
    g_driver("cuModuleGetGlobal_v2", &where, &size, module_, name);
    g_driver("cuMemcpyDtoH_v2", static_cast<void*>(out.data()), where, count * sizeof(int));
    return out;
  }

 private:
  const Image* image_ = nullptr;
  void* module_ = nullptr;
};

template <typename... Args>
void launch(void* function, unsigned x, unsigned y, unsigned threads, unsigned shared, void* stream, const Args&... args) {
  void* given[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  g_driver("cuLaunchKernel", function, x, y, 1u, threads, 1u, 1u, shared, stream, static_cast<void**>(given), static_cast<void**>(nullptr));
}

// Rows that stand behind each other into columns of wider ones, `pitch` bytes apart.
inline void copy_columns(void* to, size_t pitch, const void* from, size_t width, size_t rows, void* stream) {
  struct Place {  // half of CUDA_MEMCPY2D
    size_t x = 0, y = 0;
    int kind = 2;  // on the device
    const void* host = nullptr;
    Address device = 0;
    void* array = nullptr;
    size_t pitch = 0;
  };
  struct {
    Place from, to;
    size_t width, rows;
  } copy;
  copy.from.device = reinterpret_cast<Address>(from), copy.from.pitch = width;
  copy.to.device = reinterpret_cast<Address>(to), copy.to.pitch = pitch;
  copy.width = width, copy.rows = rows;
  g_driver("cuMemcpy2DAsync_v2", static_cast<const void*>(&copy), stream);
}

// One of a kind for a name on the device at hand, made at first use.
template <typename T>
T& held(const std::string& name) {
  static std::mutex lock;
  static std::map<std::pair<int, std::string>, std::unique_ptr<T>> all;
  int device = 0;
  g_driver("cuCtxGetDevice", &device);
  std::lock_guard<std::mutex> guard(lock);
  auto& found = all[{device, name}];
  if (!found) found = std::make_unique<T>(name);
  return *found;
}

}  // namespace kvsink::cuda
