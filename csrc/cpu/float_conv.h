// Float convolutions: validation, weights re-laid for the kernels in use, and the plan of a call.
#pragma once

#include <vector>

#include "conv.h"

namespace biper {

// What follows a float convolution in a network; threshold and sense are for its bits alone.
struct FloatEpilogue {
  Window pool;
  float clamp_min, clamp_max;   // infinite where there is none
  Span<const float> threshold;  // [O], or empty: 0
  Span<const uint8_t> sense;    // bool [O], or empty
};

// A convolution of float32 maps with fixed weights, kept re-laid in memory of its own. Calls from
// several threads are safe. Everything throws std::invalid_argument where sizes do not fit.
class FloatConv {
 public:
  // Without groups; weight [O, KH, KW, C], bias [O] or empty.
  FloatConv(const ConvGeometry& geometry, Span<const float> weight, Span<const float> bias,
            const FloatEpilogue& epilogue);

  // The plan of a call, all but its addresses: x and the outputs that are wanted.
  FloatConvPlan plan_for(int64_t batch, int64_t height, int64_t width, bool planar, bool wants_bits,
                         int64_t threads) const;

  const ConvGeometry& geometry() const { return geometry_; }
  const Kernels& kernels() const { return *kernels_; }
  bool pooled() const { return pooled_; }

 private:
  const Kernels* kernels_;
  ConvGeometry geometry_;
  Window pool_;
  bool pooled_, winograd_;
  float clamp_min_, clamp_max_;
  std::vector<float> weights_, bias_, threshold_;
  std::vector<uint32_t> sense_;
};

}  // namespace biper
