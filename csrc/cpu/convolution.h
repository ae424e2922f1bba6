// The convolution: strips of input, tiles of accumulators, blocks of output channels.
//
// Per unit of work (a strip of output rows of one image, some blocks of output channels) the input
// rows of a group are copied into a strip: aligned to words, unused bits cleared, padding as zero
// words. A tile of P pixels x J vectors of output channels then counts popc(a ^ w) over the
// receptive field, `depth` words, in registers. A padded tap reads a = 0 and adds popc(w), so with
// V the valid taps of the pixel and C the channels of a group
//
//     dot = |V| * C - 2 * popc(a ^ w over V) = border - 2 * popc(a ^ w over all taps),
//     border = |V| * C + 2 * popc(w over the padded taps),
//
// an integer that depends on the output channel and on the border class of the pixel alone: on the
// ranges of kernel rows and kernel columns that lie inside the image.
#pragma once

#include "strips.h"

namespace biper {

// Counts words [first, last) of P windows against J vectors; `weights` are those of the first word.
template <class I, int P, int J>
BIPER_INLINE void count_words(const uint32_t* const* windows, const int32_t* offsets, int64_t first,
                              int64_t last, const uint32_t* weights,
                              typename I::Sum (&sums)[P * J]) {
  BIPER_UNROLL
  for (int i = 0; i < P * J; ++i) sums[i] = I::zero();
  for (int64_t k = first; k < last; ++k) {
    const int64_t offset = offsets[k];
    BIPER_UNROLL
    for (int part = 0; part < I::kParts; ++part) {
      typename I::Weights w[J];
      BIPER_UNROLL
      for (int j = 0; j < J; ++j) w[j] = I::load_weights(weights + j * I::kPartWords);
      weights += J * I::kPartWords;
      BIPER_UNROLL
      for (int p = 0; p < P; ++p) {
        const typename I::Word word = I::spread(windows[p] + offset, part);
        BIPER_UNROLL
        for (int j = 0; j < J; ++j) sums[p * J + j] = I::count(sums[p * J + j], word, w[j]);
      }
    }
  }
}

// Counts P windows against J vectors: dots[p][J * kLanes] = border - 2 * popc(a ^ w).
template <class I, int P, int J>
static void tile(const uint32_t* const* windows, const int32_t* const* borders,
                 const int32_t* offsets, int64_t depth, const uint32_t* weights, int32_t* dots) {
  typename I::Sum sums[P * J];
  const int64_t chunk = I::kWordsPerSum == 0 ? depth : min64(depth, I::kWordsPerSum);
  count_words<I, P, J>(windows, offsets, 0, chunk, weights, sums);
  BIPER_UNROLL
  for (int p = 0; p < P; ++p) {
    BIPER_UNROLL
    for (int j = 0; j < J; ++j) {
      I::subtract_twice(dots + (p * J + j) * I::kLanes, borders[p] + j * I::kLanes,
                        sums[p * J + j]);
    }
  }
  if constexpr (I::kWordsPerSum != 0) {
    for (int64_t k = chunk; k < depth; k += I::kWordsPerSum) {
      weights += I::kWordsPerSum * I::kParts * J * I::kPartWords;
      count_words<I, P, J>(windows, offsets, k, min64(k + I::kWordsPerSum, depth), weights, sums);
      BIPER_UNROLL
      for (int i = 0; i < P * J; ++i) {
        int32_t* to = dots + i * I::kLanes;
        I::subtract_twice(to, to, sums[i]);
      }
    }
  }
}

// Output pixels in the largest tile of J vectors: their pointers want to stay in registers, too.
template <class I, int J>
constexpr int tile_pixels() {
  constexpr int kFit = I::kAccumulators / J;
  return kFit < 1 ? 1 : kFit > kMostPixels ? static_cast<int>(kMostPixels) : kFit;
}

// Runs the tile of `pixels` <= P pixels.
template <class I, int P, int J>
BIPER_INLINE void tile_of(int64_t pixels, const uint32_t* const* windows,
                          const int32_t* const* borders, const Strip& strip, int64_t depth,
                          const uint32_t* weights, int32_t* dots) {
  if (pixels == P) {
    tile<I, P, J>(windows, borders, strip.offsets, depth, weights, dots);
  } else if constexpr (P > 1) {
    tile_of<I, P - 1, J>(pixels, windows, borders, strip, depth, weights, dots);
  }
}

// What the tiles of a block with a plain epilogue share.
template <class I, int J>
struct PlainBlock {
  PlainChannels<I> constants[J];
  int64_t residual_channel[J];
};

template <class I, int J>
BIPER_INLINE PlainBlock<I, J> plain_block(const ConvPlan& plan, int64_t channel) {
  PlainBlock<I, J> made;
  for (int j = 0; j < J; ++j, channel += I::kLanes) {
    made.constants[j] = plain_channels<I>(plan.epilogue, channel);
    made.residual_channel[j] = residual_at(plan, 0, channel);
  }
  return made;
}

// Counts P windows against J whole vectors and takes them through a plain epilogue without leaving
// the registers.
template <class I, int P, int J, bool kClamped>
static void plain_tile(const ConvPlan& plan, const uint32_t* const* windows,
                       const int32_t* const* borders, const Strip& strip, const Block& block,
                       const PlainBlock<I, J>& plain, int64_t first_pixel) {
  typename I::Sum sums[P * J];
  count_words<I, P, J>(windows, strip.offsets, 0, plan.depth, block.weights, sums);
  TileGates gates;
  if constexpr (!kClamped) gates = gates_of(plan, first_pixel, P);
  const int64_t outputs = plan.geometry.out_channels;
  const float* added = static_cast<const float*>(plan.residual);
  if (added) added += first_pixel * plan.residual_channels;
  float* floats = static_cast<float*>(plan.out_float);
  if (floats) floats += first_pixel * outputs + block.channel;
  uint64_t masks[P] = {};
  BIPER_UNROLL
  for (int j = 0; j < J; ++j) {
    const PlainChannels<I> constants = plain.constants[j];
    const float* residual = added ? added + plain.residual_channel[j] : nullptr;
    float* out = floats ? floats + j * I::kLanes : nullptr;
    BIPER_UNROLL
    for (int p = 0; p < P; ++p) {
      const typename I::Float dot = I::float_dots(borders[p] + j * I::kLanes, sums[p * J + j]);
      const uint64_t bits =
          finish_plain<I, kClamped>(plan, constants, dot, kClamped ? nullptr : gates.of_pixel[p],
                                    block.channel + j * I::kLanes, residual, out);
      masks[p] |= bits << (j * I::kLanes);
      if (residual) residual += plan.residual_channels;
      if (out) out += outputs;
    }
  }
  if (plan.out_bits) {
    uint32_t* words = plan.out_bits + first_pixel * plan.out_words;
    BIPER_UNROLL
    for (int p = 0; p < P; ++p) {
      put_mask(words + p * plan.out_words, block.channel, masks[p], J * I::kLanes);
    }
  }
}

// Counts the set bits that a window sees; padding has none.
BIPER_INLINE int32_t set_bits(const ConvPlan& plan, const Strip& strip, const uint32_t* window) {
  int32_t bits = 0;
  for (int64_t k = 0; k < plan.depth; ++k) bits += __builtin_popcount(window[strip.offsets[k]]);
  return bits;
}

// Computes the rows [first, last) of a unit, counted from its conv_first, tile after tile of
// consecutive pixels: where `keep`, into accumulators [rows][conv_w][lanes] at `dots`; else each
// tile goes to the outputs, from pixel `first_pixel` on.
template <class I, int J>
BIPER_INLINE void compute_rows(const ConvPlan& plan, const Strip& strip, const Block& block,
                               int64_t first, int64_t last, bool keep, int64_t first_pixel,
                               int32_t* dots) {
  constexpr int kPixels = tile_pixels<I, J>();
  constexpr int64_t kBlockLanes = J * I::kLanes;  // of the block, too
  const uint32_t* windows[kPixels];
  const int32_t* borders[kPixels + 1];
  int32_t sums[kPixels], valid[kPixels];
  const bool summed = !keep && has_sums(plan.epilogue);
  const int64_t total = (last - first) * plan.conv_w;
  int64_t pixel = 0;
  Place place{first, 0};
  if constexpr (I::kSumsFitFloats) {
    if (!keep && is_plain(plan) && block.channels == block.lanes) {
      const auto run =
          is_clamped(plan) ? &plain_tile<I, kPixels, J, true> : &plain_tile<I, kPixels, J, false>;
      const PlainBlock<I, J> shared = plain_block<I, J>(plan, block.channel);
      for (; pixel + kPixels <= total; pixel += kPixels) {
        find_tile<kPixels, kBlockLanes>(plan, strip, block, place, windows, borders);
        run(plan, windows, borders, strip, block, shared, first_pixel + pixel);
      }
    }
  }
  for (; pixel < total; pixel += kPixels) {
    const int64_t pixels = min64(total - pixel, kPixels);
    const Place tile_place = place;
    find_windows<kBlockLanes>(plan, strip, block, place, pixels, windows, borders);
    for (int64_t p = 0; summed && p < pixels; ++p) {
      const int64_t border_class = (borders[p] - block.borders) / kBlockLanes;
      const Border r = strip.rows[border_class / strip.column_classes];
      const Border c = strip.columns[border_class % strip.column_classes];
      const int64_t taps = int64_t{r.last - r.first} * (c.last - c.first);
      valid[p] = static_cast<int32_t>(taps * plan.group_channels);
      sums[p] = plan.epilogue.window ? 2 * set_bits(plan, strip, windows[p]) - valid[p] : 0;
    }
    int32_t* to = keep ? dots + pixel * block.lanes : dots;
    if constexpr (I::kPairs) {
      static_assert(kPixels % 2 == 0, "a tile is whole pairs");
      if (strip.pairs) {
        const uint16_t* pairs[kPixels / 2];
        find_pairs(plan, strip, tile_place, pixel, pixels, pairs);
        borders[pixels] = borders[pixels - 1];  // where the last pair has one pixel
        pair_tile_of<I, kPixels / 2, J>((pixels + 1) / 2, pairs, borders, strip.pair_offsets,
                                        plan.depth, plan.group_channels <= 16, block.weights, to);
      } else {
        tile_of<I, kPixels, J>(pixels, windows, borders, strip, plan.depth, block.weights, to);
      }
    } else {
      tile_of<I, kPixels, J>(pixels, windows, borders, strip, plan.depth, block.weights, to);
    }
    if (!keep) {
      finish<I>(plan, {to, block.lanes, first_pixel + pixel, pixels, block.channel, block.channels,
                       borders, sums, valid});
    }
  }
}

// Pools accumulators [rows][conv_w][lanes], the rows of one row of windows, into [out_w][lanes].
// Padding never wins: it is skipped.
BIPER_INLINE void pool_row(const ConvPlan& plan, const Block& block, const int32_t* dots,
                           int64_t rows, int32_t* pooled) {
  const Window& pool = plan.pool;
  const int32_t* signs =
      plan.epilogue.pool_sign ? plan.epilogue.pool_sign + block.channel : nullptr;
  for (int64_t x = 0; x < plan.out_w; ++x, pooled += block.lanes) {
    const int64_t start = x * pool.stride_w - pool.pad_w;
    const int64_t first = max64(start, 0), last = min64(start + pool.kernel_w, plan.conv_w);
    for (int64_t l = 0; l < block.channels; ++l) pooled[l] = INT32_MIN;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = first; c < last; ++c) {
        const int32_t* from = dots + (r * plan.conv_w + c) * block.lanes;
        for (int64_t l = 0; l < block.channels; ++l) {
          const int32_t dot = signs ? signs[l] * from[l] : from[l];
          pooled[l] = dot > pooled[l] ? dot : pooled[l];
        }
      }
    }
    if (signs) {
      for (int64_t l = 0; l < block.channels; ++l) pooled[l] *= signs[l];
    }
  }
}

