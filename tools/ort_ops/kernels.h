// The numbers behind the nodes of com.kvsink, as kvsink.kernels defines them; loops that a compiler turns into vector code.
//
// Shapes   x [rows, D] of one head; codes [rows, bytes]; scales are 16-bit floats
// Exact    codes as the PyTorch reference, up to the order of sums; rounding is half to even
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "levels.h"  // written by the build: levels and thresholds of 1 to 8 bits, cores of Hadamard matrices

namespace kvsink {

using half = _Float16;
constexpr float kHalfMax = 65504.0f, kHalfTiny = 6.0e-8f;

inline half to_half(float x) { return static_cast<half>(std::min(std::max(x, -kHalfMax), kHalfMax)); }

// -- packing: codes of one width, little end first -------------------------------------------------------------------------

inline void pack(const uint16_t* codes, int width, int64_t count, uint8_t* out) {
  if (width == 8) {
    for (int64_t i = 0; i < count; i++) out[i] = static_cast<uint8_t>(codes[i]);
    return;
  }
  std::memset(out, 0, (count * width + 7) / 8);
  for (int64_t i = 0; i < count; i++) {
    const int64_t bit = i * width;
    const uint32_t word = static_cast<uint32_t>(codes[i]) << (bit & 7);
    for (int64_t byte = 0; byte * 8 < (bit & 7) + width; byte++) out[(bit >> 3) + byte] |= static_cast<uint8_t>(word >> (8 * byte));
  }
}

inline uint32_t field(const uint8_t* bytes, int width, int64_t i, int64_t size) {
  const int64_t bit = i * width, at = bit >> 3;
  uint32_t word = 0;
  for (int64_t byte = 0; byte < 3 && at + byte < size; byte++) word |= static_cast<uint32_t>(bytes[at + byte]) << (8 * byte);
  return (word >> (bit & 7)) & ((1u << width) - 1);
}

// What every byte of codes stands for, or every code where codes do not fill bytes.
struct Table {
  int width = 0;
  std::vector<float> values;

  Table() = default;
  Table(int width_, const float* levels) : width(width_) {
    const int per = 8 % width ? 1 : 8 / width, entries = 8 % width ? 1 << width : 256;
    for (int entry = 0; entry < entries; entry++)
      for (int i = 0; i < per; i++) values.push_back(levels[entry >> (i * width) & ((1 << width) - 1)]);
  }
};

template <int per>
inline void copy_entries(const uint8_t* bytes, int64_t count, const float* table, float* values) {
  for (int64_t i = 0; i < count / per; i++) std::memcpy(values + per * i, table + per * bytes[i], per * sizeof(float));
}

inline void look_up(const uint8_t* bytes, int64_t count, const Table& table, float* values) {
  const float* entries = table.values.data();
  switch (table.width) {
    case 8: return copy_entries<1>(bytes, count, entries, values);
    case 4: return copy_entries<2>(bytes, count, entries, values);
    case 2: return copy_entries<4>(bytes, count, entries, values);
    case 1: return copy_entries<8>(bytes, count, entries, values);
    default:
      for (int64_t i = 0; i < count; i++) values[i] = entries[field(bytes, table.width, i, (count * table.width + 7) / 8)];
  }
}

// number of thresholds below each x
inline void bucketize(const float* x, int64_t count, int width, bool even, uint16_t* codes) {
  const float* t = even ? kEvenThresholds[width] : kThresholds[width];
  const int n = (1 << width) - 1;
  if (width <= 3) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      int code = 0;
      for (int j = 0; j < n; j++) code += x[i] > t[j];
      codes[i] = static_cast<uint16_t>(code);
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    int code = 0;
    for (int step = 1 << (width - 1); step; step >>= 1) code += (x[i] > t[code + step - 1]) ? step : 0;
    codes[i] = static_cast<uint16_t>(code);
  }
}

// -- quantizers: one row ---------------------------------------------------------------------------------------------------

struct Run {  // channels of one width
  int64_t start, end, byte;
  int width;
};

inline std::vector<Run> runs_of(const std::vector<int64_t>& widths) {
  std::vector<Run> out;
  int64_t byte = 0;
  for (size_t i = 0, j; i < widths.size(); i = j) {
    for (j = i; j < widths.size() && widths[j] == widths[i];) j++;
    const int64_t n = 8 * static_cast<int64_t>(j - i);
    if (widths[i]) out.push_back({8 * static_cast<int64_t>(i), 8 * static_cast<int64_t>(j), byte, static_cast<int>(widths[i])});
    byte += n * widths[i] / 8;
  }
  return out;
}

