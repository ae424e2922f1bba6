// The gradient of a sign whose activations are scaled per sample; for training.
#pragma once

#include "conv.h"

namespace biper {

// x, gradient and out are [samples, length]; `surrogate` is a number of Surrogate. Throws
// std::invalid_argument, before anything is touched, where sizes do not fit.
void sign_gradient(int64_t samples, int64_t length, int32_t surrogate, double epsilon,
                   Span<const float> x, Span<const float> gradient, Span<float> out,
                   int64_t threads);

}  // namespace biper