template <class I, int J>
static void conv_block(const ConvPlan& plan, const Unit& unit, const Strip& strip,
                       const Block& block, char* scratch) {
  int32_t* const dots = reinterpret_cast<int32_t*>(scratch + plan.scratch.dots);
  const int64_t image_row = unit.image * plan.out_h;
  if (!plan.pooled) {
    compute_rows<I, J>(plan, strip, block, 0, unit.last_row - unit.first_row, false,
                       (image_row + unit.first_row) * plan.out_w, dots);
    return;
  }
  const Window& pool = plan.pool;
  int32_t* pooled = reinterpret_cast<int32_t*>(scratch + plan.scratch.pooled);
  for (int64_t y = unit.first_row; y < unit.last_row; ++y) {
    const int64_t start = y * pool.stride_h - pool.pad_h;
    const int64_t first = max64(start, 0), last = min64(start + pool.kernel_h, plan.conv_h);
    compute_rows<I, J>(plan, strip, block, first - unit.conv_first, last - unit.conv_first, true, 0,
                       dots);
    pool_row(plan, block, dots, last - first, pooled);
    for (int64_t x = 0; x < plan.out_w; x += kMostPixels) {
      finish<I>(plan, {pooled + x * block.lanes, block.lanes, (image_row + y) * plan.out_w + x,
                       min64(plan.out_w - x, kMostPixels), block.channel, block.channels});
    }
  }
}