inline void quantize_uniform(const float* x, int64_t dim, int64_t group, int width, float clip, bool integer, uint8_t* codes,
                             half* scale) {
  const float top = static_cast<float>((1 << width) - 1);
  std::vector<uint16_t> code(dim);
  for (int64_t g = 0; g < dim / group; g++) {
    const float* row = x + g * group;
    float hi = row[0], lo = row[0];
#pragma omp simd reduction(max : hi) reduction(min : lo)
    for (int64_t i = 0; i < group; i++) hi = std::max(hi, row[i]), lo = std::min(lo, row[i]);
    hi *= clip, lo *= clip;
    half s = to_half((hi - lo) / top);
    float step = static_cast<float>(s), base;
    if (integer) {
      if (!(step > 0)) step = 1.0f;
      s = to_half(step);
      scale[2 * g + 1] = to_half(std::nearbyint(-lo / step));
      base = static_cast<float>(scale[2 * g + 1]);
#pragma omp simd
      for (int64_t i = 0; i < group; i++)
        code[g * group + i] = static_cast<uint16_t>(std::min(std::max(std::nearbyint(row[i] / step) + base, 0.0f), top));
    } else {
      scale[2 * g + 1] = to_half(lo);
      base = static_cast<float>(scale[2 * g + 1]);
      step = std::max(step, kHalfTiny);
#pragma omp simd
      for (int64_t i = 0; i < group; i++)
        code[g * group + i] = static_cast<uint16_t>(std::min(std::max(std::nearbyint((row[i] - base) / step), 0.0f), top));
    }
    scale[2 * g] = s;
  }
  pack(code.data(), width, dim, codes);
}

inline void quantize_gauss(const float* x, int64_t dim, int64_t group, int width, uint8_t* codes, half* scale) {
  std::vector<uint16_t> code(dim);
  std::vector<float> y(group);
  for (int64_t g = 0; g < dim / group; g++) {
    const float* row = x + g * group;
    float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < group; i++) sum += row[i];
    scale[2 * g + 1] = to_half(sum / static_cast<float>(group));
    const float mean = static_cast<float>(scale[2 * g + 1]);
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < group; i++) square += (row[i] - mean) * (row[i] - mean);
    scale[2 * g] = to_half(std::sqrt(square / static_cast<float>(group)));
    const float deviation = std::max(static_cast<float>(scale[2 * g]), kHalfTiny);
#pragma omp simd
    for (int64_t i = 0; i < group; i++) y[i] = (row[i] - mean) / deviation;
    bucketize(y.data(), group, width, false, code.data() + g * group);
  }
  pack(code.data(), width, dim, codes);
}

inline void quantize_lloyd(const float* x, const float* sigma, int64_t dim, const std::vector<Run>& runs, bool gain, bool even,
                           uint8_t* codes, half* scale) {
  std::vector<float> y(dim), z(dim), deviation(dim);
  std::vector<uint16_t> code(dim);
  float square = 0;
  for (int64_t i = 0; i < dim; i++) deviation[i] = std::max(sigma[i], kHalfTiny);
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < dim; i++) y[i] = x[i] / deviation[i], square += y[i] * y[i];
  const auto encode = [&](float g) {
#pragma omp simd
    for (int64_t i = 0; i < dim; i++) z[i] = y[i] / g;
    for (const Run& r : runs) bucketize(z.data() + r.start, r.end - r.start, r.width, even, code.data() + r.start);
  };
  const auto fit = [&]() {  // least squares in units of x
    float dot = 0, norm = 0;
    for (const Run& r : runs) {
      const float* levels = even ? kEvenLevels[r.width] : kLevels[r.width];
      float one = 0, two = 0;
#pragma omp simd reduction(+ : one, two)
      for (int64_t i = r.start; i < r.end; i++) {
        const float level = levels[code[i]] * deviation[i];
        one += x[i] * level, two += level * level;
      }
      dot += one, norm += two;
    }
    return to_half(dot / std::max(norm, 1e-30f));
  };
  if (gain) {
    encode(std::max(std::sqrt(square / static_cast<float>(dim)), kHalfTiny));
    encode(std::max(static_cast<float>(fit()), kHalfTiny));
    *scale = fit();
  } else {
    encode(1.0f);
  }
  for (const Run& r : runs) pack(code.data() + r.start, r.width, r.end - r.start, codes + r.byte);
}

inline void quantize_static(const float* x, const float* step, int64_t dim, int width, uint8_t* codes) {
  const float limit = static_cast<float>(1 << (width - 1));
  std::vector<uint16_t> code(dim);
#pragma omp simd
  for (int64_t i = 0; i < dim; i++)
    code[i] = static_cast<uint16_t>(std::min(std::max(std::nearbyint(x[i] / step[i]), -limit), limit - 1) + limit);
  pack(code.data(), width, dim, codes);
}

