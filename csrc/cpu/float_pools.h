// Pools and sums of float maps, NHWC.
#pragma once

#include "vectors.h"

namespace biper {

// The rows or columns of a map that window `at` of a pool has, and how many it has with padding.
struct PoolSpan {
  int64_t first, last, padded;
};

BIPER_INLINE PoolSpan adaptive_span(int64_t at, int64_t size, int64_t count) {
  const int64_t first = at * size / count, last = ((at + 1) * size + count - 1) / count;
  return {first, last, last - first};
}

BIPER_INLINE PoolSpan pool_span(int64_t at, int64_t size, int64_t kernel, int64_t stride,
                                int64_t pad) {
  const int64_t first = at * stride - pad, last = min64(first + kernel, size + pad);
  return {max64(first, 0), min64(last, size), last - first};
}

BIPER_INLINE PoolSpan pool_rows(const FloatPoolCall& call, int64_t y) {
  if (call.adaptive) return adaptive_span(y, call.height, call.out_h);
  const Window& w = call.window;
  return pool_span(y, call.height, w.kernel_h, w.stride_h, w.pad_h);
}

BIPER_INLINE PoolSpan pool_columns(const FloatPoolCall& call, int64_t x) {
  if (call.adaptive) return adaptive_span(x, call.width, call.out_w);
  const Window& w = call.window;
  return pool_span(x, call.width, w.kernel_w, w.stride_w, w.pad_w);
}

// The window of an output that a pool averages.
struct AverageWindow {
  const float* from;  // its first pixel's first channel
  int64_t rows, columns, row_step, step;
};

// Adds up N vectors of channels from channel `c` on and multiplies by `factor`.
template <class I, int N>
BIPER_INLINE void average_vectors(const AverageWindow& window, int64_t c, typename I::Float factor,
                                  float* to) {
  typename I::Float sums[N];
  for (int n = 0; n < N; ++n) sums[n] = I::broadcast(0.0f);
  for (int64_t y = 0; y < window.rows; ++y) {
    const float* from = window.from + y * window.row_step + c;
    for (int64_t x = 0; x < window.columns; ++x, from += window.step) {
      for (int n = 0; n < N; ++n) sums[n] = I::add(sums[n], I::load(from + n * I::kFloats));
    }
  }
  for (int n = 0; n < N; ++n) I::store(to + c + n * I::kFloats, I::multiply(sums[n], factor));
}

template <class I>
static void average_row(const FloatPoolCall& call, int64_t row) {
  const PoolSpan tall = pool_rows(call, row % call.out_h);
  const int64_t channels = call.channels, row_step = call.width * channels;
  const float* first = call.x + (row / call.out_h * call.height + tall.first) * row_step;
  float* out = call.out + row * call.out_w * call.out_channels;
  if (call.out_channels != channels) {
    __builtin_memset(out, 0, static_cast<size_t>(call.out_w * call.out_channels) * sizeof(float));
  }
  out += call.first_channel;
  for (int64_t x = 0; x < call.out_w; ++x, out += call.out_channels) {
    const PoolSpan wide = pool_columns(call, x);
    const AverageWindow window{first + wide.first * channels, tall.last - tall.first,
                               wide.last - wide.first, row_step, channels};
    int64_t count = call.divisor;
    if (count == 0) {
      count = call.count_padding ? tall.padded * wide.padded : window.rows * window.columns;
    }
    // A product with the inverse of a power of two is the quotient.
    const bool inverts = (count & (count - 1)) == 0;
    const float divisor = static_cast<float>(count);
    const typename I::Float factor = I::broadcast(inverts ? 1.0f / divisor : 1.0f);
    int64_t c = 0;
    for (; c + 4 * I::kFloats <= channels; c += 4 * I::kFloats) {
      average_vectors<I, 4>(window, c, factor, out);
    }
    for (; c + I::kFloats <= channels; c += I::kFloats) {
      average_vectors<I, 1>(window, c, factor, out);
    }
    for (int64_t at = 0; !inverts && at < c; ++at) out[at] /= divisor;
    for (int64_t at = c; at < channels; ++at) out[at] = 0.0f;
    for (int64_t y = 0; c < channels && y < window.rows; ++y) {
      const float* from = window.from + y * row_step;
      for (int64_t column = 0; column < window.columns; ++column, from += channels) {
        for (int64_t at = c; at < channels; ++at) out[at] += from[at];
      }
    }
    for (; c < channels; ++c) out[c] /= divisor;
  }
}

template <class I>
static void maximum_row(const FloatPoolCall& call, int64_t row) {
  const PoolSpan tall = pool_rows(call, row % call.out_h);
  const float* image = call.x + row / call.out_h * call.height * call.width * call.channels;
  float* out = call.out + row * call.out_w * call.channels;
  for (int64_t x = 0; x < call.out_w; ++x, out += call.channels) {
    const PoolSpan wide = pool_columns(call, x);
    for (int64_t c = 0; c < call.channels; ++c) out[c] = -__builtin_inff();
    for (int64_t y = tall.first; y < tall.last; ++y) {
      const float* from = image + (y * call.width + wide.first) * call.channels;
      for (int64_t at = wide.first; at < wide.last; ++at, from += call.channels) {
        for (int64_t c = 0; c < call.channels; ++c) out[c] = from[c] > out[c] ? from[c] : out[c];
      }
    }
  }
}

template <class I>
static void sum(const SumCall& call, int64_t first, int64_t last) {
  const float low = call.clamp_min, high = call.clamp_max;
  for (int64_t i = first; i < last; ++i) {
    float v = call.b ? call.a[i] + call.b[i] : call.a[i];
    v = v < low ? low : v;
    call.out[i] = v > high ? high : v;
  }
}

}  // namespace biper
