// Products of two packed maps: the tiles of the convolution, with b in the place of its weights.
//
// A unit is a strip of pixels of `a` against all pixels of `b`, for one row of pixels and one group
// of channels. Both are copied to scratch, aligned to words, and b is re-laid as weights are. With
// x = popc(a ^ b), pa = popc(a), pb = popc(b) and K elements,
//
//     -1 and 1 in both:           K - 2 * x
//     0 and 1 in a, -1, 1 in b:   pb - x               = (2 * pb - 2 * x) / 2
//     -1 and 1 in a, 0, 1 in b:   pa - x               = (2 * pa - 2 * x) / 2
//     0 and 1 in both:            (pa + pb - x) / 2    = (2 * pa + 2 * pb - 2 * x) / 4
//
// so that a tile with the right borders, the term of the row and a shift give the sum, exactly.
#pragma once

#include "convolution.h"

namespace biper {

struct MatmulUnit {
  int64_t matrix, group, first, last;  // pixels of a
};

BIPER_INLINE MatmulUnit matmul_unit_of(const MatmulPlan& plan, int64_t index) {
  const int64_t product = index / plan.strips, first = index % plan.strips * plan.strip;
  return {product / plan.groups, product % plan.groups, first,
          min64(first + plan.strip, plan.a_pixels)};
}

// Copies a group of `pixels` pixels; returns nothing. Sets counts[p] to the set bits of a pixel.
BIPER_INLINE void copy_pixels(const MatmulPlan& plan, const uint32_t* from, int64_t pixels,
                              int64_t group, uint32_t* to, int32_t* counts) {
  const int64_t first = group * plan.depth;
  const bool aligned = first % kWordBits == 0;
  const uint32_t used = low_bits(plan.depth - (plan.words - 1) * kWordBits);
  for (int64_t p = 0; p < pixels; ++p, from += plan.pixel_words, to += plan.words) {
    int32_t set = 0;
    for (int64_t w = 0; w < plan.words; ++w) {
      const int64_t count = min64(plan.depth - w * kWordBits, kWordBits);
      to[w] = aligned ? from[first / kWordBits + w] : get_bits(from, first + w * kWordBits, count);
      if (w == plan.words - 1) to[w] &= used;
      set += __builtin_popcount(to[w]);
    }
    counts[p] = set;
  }
}

// Re-lays b and fills the terms of its pixels, whose set bits are in `borders`.
template <class I>
BIPER_INLINE void prepare_columns(const MatmulPlan& plan, const uint32_t* b, uint32_t* weights,
                                  int32_t* borders, float* columns) {
  const int32_t depth = static_cast<int32_t>(plan.depth);
  for (int64_t v = 0; v < plan.b_pixels; ++v) {
    const int32_t set = borders[v];
    columns[v] = static_cast<float>(plan.low_b ? 2 * set - depth : set);
    borders[v] = plan.low_a == 0 ? 2 * set : plan.low_b ? depth : 0;
  }
  for (int64_t v = plan.b_pixels; v < plan.vectors * I::kLanes; ++v) borders[v] = 0, columns[v] = 0;
  const typename I::Float multiplier = I::broadcast(plan.column_multiplier);
  const typename I::Float bias = I::broadcast(plan.bias);
  for (int64_t v = 0; v < plan.vectors * I::kLanes; v += I::kFloats) {
    I::store(columns + v, I::fma(multiplier, I::load(columns + v), bias));
  }
  for (int64_t first = 0; first < plan.vectors; first += I::kVectors) {
    const int64_t vectors = min64(I::kVectors, plan.vectors - first);
    for (int64_t k = 0; k < plan.words; ++k) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t pixel = (first + v) * I::kLanes;
        I::pack_word(b + pixel * plan.words + k, plan.words,
                     min64(I::kLanes, plan.b_pixels - pixel), weights + v * I::kPartWords,
                     vectors * I::kPartWords);
      }
      weights += vectors * I::kParts * I::kPartWords;
    }
  }
}

// One pixel of a against `count` pixels of b: turns what a tile counted into sums and stores them.
template <class I>
BIPER_INLINE void finish_sums(const MatmulPlan& plan, int32_t* dots, int64_t count, int32_t set,
                              const float* columns, int64_t index) {
  const int32_t row = plan.low_b == 0 ? 2 * set : 0;
  const int shift = (plan.low_a == 0) + (plan.low_b == 0);
  if (shift != 0) {
    for (int64_t l = 0; l < count; ++l) dots[l] = (dots[l] + row) >> shift;
  }
  if (plan.out_sums) {
    __builtin_memcpy(plan.out_sums + index, dots, static_cast<size_t>(count) * sizeof(int32_t));
    return;
  }
  const int32_t depth = static_cast<int32_t>(plan.depth);
  const typename I::Float multiplier = I::broadcast(plan.multiplier);
  const typename I::Float row_multiplier = I::broadcast(plan.row_multiplier);
  const typename I::Float rows =
      I::broadcast(static_cast<float>(plan.low_a ? 2 * set - depth : set));
  for (int64_t l = 0; l < count; l += I::kFloats) {
    const typename I::Float base = I::fma(row_multiplier, rows, I::load(columns + l));
    const typename I::Float v = I::fma(multiplier, I::to_float(dots + l), base);
    const int64_t left = count - l;
    if (left >= I::kFloats) {
      store_stream<I, true>(plan.out, plan.out_type, index + l, I::kFloats, v);
    } else {
      store_stream<I, false>(plan.out, plan.out_type, index + l, left, v);
    }
  }
}

