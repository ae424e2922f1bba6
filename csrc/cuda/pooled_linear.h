// The classifier of a network on a GPU: mean over an image, then a linear layer, in one kernel.

#pragma once

#include <cstdint>

#include "types.h"

namespace biper {

// mean[c] = (sum of x over the pixels of an image, in float32) / (h * w), divided in float32
// out[k] = round(bias[k] + sum of mean[c] * weight[k, c] in float32), to the type of x
struct PooledLinearArgs {
  const void* x;               // dense, [n, h, w, c], kFloat32, kFloat16 or kBfloat16
  int type;                    // type of x and out
  const void* weight;          // dense, [classes, c]
  const void* bias;            // [classes]; nullptr: 0
  int weight_type, bias_type;  // equal to `type`, or kFloat32
  void* out;                   // dense, [n, classes]
  int64_t n;
  int c, h, w, classes;
};

// Returns nullptr, or the reason why nothing was launched. An empty batch launches nothing.
const char* pooled_linear(const PooledLinearArgs& args, void* stream);

}  // namespace biper
