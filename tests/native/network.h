// Programs that every machine builds alike, for tests: numbers, arguments, and some steps.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "steps.h"

namespace biper {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr Window kNoPool{1, 1, 1, 1, 0, 0};

// Numbers that every machine makes alike: multiples of 1/512.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed) {}

  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  float value(float scale) {
    return static_cast<float>(static_cast<int32_t>(bits() % 2001) - 1000) / 512.0f * scale;
  }
  std::vector<float> values(int64_t count, float scale) {
    std::vector<float> made(static_cast<size_t>(count));
    for (float& value_of : made) value_of = value(scale);
    return made;
  }

 private:
  uint64_t state_;
};

template <class T>
Span<const T> span(const std::vector<T>& values) {
  return {values.data(), static_cast<int64_t>(values.size())};
}

using Value = Arguments::Value;
using Values = Arguments::Values;

template <class T>
Value memory(const std::vector<T>& values) {
  return std::vector<int64_t>{reinterpret_cast<int64_t>(values.data()),
                              static_cast<int64_t>(values.size()), type_of<T>()};
}

inline Value pool(const Window& w) {
  return std::vector<int64_t>{w.kernel_h, w.kernel_w, w.stride_h, w.stride_w, w.pad_h, w.pad_w};
}

inline Value geometry(const ConvGeometry& g) {
  return std::vector<int64_t>{g.in_channels, g.out_channels, g.groups,    g.kernel_h,   g.kernel_w,
                              g.stride_h,    g.stride_w,     g.pad_top,   g.pad_bottom, g.pad_left,
                              g.pad_right,   g.dilation_h,   g.dilation_w};
}

// A program and all that its arguments have the addresses of.
class Network {
 public:
  explicit Network(uint64_t seed) : numbers(seed) {}

  int64_t map(int64_t height, int64_t width, int64_t channels, bool packed = false) {
    return program.add_map({height, width, channels, packed});
  }

  // Each returns the maps that the step writes; `more` are its other arguments.
  std::vector<int64_t> add(const char* step, Values values) {
    return add_step(program, step, Arguments(std::move(values)));
  }
  std::vector<int64_t> conv(const ConvGeometry& g, Values more) {
    const int64_t words = (g.in_channels / g.groups + 31) / 32;
    std::vector<uint32_t> weight(
        static_cast<size_t>(g.out_channels * g.kernel_h * g.kernel_w * words));
    for (uint32_t& word : weight) word = numbers.bits();
    const int64_t used = g.in_channels / g.groups - (words - 1) * 32;
    for (size_t w = static_cast<size_t>(words) - 1; w < weight.size(); w += words) {
      if (used < 32) weight[w] &= (1u << used) - 1;
    }
    const std::vector<float> multiplier = numbers.values(g.out_channels, 0.05f);
    const std::vector<float> bias = numbers.values(g.out_channels, 0.3f);
    const std::vector<float> threshold = numbers.values(g.out_channels, 0.2f);
    more.insert({{"geometry", geometry(g)},
                 {"weight", memory(weight)},
                 {"pool", pool(kNoPool)},
                 {"multiplier", memory(multiplier)},
                 {"bias", memory(bias)},
                 {"threshold", memory(threshold)},
                 {"clamp_min", -1.0},
                 {"clamp_max", 1.0}});
    return add("conv", more);
  }
  std::vector<int64_t> float_conv(const ConvGeometry& g, double limit, Values more) {
    const int64_t depth = g.kernel_h * g.kernel_w * g.in_channels;
    // Small enough that clamps do not hide how sums were rounded.
    const float scale = depth > 100 ? 0.02f : 0.1f;
    const std::vector<float> weight = numbers.values(g.out_channels * depth, scale);
    const std::vector<float> bias = numbers.values(g.out_channels, 0.2f);
    const std::vector<float> threshold = numbers.values(g.out_channels, 0.1f);
    more.insert({{"geometry", geometry(g)},
                 {"weight", memory(weight)},
                 {"bias", memory(bias)},
                 {"threshold", memory(threshold)},
                 {"pool", pool(kNoPool)},
                 {"clamp_min", -limit},
                 {"clamp_max", limit},
                 {"want_float", true},
                 {"want_bits", false}});
    return add("float_conv", more);
  }

  Numbers numbers;
  Program program;
};

inline ConvGeometry square(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad,
                           int64_t groups = 1) {
  return {in, out, groups, kernel, kernel, stride, stride, pad, pad, pad, pad, 1, 1};
}

using Integers = std::vector<int64_t>;

// Adds every function of the numbers of two maps of 21 values, and of their rows; returns them
// joined, and how many values those are.
int64_t numbers_of(Network& n, int64_t a, int64_t b);
constexpr int64_t kNumbers = 40 * 21 + 3 * 21 + 9 * 3;

// Adds a filter for each channel of a map [5, 4, 70], products of matrices, moves, a constant, and
// the numbers of bits [5, 4, 70]; returns them joined.
int64_t parts_of(Network& n, int64_t x, int64_t bits);
constexpr int64_t kParts = 1400 + 400 + 630 + 1400 + 70;

}  // namespace biper