// one head's book [groups, size, c]
inline void quantize_vector(const float* x, const float* book, int64_t groups, int64_t size, int64_t c, int bits, bool gain,
                            uint8_t* codes, half* scale) {
  std::vector<uint16_t> code(groups);
  const auto nearest = [&](float g) {
    for (int64_t at = 0; at < groups; at++) {
      const float* entries = book + at * size * c;
      float best = -std::numeric_limits<float>::infinity();
      for (int64_t e = 0; e < size; e++) {
        float dot = 0, norm = 0;
        for (int64_t i = 0; i < c; i++) dot += x[at * c + i] / g * entries[e * c + i], norm += entries[e * c + i] * entries[e * c + i];
        const float score = dot - 0.5f * norm;
        if (score > best) best = score, code[at] = static_cast<uint16_t>(e);
      }
    }
  };
  const auto fit = [&]() {
    float dot = 0, norm = 0;
    for (int64_t at = 0; at < groups; at++)
      for (int64_t i = 0; i < c; i++) {
        const float y = book[(at * size + code[at]) * c + i];
        dot += x[at * c + i] * y, norm += y * y;
      }
    return static_cast<half>(std::min(std::max(dot / std::max(norm, 1e-30f), 0.0f), kHalfMax));
  };
  if (gain) {
    float square = 0;
    for (int64_t i = 0; i < groups * c; i++) square += x[i] * x[i];
    nearest(std::max(std::sqrt(square / static_cast<float>(groups * c)), kHalfTiny));
    nearest(std::max(static_cast<float>(fit()), kHalfTiny));
    *scale = fit();
  } else {
    nearest(1.0f);
  }
  pack(code.data(), bits, groups, codes);
}

// -- rotations -------------------------------------------------------------------------------------------------------------

inline int64_t core_of(int64_t order) {
  for (const int64_t core : {1, 12, 20})
    if (order % core == 0 && (order / core & (order / core - 1)) == 0) return core;
  return 0;
}

inline void hadamard(float* x, int64_t order, bool inverse) {
  const int64_t core = core_of(order), blocks = order / core;
  if (core > 1) {
    const float* m = core == 12 ? kCore12 : kCore20;
    float y[20];
    for (int64_t b = 0; b < blocks; b++) {
      for (int64_t j = 0; j < core; j++) {
        float sum = 0;
        for (int64_t i = 0; i < core; i++) sum += x[b * core + i] * (inverse ? m[j * core + i] : m[i * core + j]);
        y[j] = sum;
      }
      std::copy(y, y + core, x + b * core);
    }
  }
  for (int64_t h = 1; h < blocks; h *= 2)
    for (int64_t b = 0; b < blocks; b += 2 * h) {
      float *one = x + b * core, *two = one + h * core;
#pragma omp simd
      for (int64_t i = 0; i < h * core; i++) {
        const float a = one[i], c = two[i];
        one[i] = a + c, two[i] = a - c;
      }
    }
  const float scale = std::sqrt(static_cast<float>(core) / static_cast<float>(order));
#pragma omp simd
  for (int64_t i = 0; i < order; i++) x[i] *= scale;
}

// y = R x, halves of the first `rotary` channels turned against each other
inline void rope(const float* x, const float* cos, const float* sin, int64_t rotary, int64_t dim, float* y) {
  const int64_t n = rotary / 2;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float one = x[i], two = x[n + i];
    y[i] = one * cos[i] - two * sin[i];
    y[n + i] = two * cos[n + i] + one * sin[n + i];
  }
  for (int64_t i = rotary; i < dim; i++) y[i] = x[i];
}

// -- attention -------------------------------------------------------------------------------------------------------------

// e^x for x <= 0: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; relative error below 2e-7
inline float exp_below(float x) {
  x = std::max(x, -87.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120, p = p * r + 1.0f / 24, p = p * r + 1.0f / 6, p = p * r + 0.5f, p = p * r + 1.0f, p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

// Rows q [n, D], scaled already, over keys k [L, D] and values v [L, Dv] of one head; bias(row, l) is added to a score.
// Leaves, per row, out [Dv] not yet divided by its mass, mass and largest score.
template <typename Bias>
inline void attend_piece(const float* q, int64_t n, const float* k, const float* v, int64_t length, int64_t dim, int64_t value_dim,
                         Bias bias, float* out, float* mass, float* largest) {
  constexpr int64_t kTile = 128;
  float score[kTile];
  for (int64_t r = 0; r < n; r++) {
    largest[r] = std::numeric_limits<float>::lowest(), mass[r] = 0;
    std::fill(out + r * value_dim, out + (r + 1) * value_dim, 0.0f);
  }
  for (int64_t at = 0; at < length; at += kTile) {
    const int64_t count = std::min(kTile, length - at);
    for (int64_t r = 0; r < n; r++) {
      float top = largest[r], sum = 0;
      for (int64_t l = 0; l < count; l++) score[l] = bias(r, at + l, dot(q + r * dim, k + (at + l) * dim, dim));
      for (int64_t l = 0; l < count; l++) top = std::max(top, score[l]);
      const float less = exp_below(largest[r] - top);
      float* row = out + r * value_dim;
      if (less != 1.0f)
        for (int64_t i = 0; i < value_dim; i++) row[i] *= less;
#pragma omp simd reduction(+ : sum)
      for (int64_t l = 0; l < count; l++) score[l] = exp_below(score[l] - top), sum += score[l];
      for (int64_t l = 0; l < count; l++) {
        const float share = score[l], *from = v + (at + l) * value_dim;
#pragma omp simd
        for (int64_t i = 0; i < value_dim; i++) row[i] += share * from[i];
      }
      mass[r] = mass[r] * less + sum, largest[r] = top;
    }
  }
}

}  // namespace kvsink
