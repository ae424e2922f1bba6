// The CPU algorithm, once for all instruction sets; isa_*.cpp instantiate it with their vectors.
//
// An ISA class I gives: kLanes, kVectors, kAccumulators (registers for sums), kPairs (whether
// convolutions count two pixels at once, see pairs.h), kParts (steps that one word takes),
// kPartWords (words of weights in a step), kWordsPerSum (words that a sum can take, 0: all of
// them), kFloats (lanes of a float vector, a divisor of kLanes), kSumsFitFloats (whether a sum is
// one vector of as many floats, which float_dots makes), kPeakSums, or kPeakPairs with kPairs
// (independent sums that fill the pipeline), kSignVectors, kSignRows and kTableFloats (a tile of a
// product with signs, and the size of its tables), and the functions used below.
//
// Everything here has internal linkage: the templates through their argument, a class of an
// anonymous namespace, the rest through `static`.
#pragma once

#include "convolution.h"
#include "elementwise.h"
#include "float_kernels.h"
#include "float_pools.h"
#include "maps_kernels.h"
#include "matmul_kernels.h"
#include "products.h"
#include "rows.h"
#include "sign_gradient_kernels.h"
#include "sign_linear.h"

namespace biper {

// The inner step of a tile on registers alone: what bounds every convolution with this vector set.
template <class I>
static void peak(int64_t rounds) {
  typename I::Sum sums[I::kPeakSums];
  typename I::Word word;
  typename I::Weights weights;
  __builtin_memset(&word, 0x5a, sizeof word);
  __builtin_memset(&weights, 0x03, sizeof weights);
  BIPER_UNROLL
  for (int i = 0; i < I::kPeakSums; ++i) sums[i] = I::zero();
  for (int64_t r = 0; r < rounds; ++r) {
    BIPER_UNROLL
    for (int i = 0; i < I::kPeakSums; ++i) {
      I::opaque(word);  // or the compiler would count once and add the same value again
      sums[i] = I::count(sums[i], word, weights);
    }
  }
  BIPER_UNROLL
  for (int i = 0; i < I::kPeakSums; ++i) I::opaque(sums[i]);
}

// The same where a table serves pairs of pixels.
template <class I>
static void pair_peak(int64_t rounds) {
  typename I::PairSum sums[I::kPeakPairs];
  typename I::PairRow row = I::pair_row(0x5a0);
  uint32_t weights[I::kPartWords];
  __builtin_memset(weights, 0x03, sizeof weights);
  BIPER_UNROLL
  for (int i = 0; i < I::kPeakPairs; ++i) sums[i] = I::no_pairs();
  for (int64_t r = 0; r < rounds; ++r) {
    BIPER_UNROLL
    for (int i = 0; i < I::kPeakPairs; ++i) {
      I::opaque(row);
      typename I::PairCounts counts;
      BIPER_UNROLL
      for (int step = 0; step < 3; ++step) I::count_pair(counts, row, weights, 0, 0, 1, step == 0);
      I::add_counts(sums[i], counts);
    }
  }
  BIPER_UNROLL
  for (int i = 0; i < I::kPeakPairs; ++i) I::opaque(sums[i].all), I::opaque(sums[i].high);
}

struct PeakLoop {
  void (*run)(int64_t rounds);
  int64_t macs_per_round;
};

template <class I>
constexpr PeakLoop peak_of() {
  if constexpr (I::kPairs) {
    constexpr int64_t kBits = kWordBits / kWordParts;  // of a step
    return {&pair_peak<I>, int64_t{I::kPeakPairs} * 3 * 2 * I::kLanes * kBits};
  } else {
    return {&peak<I>, int64_t{I::kPeakSums} * I::kLanes * kWordBits / I::kParts};
  }
}

template <class I>
constexpr ConvKernels conv_kernels_of() {
  return {
      Blocking{I::kLanes, I::kVectors, I::kParts, I::kPartWords, tile_pixels<I, 1>(), I::kPairs},
      &I::pack_word, &conv_unit<I>};
}

// Heavy is I, or a class with another layout for weights that caches don't hold.
template <class I, class Heavy = I>
constexpr Kernels kernels_of(const char* name, int32_t id) {
  return Kernels{
      name,
      id,
      conv_kernels_of<I>(),
      conv_kernels_of<Heavy>(),
      &binarize<I>,
      &pack_signs<I>,
      &unbinarize<I>,
      &maxpool_row<I>,
      int64_t{I::kFloatVectors} * I::kFloats,
      I::kFloats,
      &float_conv_unit<I>,
      &average_row<I>,
      &maximum_row<I>,
      &sum<I>,
      &elementwise<I>,
      &rows<I>,
      &matmul_rows<I>,
      &depthwise_row<I>,
      &sign_gradient<I>,
      &matmul_unit<I>,
      int64_t{I::kSignVectors} * I::kFloats,
      I::kSignRows,
      I::kTableFloats,
      &sign_linear_unit<I>,
      peak_of<I>().run,
      peak_of<I>().macs_per_round,
  };
}

}  // namespace biper
