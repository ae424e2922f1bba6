// Packed maps on a GPU: packing, unpacking and pooling.
//
// Packed maps are dense, [n, h, w, words]; strides are in elements. Every launcher returns nullptr,
// or the reason why nothing was launched. An empty map launches nothing.

#pragma once

#include <cstdint>

#include "types.h"

namespace biper {

// bit = sense ? x <= threshold : x >= threshold, compared in float32; unused bits are 0.
struct BinarizeArgs {
  const void* x;  // [n, c, h, w], kFloat32, kFloat16 or kBfloat16
  int type;
  int64_t stride_n, stride_c, stride_h, stride_w;
  const float* threshold;  // [c]; nullptr: 0
  const bool* sense;       // [c]; nullptr: false
  uint32_t* bits;          // aligned to 16 bytes, like all packed maps here
  int64_t n;
  int c, h, w;
};

const char* binarize(const BinarizeArgs& args, void* stream);

// x = bit ? 1 : -1.
struct UnbinarizeArgs {
  const uint32_t* bits;
  void* x;  // dense, [n, h, w, c], aligned to 16 bytes
  int type;
  int64_t n;
  int c, h, w;
};

const char* unbinarize(const UnbinarizeArgs& args, void* stream);

// The maximum of +-1 in each window, or the minimum where `take_and`; padding never wins.
struct BitPoolArgs {
  const uint32_t* bits;  // [n, h, w, words(c)]
  const bool* take_and;  // [c]; nullptr: false
  uint32_t* out;         // [n, out_h, out_w, words(c)]
  int64_t n;
  int c, h, w, out_h, out_w;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
};

const char* bmaxpool2d(const BitPoolArgs& args, void* stream);

}  // namespace biper
