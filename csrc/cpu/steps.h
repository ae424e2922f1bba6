// The steps of a program: each keeps what is constant, and makes itself ready for a batch size.
#pragma once

#include "program.h"

namespace biper {

// Units of whole rows or ranges of values, for up to `threads` threads.
struct Ranges {
  int64_t count, step;

  int64_t units() const { return (count + step - 1) / step; }
  int64_t first(int64_t unit) const { return unit * step; }
  int64_t last(int64_t unit) const { return std::min(count, (unit + 1) * step); }
};

std::unique_ptr<Step> conv_step(std::shared_ptr<const Conv> conv, const MapShape& in, int64_t bits,
                                int64_t residual, int64_t out_float, int64_t out_bits);
std::unique_ptr<Step> float_conv_step(std::shared_ptr<const FloatConv> conv, const MapShape& in,
                                      int64_t x, int64_t out_float, int64_t out_bits);
std::unique_ptr<Step> binarize_step(const MapShape& in, int64_t x, Span<const float> threshold,
                                    Span<const uint8_t> sense, int64_t out);
std::unique_ptr<Step> bit_pool_step(const MapShape& in, const MapShape& shape, int64_t bits,
                                    const Window& window, Span<const uint8_t> take_and,
                                    int64_t out);
std::unique_ptr<Step> average_step(const FloatPoolCall& call, int64_t x, int64_t out);
std::unique_ptr<Step> maximum_step(const FloatPoolCall& call, int64_t x, int64_t out);
std::unique_ptr<Step> sum_step(const MapShape& shape, int64_t a, int64_t b, float clamp_min,
                               float clamp_max, int64_t out);

}  // namespace biper
