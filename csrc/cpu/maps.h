// Packed maps: making them from floats, and back; pooling them.
#pragma once

#include "conv.h"

namespace biper {

// Maps are [pixels, channels] or [pixels, words]. Optional spans may be empty. Every function
// throws std::invalid_argument, before anything is touched, where sizes do not fit.

void binarize(int64_t pixels, int64_t channels, const FloatSpan& x, Span<const float> threshold,
              Span<const uint8_t> sense, Span<uint32_t> bits, int64_t threads);

void unbinarize(int64_t pixels, int64_t channels, Span<const uint32_t> bits, const FloatSpan& x,
                int64_t threads);

void maxpool(int64_t batch, int64_t height, int64_t width, int64_t channels, const Window& window,
             Span<const uint32_t> bits, Span<const uint8_t> take_and, Span<uint32_t> out,
             int64_t threads);

}  // namespace biper