// What the blocks of a unit share.
struct MatmulStrip {
  const uint32_t* a;
  const int32_t* rows;
  const int32_t* offsets;
  int32_t* dots;
  int64_t pixels, out;  // index of the first pixel's first sum
};

template <class I, int J>
static void matmul_block(const MatmulPlan& plan, const MatmulStrip& strip, int64_t vector,
                         const uint32_t* weights, const int32_t* borders, const float* columns) {
  constexpr int kPixels = tile_pixels<I, J>();
  const uint32_t* windows[kPixels];
  const int32_t* border_of[kPixels];
  const int64_t first = vector * I::kLanes, lanes = J * I::kLanes;
  const int64_t count = min64(lanes, plan.b_pixels - first);
  Strip words{};
  words.offsets = strip.offsets;
  for (int p = 0; p < kPixels; ++p) border_of[p] = borders + first;
  for (int64_t pixel = 0; pixel < strip.pixels; pixel += kPixels) {
    const int64_t pixels = min64(kPixels, strip.pixels - pixel);
    for (int64_t p = 0; p < pixels; ++p) windows[p] = strip.a + (pixel + p) * plan.words;
    tile_of<I, kPixels, J>(pixels, windows, border_of, words, plan.words, weights, strip.dots);
    for (int64_t p = 0; p < pixels; ++p) {
      finish_sums<I>(plan, strip.dots + p * lanes, count, strip.rows[pixel + p], columns + first,
                     strip.out + (pixel + p) * plan.b_pixels + first);
    }
  }
}

template <class I, int J = I::kVectors>
BIPER_INLINE void matmul_block_of(int64_t vectors, const MatmulPlan& plan, const MatmulStrip& strip,
                                  int64_t vector, const uint32_t* weights, const int32_t* borders,
                                  const float* columns) {
  if (vectors == J) {
    matmul_block<I, J>(plan, strip, vector, weights, borders, columns);
  } else if constexpr (J > 1) {
    matmul_block_of<I, J - 1>(vectors, plan, strip, vector, weights, borders, columns);
  }
}

template <class I>
static void matmul_unit(const MatmulPlan& plan, int64_t index, void* memory) {
  char* scratch = static_cast<char*>(memory);
  const MatmulPlan::Scratch& at = plan.scratch;
  const MatmulUnit unit = matmul_unit_of(plan, index);
  uint32_t* a = reinterpret_cast<uint32_t*>(scratch + at.a);
  uint32_t* b = reinterpret_cast<uint32_t*>(scratch + at.b);
  uint32_t* weights = reinterpret_cast<uint32_t*>(scratch + at.weights);
  int32_t* borders = reinterpret_cast<int32_t*>(scratch + at.borders);
  float* columns = reinterpret_cast<float*>(scratch + at.columns);
  int32_t* rows = reinterpret_cast<int32_t*>(scratch + at.rows);
  int32_t* offsets = reinterpret_cast<int32_t*>(scratch + at.offsets);
  for (int64_t w = 0; w < plan.words; ++w) offsets[w] = static_cast<int32_t>(w);
  const int64_t first = unit.matrix * plan.a_pixels + unit.first;
  copy_pixels(plan, plan.a + first * plan.pixel_words, unit.last - unit.first, unit.group, a, rows);
  copy_pixels(plan, plan.b + unit.matrix * plan.b_pixels * plan.pixel_words, plan.b_pixels,
              unit.group, b, borders);
  prepare_columns<I>(plan, b, weights, borders, columns);
  const int64_t out_pixel = (unit.matrix * plan.groups + unit.group) * plan.a_pixels + unit.first;
  const MatmulStrip strip{a,
                          rows,
                          offsets,
                          reinterpret_cast<int32_t*>(scratch + at.dots),
                          unit.last - unit.first,
                          out_pixel * plan.b_pixels};
  for (int64_t vector = 0; vector < plan.vectors; vector += I::kVectors) {
    const int64_t vectors = min64(I::kVectors, plan.vectors - vector);
    matmul_block_of<I>(vectors, plan, strip, vector, weights, borders, columns);
    weights += vectors * plan.words * I::kParts * I::kPartWords;
  }
}

}  // namespace biper
