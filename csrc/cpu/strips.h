// Strips of input, and where the windows of a unit's output pixels lie in them; see convolution.h.
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

}  // namespace biper
