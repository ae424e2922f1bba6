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

#include "epilogue.h"
#include "pairs.h"

namespace biper {

// One group of a unit: where windows find their input and their border class.
struct Strip {
  const uint32_t* words;        // first pixel of the first window
  int64_t row_words;            // from one input row to the next
  const int32_t* offsets;       // [depth] from a window's first word to each of its words
  const int32_t* row_class;     // [conv_last - conv_first]
  const int32_t* column_class;  // [conv_w]
  const Border *rows, *columns;
  int32_t row_classes, column_classes;
  const uint16_t* pairs;        // of the first window and the next, or null
  const int32_t* pair_offsets;  // [depth] words from the first of a window in `pairs`
};

// The block at work: up to kVectors vectors of output channels of one group.
struct Block {
  int64_t channel, channels;  // first output channel, and how many there are
  int64_t lanes;              // channels rounded up to whole vectors
  const uint32_t* weights;
  const int32_t* tap_counts;  // of its first lane
  const int32_t* borders;     // [row class][column class][lanes]
};

// Kernel positions [first, last) of [0, kernel) whose tap start + position * dilation is in
// [0, size).
BIPER_INLINE Border border_of(int64_t start, int64_t size, int64_t kernel, int64_t dilation) {
  if (start >= 0 && start + (kernel - 1) * dilation < size) {  // without divisions, most of them
    return {0, static_cast<int32_t>(kernel)};
  }
  const int64_t first = start < 0 ? (-start + dilation - 1) / dilation : 0;
  const int64_t last = start < size ? (size - start + dilation - 1) / dilation : 0;
  Border border;
  border.last = static_cast<int32_t>(min64(last, kernel));
  border.first = static_cast<int32_t>(min64(first, border.last));
  return border;
}

// Fills the class of every output position of [first, last) along one axis; returns their number.
// Both ends of a border fall as the position rises, so equal borders are neighbours and there are
// at most 2 * kernel + 1 of them.
BIPER_INLINE int32_t classify(int64_t first, int64_t last, int64_t stride, int64_t pad,
                              int64_t size, int64_t kernel, int64_t dilation, int32_t* class_of,
                              Border* borders) {
  int32_t classes = 0;
  for (int64_t at = first; at < last; ++at) {
    const Border border = border_of(at * stride - pad, size, kernel, dilation);
    const bool same = classes > 0 && borders[classes - 1].first == border.first &&
                      borders[classes - 1].last == border.last;
    if (!same) borders[classes++] = border;
    class_of[at - first] = classes - 1;
  }
  return classes;
}

// Copies one group's words of `pixels` pixels, aligned to words and with unused bits cleared.
BIPER_INLINE void copy_group(const ConvPlan& plan, const uint32_t* from, int64_t pixels,
                             int64_t group, uint32_t* to) {
  const int64_t words = plan.group_words, channels = plan.group_channels;
  const int64_t first = group * channels;
  if (plan.geometry.groups == 1) {
    __builtin_memcpy(to, from, static_cast<size_t>(pixels * words) * sizeof(uint32_t));
    const uint32_t used = low_bits(channels - (words - 1) * kWordBits);
    if (used != ~0u) {
      for (int64_t p = 0; p < pixels; ++p) to[p * words + words - 1] &= used;
    }
    return;
  }
  for (int64_t p = 0; p < pixels; ++p, from += plan.in_words, to += words) {
    for (int64_t w = 0; w < words; ++w) {
      const int64_t count = min64(channels - w * kWordBits, kWordBits);
      to[w] = get_bits(from, first + w * kWordBits, count);
    }
  }
}

// Rows of the input that a unit's windows see.
BIPER_INLINE int64_t strip_rows(const ConvPlan& plan, const Unit& unit) {
  const ConvGeometry& g = plan.geometry;
  return (unit.conv_last - unit.conv_first - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1;
}

// Copies the input rows that a unit's windows see, padding as zeros.
BIPER_INLINE void fill_strip(const ConvPlan& plan, const Unit& unit, int64_t group,
                             uint32_t* strip) {
  const ConvGeometry& g = plan.geometry;
  const int64_t words = plan.group_words, row_words = plan.strip_w * words;
  const int64_t first = unit.conv_first * g.stride_h - g.pad_top;
  const int64_t rows = strip_rows(plan, unit);
  const int64_t left = min64(g.pad_left, plan.strip_w);
  const int64_t inside = min64(plan.width, plan.strip_w - left);
  const uint32_t* image = plan.bits + unit.image * plan.height * plan.width * plan.in_words;
  for (int64_t r = 0; r < rows; ++r, strip += row_words) {
    const int64_t y = first + r;
    if (y < 0 || y >= plan.height) {
      __builtin_memset(strip, 0, static_cast<size_t>(row_words) * sizeof(uint32_t));
      continue;
    }
    __builtin_memset(strip, 0, static_cast<size_t>(left * words) * sizeof(uint32_t));
    copy_group(plan, image + y * plan.width * plan.in_words, inside, group, strip + left * words);
    const int64_t filled = (left + inside) * words;
    __builtin_memset(strip + filled, 0, static_cast<size_t>(row_words - filled) * sizeof(uint32_t));
  }
}

// Lays out the strip of few channels once for each word of a window: the word at a place has the
// taps, one above the other, that a window which begins there has in it.
BIPER_INLINE void fold_taps(const ConvPlan& plan, const Unit& unit, const uint32_t* strip,
                            uint32_t* folded) {
  const ConvGeometry& g = plan.geometry;
  const int64_t words = strip_rows(plan, unit) * plan.strip_w;
  const int64_t reach =
      (g.kernel_h - 1) * g.dilation_h * plan.strip_w + (g.kernel_w - 1) * g.dilation_w;
  const int64_t places = words - reach, taps = g.kernel_h * g.kernel_w;
  const auto tap = [&](int64_t t) {
    return strip + t / g.kernel_w * g.dilation_h * plan.strip_w + t % g.kernel_w * g.dilation_w;
  };
  for (int64_t t = 0; t < taps; folded += words) {
    const uint32_t* from = tap(t++);
    if (t == taps) {
      __builtin_memcpy(folded, from, static_cast<size_t>(places) * sizeof(uint32_t));
    }
    for (int64_t n = 1; n < plan.fold && t < taps; ++n, from = folded) {
      const uint32_t* const next = tap(t++);
      BIPER_INDEPENDENT
      for (int64_t i = 0; i < places; ++i) {
        folded[i] = from[i] | next[i] << n * plan.group_channels;
      }
    }
  }
}

// Writes the pairs of a unit's windows; conv.cpp says where they lie.
template <class I>
BIPER_INLINE void fill_pairs(const ConvPlan& plan, const Unit& unit, const Strip& strip,
                             uint16_t* to) {
  const ConvGeometry& g = plan.geometry;
  const int64_t words = plan.group_words, step = g.stride_w * words;
  const int64_t row_step = g.stride_h * strip.row_words;
  if (plan.pointwise) {
    const int64_t total = (unit.conv_last - unit.conv_first) * plan.conv_w;
    const uint32_t* at = strip.words;
    int64_t row = 0, column = 0;
    for (int64_t pixel = 0; pixel < total; pixel += 2, to += words * kWordParts) {
      const uint32_t* windows[2] = {at, at};
      for (int p = 0; p < 2 && pixel + p < total; ++p) {
        windows[p] = strip.words + row * row_step + column * step;
        if (++column == plan.conv_w) column = 0, ++row;
      }
      if (pixel + 1 == total) windows[1] = windows[0];
      I::pair_words(windows[0], windows[1], words, to);
    }
    return;
  }
  const int64_t rows = strip_rows(plan, unit);
  const int64_t paired = max64(plan.strip_w - g.stride_w, 0) * words;
  const int64_t alone = plan.strip_w * words - paired;
  const int64_t beyond = (plan.pair_w - plan.strip_w) * words;
  for (int64_t r = 0; r < rows; ++r, to += plan.pair_w * words * kWordParts) {
    const uint32_t* from = strip.words + r * strip.row_words;
    I::pair_words(from, from + step, paired, to);
    I::pair_words(from + paired, from + paired, alone, to + paired * kWordParts);
    const uint32_t* last = from + (plan.conv_w - 1) * step;
    const uint32_t* next = r + g.stride_h < rows ? from + row_step : last;
    I::pair_words(last, next, beyond, to + (paired + alone) * kWordParts);
  }
}

// Fills borders[row class][column class][lanes] of a block.
template <class I>
BIPER_INLINE void fill_borders(const ConvPlan& plan, const Strip& strip, const Block& block,
                               int32_t* border) {
  const ConvGeometry& g = plan.geometry;
  for (int32_t r = 0; r < strip.row_classes; ++r) {
    for (int32_t c = 0; c < strip.column_classes; ++c, border += block.lanes) {
      const Border rows = strip.rows[r], columns = strip.columns[c];
      const int64_t taps =
          static_cast<int64_t>(rows.last - rows.first) * (columns.last - columns.first);
      const int32_t valid = static_cast<int32_t>(taps * plan.group_channels);
      for (int64_t l = 0; l < block.lanes; ++l) border[l] = valid;
      for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
        for (int64_t kx = 0; kx < g.kernel_w; ++kx) {
          if (ky >= rows.first && ky < rows.last && kx >= columns.first && kx < columns.last) {
            continue;
          }
          const int32_t* counts = block.tap_counts + (ky * g.kernel_w + kx) * plan.tap_lanes;
          for (int64_t first = 0; first < block.lanes; first += I::kLanes) {
            for (int l = 0; l < I::kLanes; ++l) border[first + l] += 2 * counts[first + l];
          }
        }
      }
    }
  }
}

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

// The next output pixel of a unit.
struct Place {
  int64_t row, column;
};

// Finds the windows and borders of the next `pixels` output pixels, row after row.
template <int64_t kBlockLanes>
BIPER_INLINE void find_windows(const ConvPlan& plan, const Strip& strip, const Block& block,
                               Place& place, int64_t pixels, const uint32_t** windows,
                               const int32_t** borders) {
  const int64_t step = plan.geometry.stride_w * plan.group_words;
  const int64_t row_step = plan.geometry.stride_h * strip.row_words;
  for (int64_t p = 0; p < pixels;) {
    const uint32_t* window = strip.words + place.row * row_step + place.column * step;
    const int32_t* const row_borders =
        block.borders + strip.row_class[place.row] * strip.column_classes * kBlockLanes;
    const int32_t* const column_class = strip.column_class + place.column - p;
    const int64_t end = min64(pixels, p + plan.conv_w - place.column);
    place.column += end - p;
    for (; p < end; ++p, window += step) {
      asm volatile("");  // or the compiler makes vectors of so few, whose parts are loaded late
      windows[p] = window;
      borders[p] = row_borders + column_class[p] * kBlockLanes;
    }
    if (place.column == plan.conv_w) place = {place.row + 1, 0};
  }
}

// Finds where the pairs of the next `pixels` outputs of a unit begin, the first of which is its
// number `pixel`.
BIPER_INLINE void find_pairs(const ConvPlan& plan, const Strip& strip, Place place, int64_t pixel,
                             int64_t pixels, const uint16_t** pairs) {
  const ConvGeometry& g = plan.geometry;
  const int64_t step = plan.group_words * kWordParts;
  for (int64_t p = 0; p < pixels; p += 2) {
    int64_t pair = (pixel + p) / 2;
    if (!plan.pointwise) {
      pair = place.row * g.stride_h * plan.pair_w;
      pair += place.column + 1 < plan.conv_w ? place.column * g.stride_w : plan.strip_w;
    }
    pairs[p / 2] = strip.pairs + pair * step;
    for (place.column += 2; place.column >= plan.conv_w; ++place.row) place.column -= plan.conv_w;
  }
}

// The same for P pixels, which mostly lie in one row.
template <int P, int64_t kBlockLanes>
BIPER_INLINE void find_tile(const ConvPlan& plan, const Strip& strip, const Block& block,
                            Place& place, const uint32_t** windows, const int32_t** borders) {
  const int64_t column = place.column;
  if (column + P > plan.conv_w) {
    return find_windows<kBlockLanes>(plan, strip, block, place, P, windows, borders);
  }
  const int64_t step = plan.geometry.stride_w * plan.group_words;
  const uint32_t* window =
      strip.words + place.row * plan.geometry.stride_h * strip.row_words + column * step;
  const int32_t* const row_borders =
      block.borders + strip.row_class[place.row] * strip.column_classes * kBlockLanes;
  BIPER_UNROLL
  for (int p = 0; p < P; ++p, window += step) {
    asm volatile("");  // as above
    windows[p] = window;
    borders[p] = row_borders + strip.column_class[column + p] * kBlockLanes;
  }
  place.column += P;
  if (place.column == plan.conv_w) place = {place.row + 1, 0};
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

// Fills offsets [depth] from a window's first word to each of its words.
BIPER_INLINE void fill_offsets(const ConvGeometry& g, int64_t row_words, int64_t words,
                               int32_t* offsets) {
  for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
    for (int64_t kx = 0; kx < g.kernel_w; ++kx) {
      const int64_t tap = ky * g.dilation_h * row_words + kx * g.dilation_w * words;
      for (int64_t w = 0; w < words; ++w) *offsets++ = static_cast<int32_t>(tap + w);
    }
  }
}

// Prepares what the groups of a unit share: offsets and border classes.
BIPER_INLINE Strip strip_of(const ConvPlan& plan, const Unit& unit, char* scratch) {
  const ConvGeometry& g = plan.geometry;
  int32_t* offsets = reinterpret_cast<int32_t*>(scratch + plan.scratch.offsets);
  int32_t* row_class = reinterpret_cast<int32_t*>(scratch + plan.scratch.row_class);
  int32_t* column_class = reinterpret_cast<int32_t*>(scratch + plan.scratch.column_class);
  Border* rows = reinterpret_cast<Border*>(scratch + plan.scratch.rows);
  Border* columns = reinterpret_cast<Border*>(scratch + plan.scratch.columns);
  Strip strip;
  strip.row_words = plan.strip_w * plan.group_words;
  strip.words = reinterpret_cast<uint32_t*>(scratch + plan.scratch.strip);
  if (plan.direct) {
    strip.row_words = plan.width * plan.group_words;
    strip.words =
        plan.bits + (unit.image * plan.height + unit.conv_first * g.stride_h) * strip.row_words;
  }
  if (plan.fold > 1) {
    const int64_t words = strip_rows(plan, unit) * plan.strip_w;
    strip.words = reinterpret_cast<uint32_t*>(scratch + plan.scratch.folded);
    for (int64_t k = 0; k < plan.depth; ++k) offsets[k] = static_cast<int32_t>(k * words);
  } else {
    fill_offsets(g, strip.row_words, plan.group_words, offsets);
  }
  strip.row_classes = classify(unit.conv_first, unit.conv_last, g.stride_h, g.pad_top, plan.height,
                               g.kernel_h, g.dilation_h, row_class, rows);
  strip.column_classes = classify(0, plan.conv_w, g.stride_w, g.pad_left, plan.width, g.kernel_w,
                                  g.dilation_w, column_class, columns);
  strip.pairs = nullptr;
  if (plan.paired) {
    int32_t* pair_offsets = reinterpret_cast<int32_t*>(scratch + plan.scratch.pair_offsets);
    const int64_t row_words = plan.pair_w * plan.group_words;
    fill_offsets(g, row_words, plan.group_words, pair_offsets);
    strip.pairs = reinterpret_cast<const uint16_t*>(scratch + plan.scratch.pairs);
    strip.pair_offsets = pair_offsets;
  }
  strip.offsets = offsets;
  strip.row_class = row_class;
  strip.column_class = column_class;
  strip.rows = rows;
  strip.columns = columns;
  return strip;
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