// Runs the block of `vectors` <= J vectors.
template <class I, int J = I::kVectors>
BIPER_INLINE void conv_block_of(int64_t vectors, const ConvPlan& plan, const Unit& unit,
                                const Strip& strip, const Block& block, char* scratch) {
  if (vectors == J) {
    conv_block<I, J>(plan, unit, strip, block, scratch);
  } else if constexpr (J > 1) {
    conv_block_of<I, J - 1>(vectors, plan, unit, strip, block, scratch);
  }
}

template <class I>
static void conv_unit(const ConvPlan& plan, int64_t index, void* scratch_memory) {
  static_assert(I::kLanes * I::kVectors % kWordBits == 0, "a chunk owns whole words of bits");
  static_assert(I::kLanes % I::kFloats == 0, "a vector of sums is whole vectors of floats");
  char* scratch = static_cast<char*>(scratch_memory);
  const Unit unit = unit_of(plan, index, plan.geometry.groups * plan.group_blocks);
  const Strip strip = strip_of(plan, unit, scratch);
  int32_t* borders = reinterpret_cast<int32_t*>(scratch + plan.scratch.borders);
  int64_t filled_group = -1;
  for (int64_t b = unit.first_block; b < unit.last_block; ++b) {
    const int64_t group = b / plan.group_blocks;
    const int64_t first_vector = b % plan.group_blocks * I::kVectors;
    const int64_t vectors = min64(plan.group_vectors - first_vector, I::kVectors);
    if (group != filled_group && !plan.direct) {
      uint32_t* const words = reinterpret_cast<uint32_t*>(scratch + plan.scratch.strip);
      fill_strip(plan, unit, group, words);
      if (plan.fold > 1) {
        fold_taps(plan, unit, words, reinterpret_cast<uint32_t*>(scratch + plan.scratch.folded));
      }
    }
    if constexpr (I::kPairs) {
      if (plan.paired && group != filled_group) {
        fill_pairs<I>(plan, unit, strip, reinterpret_cast<uint16_t*>(scratch + plan.scratch.pairs));
      }
    }
    filled_group = group;
    const int64_t vector = group * plan.group_vectors + first_vector;
    Block block;
    block.channel = group * plan.group_outputs + first_vector * I::kLanes;
    block.channels = min64(plan.group_outputs - first_vector * I::kLanes, vectors * I::kLanes);
    block.lanes = vectors * I::kLanes;
    block.weights = plan.weights + vector * plan.depth * I::kParts * I::kPartWords;
    block.tap_counts = plan.tap_counts + vector * I::kLanes;
    block.borders = borders;
    fill_borders<I>(plan, strip, block, borders);
    conv_block_of<I>(vectors, plan, unit, strip, block, scratch);
  }
}

}  // namespace biper
