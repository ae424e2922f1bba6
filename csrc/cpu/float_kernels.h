// Float convolutions with what follows them. All maps are NHWC but for the input of a network,
// which may be planar.
//
// A convolution works like the binary one: per unit of work (a strip of output rows of one image,
// some blocks of output channels) the input rows are copied into a strip with their padding, and a
// tile of P pixels x J vectors of outputs stays in registers over the whole receptive field. Where
// a max pool follows, rows of results pass through a ring as high as its window.
#pragma once

#include "epilogue.h"
#include "winograd.h"

namespace biper {

// Where windows find their input: values [depth] at `offsets` from a window's first one.
struct FloatStrip {
  const float* values;  // of the window at (conv_first, 0)
  int64_t row_step, column_step;
  const int32_t* offsets;
};

// Copies `count` values of a row between `left` and `right` zeros.
BIPER_INLINE void pad_row(const float* from, int64_t left, int64_t count, int64_t right,
                          float* to) {
  __builtin_memset(to, 0, static_cast<size_t>(left) * sizeof(float));
  if (count > 0) {
    __builtin_memcpy(to + left, from, static_cast<size_t>(count) * sizeof(float));
  }
  __builtin_memset(to + left + count, 0, static_cast<size_t>(right) * sizeof(float));
}

// Copies the input rows that a unit's windows see, padding as zeros, in the input's own layout.
BIPER_INLINE void fill_float_strip(const FloatConvPlan& plan, const Unit& unit, float* strip) {
  const int64_t channels = plan.in_channels;
  const int64_t row_values = plan.strip_w * channels;
  const int64_t first = unit.conv_first * plan.stride_h - plan.pad_top;
  const int64_t rows = (unit.conv_last - unit.conv_first - 1) * plan.stride_h +
                       (plan.kernel_h - 1) * plan.dilation_h + 1;
  const int64_t left = min64(plan.pad_left, plan.strip_w);
  const int64_t inside = min64(plan.width, plan.strip_w - left);
  const int64_t right = plan.strip_w - left - inside;
  const float* image = plan.x + unit.image * plan.height * plan.width * channels;
  for (int64_t r = 0; r < rows; ++r, strip += row_values) {
    const int64_t y = first + r;
    if (y < 0 || y >= plan.height) {
      __builtin_memset(strip, 0, static_cast<size_t>(row_values) * sizeof(float));
    } else if (plan.planar) {
      for (int64_t c = 0; c < channels; ++c) {
        pad_row(image + (c * plan.height + y) * plan.width, left, inside, right,
                strip + c * plan.strip_w);
      }
    } else {
      pad_row(image + y * plan.width * channels, left * channels, inside * channels,
              right * channels, strip);
    }
  }
}

BIPER_INLINE FloatStrip float_strip_of(const FloatConvPlan& plan, const Unit& unit, char* scratch) {
  FloatStrip strip;
  const int64_t channels = plan.in_channels;
  const int64_t row = (plan.direct ? plan.width : plan.strip_w) * channels;
  const int64_t pixel = plan.planar ? 1 : channels;
  const int64_t channel = plan.planar ? plan.strip_w : 1;
  if (plan.direct) {
    strip.values = plan.x + (unit.image * plan.height + unit.conv_first * plan.stride_h) * row;
  } else {
    float* values = reinterpret_cast<float*>(scratch + plan.scratch.strip);
    fill_float_strip(plan, unit, values);
    strip.values = values;
  }
  strip.row_step = plan.stride_h * row;
  strip.column_step = plan.stride_w * pixel;
  int32_t* offsets = reinterpret_cast<int32_t*>(scratch + plan.scratch.offsets);
  strip.offsets = offsets;
  for (int64_t ky = 0; ky < plan.kernel_h; ++ky) {
    for (int64_t kx = 0; kx < plan.kernel_w; ++kx) {
      for (int64_t c = 0; c < channels; ++c) {
        *offsets++ = static_cast<int32_t>(ky * plan.dilation_h * row +
                                          kx * plan.dilation_w * pixel + c * channel);
      }
    }
  }
  return strip;
}

// Fused multiply-adds in one chain; a longer sum is that of several chains, one after the other. A
// single chain of thousands would round more than is needed.
constexpr int64_t kChain = 256;

// Adds the products [first, last) of P windows with J vectors of weights to `sums`.
template <class I, int P, int J>
BIPER_INLINE void multiply_windows(const float* const* windows, const int32_t* offsets,
                                   int64_t first, int64_t last, const float* weights,
                                   int64_t weight_step, typename I::Float (&sums)[P * J]) {
  weights += first * weight_step;
  for (int64_t k = first; k < last; ++k, weights += weight_step) {
    const int64_t offset = offsets[k];
    typename I::Float w[J];
    BIPER_UNROLL
    for (int j = 0; j < J; ++j) w[j] = I::load(weights + j * I::kFloats);
    BIPER_UNROLL
    for (int p = 0; p < P; ++p) {
      const typename I::Float value = I::broadcast(windows[p][offset]);
      BIPER_UNROLL
      for (int j = 0; j < J; ++j) sums[p * J + j] = I::fma(value, w[j], sums[p * J + j]);
    }
  }
}

// The block at work: J vectors of outputs from `channel` on, `channels` of them wanted.
struct FloatBlock {
  int64_t channel, channels, lanes;
  const float *weights, *bias;
};

// Takes one vector of P pixels, `count` results of each from `channel` on, to the outputs; puts
// their bits into `masks` from bit `at` on. Pixels lie `step` vectors apart.
template <class I, bool kFull, int P>
BIPER_INLINE void finish_floats(const FloatConvPlan& plan, const typename I::Float* sums, int step,
                                int64_t first_pixel, int64_t channel, int64_t count, int64_t at,
                                uint64_t* masks) {
  const typename I::Float low = I::broadcast(plan.clamp_min), high = I::broadcast(plan.clamp_max);
  const typename I::Float threshold =
      plan.threshold ? load_channels<I, kFull>(plan.threshold, channel, count) : I::broadcast(0.0f);
  const uint32_t inverted = plan.sense ? get_bits(plan.sense, channel, count) : 0;
  BIPER_UNROLL
  for (int p = 0; p < P; ++p) {
    const typename I::Float v = I::at_most_or(I::at_least_or(sums[p * step], low), high);
    if (plan.out_float) {
      store_stream<I, kFull>(plan.out_float, FloatType::kFloat32,
                             (first_pixel + p) * plan.out_channels + channel, count, v);
    }
    masks[p] |= uint64_t{compare<I>(v, threshold, inverted) & low_bits(count)} << at;
  }
}

// Runs P pixels: into the ring at `keep`, where that is not null, else to the outputs.
template <class I, int P, int J>
static void float_tile(const FloatConvPlan& plan, const FloatBlock& block, const FloatStrip& strip,
                       const float* const* windows, int64_t first_pixel, float* keep) {
  typename I::Float sums[P * J];
  BIPER_UNROLL
  for (int j = 0; j < J; ++j) {
    const typename I::Float bias = I::load(block.bias + j * I::kFloats);
    BIPER_UNROLL
    for (int p = 0; p < P; ++p) sums[p * J + j] = bias;
  }
  multiply_windows<I, P, J>(windows, strip.offsets, 0, min64(plan.depth, kChain), block.weights,
                            block.lanes, sums);
  for (int64_t k = kChain; k < plan.depth; k += kChain) {
    typename I::Float chain[P * J];
    BIPER_UNROLL
    for (int i = 0; i < P * J; ++i) chain[i] = I::broadcast(0.0f);
    multiply_windows<I, P, J>(windows, strip.offsets, k, min64(k + kChain, plan.depth),
                              block.weights, block.lanes, chain);
    BIPER_UNROLL
    for (int i = 0; i < P * J; ++i) sums[i] = I::add(sums[i], chain[i]);
  }
  if (keep) {
    BIPER_UNROLL
    for (int i = 0; i < P * J; ++i) I::store(keep + i * I::kFloats, sums[i]);
    return;
  }
  static_assert(J * I::kFloats <= 64, "the bits of a block fit a mask");
  uint64_t masks[P] = {};
  BIPER_UNROLL
  for (int j = 0; j < J; ++j) {
    const int64_t at = j * I::kFloats, count = min64(block.channels - at, I::kFloats);
    const int64_t channel = block.channel + at;
    if (count == I::kFloats) {
      finish_floats<I, true, P>(plan, sums + j, J, first_pixel, channel, count, at, masks);
    } else {
      finish_floats<I, false, P>(plan, sums + j, J, first_pixel, channel, count, at, masks);
    }
  }
  for (int p = 0; plan.out_bits && p < P; ++p) {
    put_mask(plan.out_bits + (first_pixel + p) * plan.out_words, block.channel, masks[p],
             block.channels);
  }
}

template <class I, int P, int J>
BIPER_INLINE void float_tile_of(int64_t pixels, const FloatConvPlan& plan, const FloatBlock& block,
                                const FloatStrip& strip, const float* const* windows,
                                int64_t first_pixel, float* keep) {
  if (pixels == P) {
    float_tile<I, P, J>(plan, block, strip, windows, first_pixel, keep);
  } else if constexpr (P > 1) {
    float_tile_of<I, P - 1, J>(pixels, plan, block, strip, windows, first_pixel, keep);
  }
}

// Pixels of a tile of J vectors: with one, a processor that multiplies two vectors in a clock waits
// four clocks for each of fewer than eight sums.
template <class I, int J>
constexpr int float_pixels() {
  return J == 1 && I::kFloatPixels >= 6 ? 8 : I::kFloatPixels;
}

// Runs `rows` rows of the convolution from row `row` of the unit on, tile after tile of consecutive
// pixels.
template <class I, int J>
BIPER_INLINE void float_rows(const FloatConvPlan& plan, const FloatBlock& block,
                             const FloatStrip& strip, int64_t row, int64_t rows,
                             int64_t first_pixel, float* keep) {
  constexpr int kPixels = float_pixels<I, J>();
  const float* windows[kPixels];
  const int64_t total = rows * plan.conv_w;
  int64_t column = 0;
  for (int64_t pixel = 0; pixel < total; pixel += kPixels) {
    const int64_t pixels = min64(total - pixel, kPixels);
    for (int64_t p = 0; p < pixels; ++p) {
      windows[p] = strip.values + row * strip.row_step + column * strip.column_step;
      if (++column == plan.conv_w) column = 0, ++row;
    }
    float_tile_of<I, kPixels, J>(pixels, plan, block, strip, windows, first_pixel + pixel,
                                 keep ? keep + pixel * block.lanes : nullptr);
  }
}

// Rows of the convolution that wait for a pool: row r is in slot r % rows.
struct Ring {
  float* values;
  int64_t rows, row_step, step;  // `step` from one pixel to the next
};

// Takes the maximum over each window of one vector of outputs from the ring to row y of the
// outputs: first along the columns, into `maxima` [conv_w][kFloats].
template <class I, bool kFull>
BIPER_INLINE void pool_vector(const FloatConvPlan& plan, const Unit& unit, int64_t channel,
                              int64_t count, const Ring& ring, int64_t y, float* maxima) {
  using Float = typename I::Float;
  const Window& pool = plan.pool;
  const int64_t start = y * pool.stride_h - pool.pad_h;
  const int64_t first = max64(start, 0), last = min64(start + pool.kernel_h, plan.conv_h);
  const int64_t width = plan.conv_w, step = ring.step;
  const auto row = [&](int64_t r) {
    return ring.values + min64(r, last - 1) % ring.rows * ring.row_step;
  };
  for (int64_t r = first; r < last; r += 3) {
    const float *const one = row(r), *const two = row(r + 1), *const three = row(r + 2);
    for (int64_t x = 0; x < width; ++x) {
      Float best = I::at_least_or(I::load(one + x * step), I::load(two + x * step));
      best = I::at_least_or(best, I::load(three + x * step));
      float* const to = maxima + x * I::kFloats;
      I::store(to, r == first ? best : I::at_least_or(I::load(to), best));
    }
  }
  const Float low = I::broadcast(plan.clamp_min), high = I::broadcast(plan.clamp_max);
  const Float threshold =
      plan.threshold ? load_channels<I, kFull>(plan.threshold, channel, count) : I::broadcast(0.0f);
  const uint32_t inverted = plan.sense ? get_bits(plan.sense, channel, count) : 0;
  const int64_t pixel = (unit.image * plan.out_h + y) * plan.out_w;
  for (int64_t x = 0; x < plan.out_w; ++x) {
    const int64_t from = x * pool.stride_w - pool.pad_w;
    const int64_t left = max64(from, 0), right = min64(from + pool.kernel_w, plan.conv_w);
    Float best = I::load(maxima + left * I::kFloats);
    for (int64_t c = left + 1; c < right; ++c) {
      best = I::at_least_or(best, I::load(maxima + c * I::kFloats));
    }
    const Float v = I::at_most_or(I::at_least_or(best, low), high);
    if (plan.out_float) {
      store_stream<I, kFull>(plan.out_float, FloatType::kFloat32,
                             (pixel + x) * plan.out_channels + channel, count, v);
    }
    if (plan.out_bits) {
      put_bits(plan.out_bits + (pixel + x) * plan.out_words, channel,
               compare<I>(v, threshold, inverted) & low_bits(count), count);
    }
  }
}

template <class I>
static void pool_from_ring(const FloatConvPlan& plan, const Unit& unit, int64_t channel,
                           int64_t channels, const Ring& ring, int64_t y, float* maxima) {
  if (channels >= I::kFloats) {
    pool_vector<I, true>(plan, unit, channel, I::kFloats, ring, y, maxima);
  } else {
    pool_vector<I, false>(plan, unit, channel, channels, ring, y, maxima);
  }
}

template <class I, int J>
static void float_pooled_rows(const FloatConvPlan& plan, const Unit& unit, const FloatBlock& block,
                              const FloatStrip& strip, char* scratch) {
  const Window& pool = plan.pool;
  Ring ring{reinterpret_cast<float*>(scratch + plan.scratch.ring), ring_rows(plan),
            plan.conv_w * block.lanes, block.lanes};
  float* const values = ring.values;
  float* const maxima = reinterpret_cast<float*>(scratch + plan.scratch.maxima);
  int64_t done = unit.conv_first;  // rows of the convolution below this are in the ring
  for (int64_t y = unit.first_row; y < unit.last_row; ++y) {
    const int64_t start = y * pool.stride_h - pool.pad_h;
    const int64_t last = min64(start + pool.kernel_h, plan.conv_h);
    for (done = max64(done, start); done < last; ++done) {
      float_rows<I, J>(plan, block, strip, done - unit.conv_first, 1, 0,
                       values + done % ring.rows * ring.row_step);
    }
    for (int64_t at = 0; at < block.lanes; at += I::kFloats) {
      ring.values = values + at;
      pool_from_ring<I>(plan, unit, block.channel + at, block.channels - at, ring, y, maxima);
    }
  }
}

template <class I, int J = I::kFloatVectors>
BIPER_INLINE void float_block_of(int64_t vectors, const FloatConvPlan& plan, const Unit& unit,
                                 const FloatBlock& block, const FloatStrip& strip, char* scratch) {
  if (vectors == J) {
    if (plan.pooled) {
      float_pooled_rows<I, J>(plan, unit, block, strip, scratch);
    } else {
      float_rows<I, J>(plan, block, strip, 0, unit.last_row - unit.first_row,
                       (unit.image * plan.out_h + unit.first_row) * plan.out_w, nullptr);
    }
  } else if constexpr (J > 1) {
    float_block_of<I, J - 1>(vectors, plan, unit, block, strip, scratch);
  }
}

template <class I>
BIPER_INLINE FloatBlock float_block(const FloatConvPlan& plan, int64_t index) {
  constexpr int64_t kLanes = int64_t{I::kFloatVectors} * I::kFloats;
  FloatBlock block;
  block.channel = index * kLanes;
  block.channels = min64(plan.out_channels - block.channel, kLanes);
  block.lanes = (block.channels + I::kFloats - 1) / I::kFloats * I::kFloats;
  block.weights = plan.weights + block.channel * plan.depth;
  block.bias = plan.bias + block.channel;
  return block;
}

// Runs a unit by winograd.h: the tiles of three rows, one vector of outputs after the other, and
// what the pool makes of each while its rows are in the first cache.
template <class I>
static void winograd_unit(const FloatConvPlan& plan, const Unit& unit, char* scratch) {
  const auto at = [scratch](int64_t offset) { return reinterpret_cast<float*>(scratch + offset); };
  const Window& pool = plan.pool;
  const int64_t first = unit.conv_first / kTileRows * kTileRows;
  const int64_t top = kStride * first - plan.pad_top;
  WinogradRows input{at(plan.scratch.strip), at(plan.scratch.planes), at(plan.scratch.row), top,
                     top};
  Ring ring{nullptr, ring_rows(plan), plan.tiles * kTile * I::kFloats, I::kFloats};
  const int64_t channel = float_block<I>(plan, unit.first_block).channel;
  const FloatBlock tail = float_block<I>(plan, unit.last_block - 1);
  int64_t row = first;
  for (int64_t y = unit.first_row, ready = y; y < unit.last_row; y = ready, row += kTileRows) {
    row = max64(row, (y * pool.stride_h - pool.pad_h) / kTileRows * kTileRows);
    const int64_t done = min64(row + kTileRows, plan.conv_h);
    while (ready < unit.last_row &&
           min64(ready * pool.stride_h - pool.pad_h + pool.kernel_h, plan.conv_h) <= done) {
      ++ready;
    }
    evaluate_tiles<I>(plan, plan.x + unit.image * plan.height * plan.width * plan.in_channels, row,
                      input);
    ring.values = at(plan.scratch.ring);
    for (int64_t c = channel; c < tail.channel + tail.channels; c += I::kFloats) {
      float* const rows = ring.values + row % ring.rows * ring.row_step;
      winograd_rows<I>(plan, input.planes, plan.weights + c * plan.depth,
                       {{rows, rows + ring.row_step, rows + 2 * ring.row_step}, plan.bias + c});
      for (int64_t r = y; r < ready; ++r) {
        pool_from_ring<I>(plan, unit, c, plan.out_channels - c, ring, r, at(plan.scratch.maxima));
      }
      ring.values += ring.rows * ring.row_step;
    }
  }
}

template <class I>
static void float_conv_unit(const FloatConvPlan& plan, int64_t index, void* scratch_memory) {
  char* scratch = static_cast<char*>(scratch_memory);
  const Unit unit = unit_of(plan, index, plan.blocks);
  if (plan.winograd) return winograd_unit<I>(plan, unit, scratch);
  const FloatStrip strip = float_strip_of(plan, unit, scratch);
  for (int64_t b = unit.first_block; b < unit.last_block; ++b) {
    const FloatBlock block = float_block<I>(plan, b);
    float_block_of<I>(block.lanes / I::kFloats, plan, unit, block, strip, scratch);
  }
}

}  // namespace biper
