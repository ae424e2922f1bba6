// A 7x7 convolution with stride 2 in fewer products: the stem of an ImageNet network.
//
// Along an axis such a convolution is the sum of two with stride 1: of the values at even places
// with the 4 weights at even places, and of those at odd places with the other 3. Of each, a few
// neighbouring outputs are a Toom-Cook product (Winograd's F(m, 4) and F(m, 3); Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks", CVPR 2016): values and weights are evaluated
// as polynomials at some points, multiplied point by point, and interpolated. The points are the
// same for both, so that both are summed before one interpolation. Nested, a tile of 3 rows x 4
// columns of outputs takes
//
//     along a row:    points 0, 1, -1, 1/2, -1/2, 2 (for the even ones), infinity: 13 products,
//     along a column: points 3/2, -3/2, 1/2, -1/2, 0 (for the even ones), infinity: 11 products,
//
// 143 instead of 588 for each channel. Tiles begin at every third row of the whole map, so that a
// unit of work changes no sum.
//
// Values are transformed once for all output channels, weights once for all images. In float32 the
// root mean square error is three times that of plain sums (7.0e-7 and 2.2e-7 of an output's own,
// on 147 normal products). Every step is rounded in the order that stands here, which makes the
// bytes equal on all instruction sets.
#pragma once

#include "epilogue.h"

