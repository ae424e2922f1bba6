// Products of float maps: of two matrices, and of each channel with a filter of its own.
#pragma once

#include "float_kernels.h"

namespace biper {

// Computes P rows of outputs from `column` on, J vectors or, where not kFull, one of `count` lanes.
template <class I, int P, int J, bool kFull>
BIPER_INLINE void matmul_tile(const MatmulCall& call, const float* a, const float* b, float* out,
                              int64_t column, int64_t count) {
  using Float = typename I::Float;
  Float totals[P * J], sums[P * J];
  BIPER_UNROLL
  for (int i = 0; i < P * J; ++i) totals[i] = I::broadcast(0.0f);
  for (int64_t first = 0; first < call.depth; first += kChain) {
    const int64_t last = min64(first + kChain, call.depth);
    BIPER_UNROLL
    for (int i = 0; i < P * J; ++i) sums[i] = I::broadcast(0.0f);
    for (int64_t k = first; k < last; ++k) {
      const float* row = b + k * call.columns + column;
      Float w[J];
      BIPER_UNROLL
      for (int j = 0; j < J; ++j) {
        w[j] = load_channels<I, kFull>(row, j * I::kFloats, count);
      }
      BIPER_UNROLL
      for (int p = 0; p < P; ++p) {
        const Float value = I::broadcast(a[p * call.depth + k]);
        BIPER_UNROLL
        for (int j = 0; j < J; ++j) sums[p * J + j] = I::fma(value, w[j], sums[p * J + j]);
      }
    }
    BIPER_UNROLL
    for (int i = 0; i < P * J; ++i) totals[i] = I::add(totals[i], sums[i]);
  }
  BIPER_UNROLL
  for (int p = 0; p < P; ++p) {
    BIPER_UNROLL
    for (int j = 0; j < J; ++j) {
      store_stream<I, kFull>(out, FloatType::kFloat32, p * call.columns + column + j * I::kFloats,
                             count, totals[p * J + j]);
    }
  }
}

template <class I, int P>
BIPER_INLINE void matmul_strip(const MatmulCall& call, const float* a, const float* b, float* out) {
  int64_t column = 0;
  for (; column + 2 * I::kFloats <= call.columns; column += 2 * I::kFloats) {
    matmul_tile<I, P, 2, true>(call, a, b, out, column, I::kFloats);
  }
  if (column + I::kFloats <= call.columns) {
    matmul_tile<I, P, 1, true>(call, a, b, out, column, I::kFloats);
    column += I::kFloats;
  }
  if (column < call.columns) {
    matmul_tile<I, P, 1, false>(call, a, b, out, column, call.columns - column);
  }
}

// Computes rows [first, last) of the outputs of all matrices.
template <class I>
static void matmul_rows(const MatmulCall& call, int64_t first, int64_t last) {
  constexpr int kTall = 4;
  while (first < last) {
    const int64_t matrix = first / call.rows;
    const int64_t end = min64(last, (matrix + 1) * call.rows);
    const float* b = call.b + matrix * call.depth * call.columns;
    for (; first + kTall <= end; first += kTall) {
      matmul_strip<I, kTall>(call, call.a + first * call.depth, b, call.out + first * call.columns);
    }
    for (; first < end; ++first) {
      matmul_strip<I, 1>(call, call.a + first * call.depth, b, call.out + first * call.columns);
    }
  }
}

// Positions of a filter, of `kernel`, that lie on the map where it starts at `start`.
BIPER_INLINE Border taps_on_map(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
  int64_t first = 0, last = kernel;
  while (first < last && start + first * dilation < 0) ++first;
  while (last > first && start + (last - 1) * dilation >= size) --last;
  return {static_cast<int32_t>(first), static_cast<int32_t>(last)};
}

// The filters' positions on the map for one pixel of the outputs.
struct Taps {
  Border rows, columns;
  int64_t top, left;
};

template <class I, bool kFull>
BIPER_INLINE void depthwise_vector(const DepthwiseCall& call, const float* image, const Taps& taps,
                                   int64_t channel, int64_t count, float* out) {
  typename I::Float sum = load_channels<I, kFull>(call.bias, channel, count);
  for (int64_t ky = taps.rows.first; ky < taps.rows.last; ++ky) {
    const float* row = image + (taps.top + ky * call.dilation_h) * call.width * call.channels;
    const float* weights = call.weights + ky * call.kernel_w * call.channels;
    for (int64_t kx = taps.columns.first; kx < taps.columns.last; ++kx) {
      const float* from = row + (taps.left + kx * call.dilation_w) * call.channels;
      sum = I::fma(load_channels<I, kFull>(from, channel, count),
                   load_channels<I, kFull>(weights + kx * call.channels, channel, count), sum);
    }
  }
  store_stream<I, kFull>(out, FloatType::kFloat32, channel, count, sum);
}

template <class I>
static void depthwise_row(const DepthwiseCall& call, int64_t row) {
  const int64_t y = row % call.out_h;
  const float* image = call.x + row / call.out_h * call.height * call.width * call.channels;
  float* out = call.out + row * call.out_w * call.channels;
  Taps taps;
  taps.top = y * call.stride_h - call.pad_top;
  taps.rows = taps_on_map(taps.top, call.kernel_h, call.dilation_h, call.height);
  for (int64_t x = 0; x < call.out_w; ++x, out += call.channels) {
    taps.left = x * call.stride_w - call.pad_left;
    taps.columns = taps_on_map(taps.left, call.kernel_w, call.dilation_w, call.width);
    int64_t c = 0;
    for (; c + I::kFloats <= call.channels; c += I::kFloats) {
      depthwise_vector<I, true>(call, image, taps, c, I::kFloats, out);
    }
    if (c < call.channels) {
      depthwise_vector<I, false>(call, image, taps, c, call.channels - c, out);
    }
  }
}

}  // namespace biper
