// The convolution of two signs with a scale, from floats to floats, which training calls.
#pragma once

#include "conv.h"

namespace biper {

// Writes alpha * conv(sign(x), sign(weight)), computed on bits and rounded once. Returns false, and
// does not touch `out`, where a value of x or weight is 0 or NaN, which bits have no room for.
// Throws std::invalid_argument, before anything is touched, where sizes do not fit.
//
// Shapes: x [batch, height, width, C], weight [O, KH, KW, C / groups], alpha [O], and out
// [batch, OH, OW, O].
bool signed_conv(const ConvGeometry& geometry, int64_t batch, int64_t height, int64_t width,
                 Span<const float> x, Span<const float> weight, Span<const float> alpha,
                 Span<float> out, int64_t threads);

}  // namespace biper