namespace biper {

constexpr int64_t kStride = 2;
constexpr int kTile = 4;         // outputs along a row
constexpr int kTileInputs = 13;  // values that they see
constexpr int kEvenPoints = 7, kOddPoints = 6;
constexpr int kProducts = kEvenPoints + kOddPoints;
constexpr int kStep = kStride * kTile;  // from the values of a tile to those of the next one

constexpr int kTileRows = 3;        // outputs along a column
constexpr int kTileInputRows = 11;  // rows that they see
constexpr int kRowPoints = 6;
constexpr int kPlanes = 11;  // rows of products: at each point even ones, then odd ones if any
constexpr int kPlanesOfPoint[kRowPoints] = {2, 2, 2, 2, 1, 2};

// The sums of products that become outputs; even and odd products of a point share one sum.
constexpr int kSumOfOdd[kOddPoints] = {0, 1, 2, 3, 4, 6};

// Rows that wait for a pool; with tiles, all of those that its window touches.
inline int64_t ring_rows(const FloatConvPlan& plan) {
  const int64_t rows = plan.pool.kernel_h;
  return plan.winograd ? (rows + 2 * (kTileRows - 1)) / kTileRows * kTileRows : rows;
}

// The values that tiles see, by their place in a tile: streams [kStep][length], of which tile t has
// place i at streams[i % kStep][t + i / kStep].
//
// A row of [left, left + count) of them, zeros around it, is put into its streams; its values are
// `stride` apart.
BIPER_INLINE void spread_row(const float* row, int64_t stride, int64_t left, int64_t count,
                             int64_t length, float* streams) {
  __builtin_memset(streams, 0, static_cast<size_t>(kStep * length) * sizeof(float));
  int64_t x = 0;
  for (; x < count && (left + x) % kStep != 0; ++x) {
    streams[(left + x) % kStep * length + (left + x) / kStep] = row[x * stride];
  }
  for (; x + kStep <= count; x += kStep) {
    float* const to = streams + (left + x) / kStep;
    BIPER_UNROLL
    for (int i = 0; i < kStep; ++i) to[i * length] = row[(x + i) * stride];
  }
  for (; x < count; ++x) {
    streams[(left + x) % kStep * length + (left + x) / kStep] = row[x * stride];
  }
}

// The same of a whole row [kStep * length] with its zeros, a vector of tiles at once: values at
// even places are taken apart from those at odd ones, three times over.
template <class I>
BIPER_INLINE void split_row(const float* row, int64_t length, float* streams) {
  int64_t t = 0;
  for (; t + I::kFloats <= length; t += I::kFloats) {
    typename I::Float v[kStep], apart[kStep];
    BIPER_UNROLL
    for (int i = 0; i < kStep; ++i) v[i] = I::load(row + t * kStep + i * I::kFloats);
    BIPER_UNROLL
    for (int level = 0; level < 3; ++level) {
      BIPER_UNROLL
      for (int i = 0; i < kStep / 2; ++i) {
        apart[i] = I::even(v[2 * i], v[2 * i + 1]);
        apart[i + kStep / 2] = I::odd(v[2 * i], v[2 * i + 1]);
      }
      BIPER_UNROLL
      for (int i = 0; i < kStep; ++i) v[i] = apart[i];
    }
    BIPER_UNROLL
    for (int i = 0; i < kStep; ++i) I::store(streams + i * length + t, v[i]);
  }
  for (; t < length; ++t) {
    BIPER_UNROLL
    for (int i = 0; i < kStep; ++i) streams[i * length + t] = row[t * kStep + i];
  }
}

// Evaluates the streams of a row at the points of a row: values [kProducts][step].
//
// The polynomial of point p is the product of x - q over the other points q. Those of p and -p have
// all factors but one in common, so that their sum and difference are found from two sums.
template <class I>
BIPER_INLINE void evaluate_streams(const float* streams, int64_t length, int64_t step,
                                   float* values) {
  using Float = typename I::Float;
  const auto times = [](float a, Float b, Float c) { return I::fma(I::broadcast(a), b, c); };
  for (int64_t t = 0; t < step; t += I::kFloats, values += I::kFloats) {
    Float d[kTileInputs];
    BIPER_UNROLL
    for (int i = 0; i < kTileInputs; ++i) {
      d[i] = I::load(streams + i % kStep * length + i / kStep + t);
    }
    const auto put = [&](int product, Float value) { I::store(values + product * step, value); };
    {
      const Float d0 = d[0], d1 = d[2], d2 = d[4], d3 = d[6], d4 = d[8], d5 = d[10], d6 = d[12];
      const Float high = times(0.5f, d2, times(-0.25f, d3, times(-2.0f, d4, d5)));
      const Float low = times(0.5f, d1, times(-0.25f, d2, times(-2.0f, d3, d4)));
      const Float high_half = times(2.0f, d2, times(-2.0f, d4, I::subtract(d5, d3)));
      const Float low_half = times(2.0f, d1, times(-2.0f, d3, I::subtract(d4, d2)));
      const Float two = times(0.25f, d1, times(-1.25f, d3, d5));
      put(0, times(-0.5f, d0, times(2.5f, d2, times(-2.0f, d4, two))));
      put(1, I::add(high, low));
      put(2, I::subtract(high, low));
      put(3, times(0.5f, low_half, high_half));
      put(4, times(-0.5f, low_half, high_half));
      put(5, two);
      put(6, times(-2.0f, two, times(0.25f, d2, times(-1.25f, d4, d6))));
    }
    {
      const Float d0 = d[1], d1 = d[3], d2 = d[5], d3 = d[7], d4 = d[9], d5 = d[11];
      const Float high = times(-0.25f, d2, d4), low = times(-0.25f, d1, d3);
      const Float high_half = I::subtract(d4, d2), low_half = I::subtract(d3, d1);
      put(7, times(0.25f, d0, times(-1.25f, d2, d4)));
      put(8, I::add(high, low));
      put(9, I::subtract(high, low));
      put(10, times(0.5f, low_half, high_half));
      put(11, times(-0.5f, low_half, high_half));
      put(12, times(0.25f, d1, times(-1.25f, d3, d5)));
    }
  }
}

// Evaluates input rows of tiles at the points of a column: planes [kPlanes][size].
template <class I>
BIPER_INLINE void evaluate_planes(const float* const (&rows)[kTileInputRows], int64_t size,
                                  float* planes) {
  using Float = typename I::Float;
  const auto times = [](float a, Float b, Float c) { return I::fma(I::broadcast(a), b, c); };
  for (int64_t k = 0; k < size; k += I::kFloats) {
    const auto get = [&](int row) { return I::load(rows[row] + k); };
    const auto put = [&](int plane, Float value) { I::store(planes + plane * size + k, value); };
    BIPER_UNROLL
    for (int odd = 0; odd < 2; ++odd) {
      const int first = odd ? 1 : 2;  // row of what stands at 1 in the polynomials below
      const Float d1 = get(first), d2 = get(first + 2), d3 = get(first + 4), d4 = get(first + 6);
      const Float high = times(-0.25f, d2, d4);
      const Float low = times(1.5f, d3, I::multiply(I::broadcast(-0.375f), d1));
      const Float high_half = times(-2.25f, d2, d4);
      const Float low_half = times(0.5f, d3, I::multiply(I::broadcast(-1.125f), d1));
      put(0 + odd, I::add(high, low));
      put(2 + odd, I::subtract(high, low));
      put(4 + odd, I::add(high_half, low_half));
      put(6 + odd, I::subtract(high_half, low_half));
      if (!odd) put(8, times(0.5625f, get(0), times(-2.5f, d2, d4)));
      put(9 + odd, times(0.5625f, d1, times(-2.5f, d3, get(first + 8))));
    }
  }
}

// Tiles of a padded row, whole vectors of them, and what the last one sees beyond.
inline int64_t split_length(const FloatConvPlan& plan) { return plan.tile_step + 2; }

// Evaluates input row y, which may lie outside of the image: values [C][kProducts][tile_step].
template <class I>
BIPER_INLINE void evaluate_input_row(const FloatConvPlan& plan, const float* image, int64_t y,
                                     float* row, float* values) {
  const int64_t channels = plan.in_channels, step = plan.tile_step;
  if (y < 0 || y >= plan.height) {
    __builtin_memset(values, 0, static_cast<size_t>(channels * kProducts * step) * sizeof(float));
    return;
  }
  const int64_t length = kStep * split_length(plan);
  const int64_t left = min64(plan.pad_left, length), inside = min64(plan.width, length - left);
  float* const streams = row + length;
  for (int64_t c = 0; c < channels; ++c, values += kProducts * step) {
    if (plan.planar) {
      const int64_t filled = left + inside;
      __builtin_memset(row, 0, static_cast<size_t>(left) * sizeof(float));
      __builtin_memcpy(row + left, image + (c * plan.height + y) * plan.width,
                       static_cast<size_t>(inside) * sizeof(float));
      __builtin_memset(row + filled, 0, static_cast<size_t>(length - filled) * sizeof(float));
      split_row<I>(row, split_length(plan), streams);
    } else {
      const float* const from = image + y * plan.width * channels + c;
      spread_row(from, channels, left, inside, split_length(plan), streams);
    }
    evaluate_streams<I>(streams, split_length(plan), step, values);
  }
}

// Asks for input row y, which the tiles after these ones read.
BIPER_INLINE void prefetch_row(const FloatConvPlan& plan, const float* image, int64_t y) {
  if (y < 0 || y >= plan.height) return;
  const int64_t rows = plan.planar ? plan.in_channels : 1;
  const int64_t values = plan.width * (plan.planar ? 1 : plan.in_channels);
  for (int64_t r = 0; r < rows; ++r) {
    const float* const from = image + (r * plan.height + y) * values;
    for (int64_t x = 0; x < values; x += 16) __builtin_prefetch(from + x);
  }
}

// The evaluated rows of a unit, as its tiles follow each other.
struct WinogradRows {
  float* ring;    // [kTileInputRows][C][kProducts][tile_step]: input row y is in slot y - first
  float* planes;  // [kPlanes][C][kProducts][tile_step] of the tiles at work
  float* row;     // a row to be evaluated, twice
  int64_t first, next;  // input rows below `next` are in the ring
};

// Evaluates the input of the tiles from output row y on into the planes; y only rises.
template <class I>
BIPER_INLINE void evaluate_tiles(const FloatConvPlan& plan, const float* image, int64_t y,
                                 WinogradRows& rows) {
  const int64_t size = plan.in_channels * kProducts * plan.tile_step;
  const int64_t top = kStride * y - plan.pad_top;
  rows.next = max64(rows.next, top);
  for (const int64_t end = top + kTileInputRows; rows.next < end; ++rows.next) {
    prefetch_row(plan, image, rows.next + kStride * kTileRows);
    float* const slot = rows.ring + (rows.next - rows.first) % kTileInputRows * size;
    evaluate_input_row<I>(plan, image, rows.next, rows.row, slot);
  }
  const float* inputs[kTileInputRows];
  for (int i = 0; i < kTileInputRows; ++i) {
    inputs[i] = rows.ring + (top + i - rows.first) % kTileInputRows * size;
  }
  evaluate_planes<I>(inputs, size, rows.planes);
}

// Interpolates along a row: the sums at T tiles, of tile t at m[p * T], become the outputs of one.
template <class I, int T>
BIPER_INLINE void interpolate_row(const typename I::Float* m, typename I::Float (&out)[kTile]) {
  using Float = typename I::Float;
  const Float half = I::broadcast(0.5f), quarter = I::broadcast(0.25f);
  const Float eighth = I::broadcast(0.125f), two = I::broadcast(2.0f);
  const Float four = I::broadcast(4.0f), eight = I::broadcast(8.0f);
  const Float plus_one = I::add(m[1 * T], m[2 * T]);
  const Float minus_one = I::subtract(m[1 * T], m[2 * T]);
  const Float plus_half = I::add(m[3 * T], m[4 * T]);
  const Float minus_half = I::subtract(m[3 * T], m[4 * T]);
  const Float last = m[5 * T];
  out[0] = I::add(I::add(m[0], plus_one), I::add(plus_half, last));
  out[1] = I::fma(two, last, I::fma(half, minus_half, minus_one));
  out[2] = I::fma(four, last, I::fma(quarter, plus_half, plus_one));
  out[3] = I::fma(eight, last, I::fma(eighth, minus_half, I::add(minus_one, m[6 * T])));
}

// The rows of tiles of one vector of outputs, [whole tiles][kFloats] each: sums until the last
// point of a column, then what the convolution gives.
struct TileRows {
  float* rows[kTileRows];
  const float* bias;
};

// Interpolates along a column: adds the value of row point Q at pixel x.
template <class I, int Q>
BIPER_INLINE void interpolate_column(typename I::Float value, int64_t x, const TileRows& to) {
  using Float = typename I::Float;
  float *const first = to.rows[0] + x * I::kFloats, *const second = to.rows[1] + x * I::kFloats;
  float* const third = to.rows[2] + x * I::kFloats;
  if constexpr (Q == 0) {  // 3/2
    I::store(first, value);
  } else if constexpr (Q == 1) {  // -3/2
    const Float before = I::load(first);
    I::store(first, I::add(before, value));
    I::store(second, I::subtract(before, value));
  } else if constexpr (Q == 2) {  // 1/2
    I::store(third, value);
  } else if constexpr (Q == 3) {  // -1/2
    const Float before = I::load(third), plus = I::add(before, value);
    const Float minus = I::fma(I::broadcast(0.5f), I::subtract(before, value), I::load(to.bias));
    const Float outer = I::load(first);
    I::store(first, I::add(outer, plus));
    I::store(second, I::fma(I::broadcast(1.5f), I::load(second), minus));
    I::store(third, I::fma(I::broadcast(2.25f), outer, I::multiply(I::broadcast(0.25f), plus)));
  } else {  // 0 and infinity
    float* const row = Q == 4 ? first : third;
    I::store(row, I::add(I::add(I::load(row), I::load(to.bias)), value));
  }
}

// Multiplies T tiles from `tile` on with one vector of outputs at row point Q; `count` rows of
// values, of which the first begins at `values`.
template <class I, int Q, int T>
BIPER_INLINE void winograd_tiles(const float* values, int64_t step, const float* weights,
                                 int64_t count, int64_t tile, const TileRows& to) {
  typename I::Float sums[kEvenPoints * T];
  BIPER_UNROLL
  for (int i = 0; i < kEvenPoints * T; ++i) sums[i] = I::broadcast(0.0f);
  values += tile;
  for (int64_t k = 0; k < count; ++k, weights += kProducts * I::kFloats) {
    BIPER_UNROLL
    for (int p = 0; p < kProducts; ++p, values += step) {
      const int sum = p < kEvenPoints ? p : kSumOfOdd[p - kEvenPoints];
      const typename I::Float w = I::load(weights + p * I::kFloats);
      BIPER_UNROLL
      for (int t = 0; t < T; ++t) {
        sums[sum * T + t] = I::fma(I::broadcast(values[t]), w, sums[sum * T + t]);
      }
    }
  }
  BIPER_UNROLL
  for (int t = 0; t < T; ++t) {
    typename I::Float results[kTile];
    interpolate_row<I, T>(sums + t, results);
    BIPER_UNROLL
    for (int o = 0; o < kTile; ++o) {
      interpolate_column<I, Q>(results[o], (tile + t) * kTile + o, to);
    }
  }
}

// Runs the tiles of a row for one vector of outputs, point after point from Q on: what is read at
// one of them, values and weights, fits the first cache.
template <class I, int Q = 0, int T = I::kFloatTiles>
BIPER_INLINE void winograd_rows(const FloatConvPlan& plan, const float* planes,
                                const float* weights, const TileRows& to) {
  const int64_t count = kPlanesOfPoint[Q] * plan.in_channels;
  int64_t tile = 0;
  for (; tile + T <= plan.tiles; tile += T) {
    winograd_tiles<I, Q, T>(planes, plan.tile_step, weights, count, tile, to);
  }
  for (; tile < plan.tiles; ++tile) {
    winograd_tiles<I, Q, 1>(planes, plan.tile_step, weights, count, tile, to);
  }
  if constexpr (Q + 1 < kRowPoints) {
    winograd_rows<I, Q + 1, T>(plan, planes + count * kProducts * plan.tile_step,
                               weights + count * kProducts * I::kFloats, to);
  }
}

}  // namespace biper
