// Two pixels at once, where a table is looked up for each nibble: a byte counts both.
//
// A row of the table is for a nibble of each of two pixels. Its entry for a weight's nibble n has
// popc(v0 ^ n) in the low half of the byte and popc(v1 ^ n) in the high half: one shuffle serves
// 2 pixels x 4 input channels of every lane. Three entries, at most 12 in each half, add up without
// a carry between the halves; then the sum T of the three goes to two sums of bytes:
//
//     all += T,  high += T >> 4 of 16-bit words.
//
// With L and H the counts of the two pixels, at most 255 each, an odd byte of `high` is H, and a
// byte of `all` is L + 16 * H modulo 256; an even byte of `high` is H + 16 * L of the odd byte
// beside it, modulo 256. So L and H follow exactly, the odd bytes first. Three steps take 8 vector
// operations for 2 pixels, where one pixel at a time takes 12.
//
// An ISA class with kPairs gives PairRow, PairCounts, PairSum and PairTotals, and what is called
// here.
#pragma once

#include "vectors.h"

namespace biper {

constexpr int64_t kWordParts = 8;         // nibbles of a word
constexpr int64_t kWordsPerTotal = 1020;  // twice 1020 * 32 fits 16 bits; a multiple of 12

// Counts WORDS words, of which PARTS nibbles are used, of H pairs of windows against J vectors.
template <class I, int H, int J, int PARTS, int WORDS>
BIPER_INLINE void count_pair_words(const uint16_t* const* windows, const int32_t* offsets,
                                   const uint32_t* weights, typename I::PairSum (&sums)[H * J]) {
  constexpr int kSteps = PARTS * WORDS;
  int64_t at[WORDS];
  BIPER_UNROLL
  for (int w = 0; w < WORDS; ++w) at[w] = offsets[w] * kWordParts;
  BIPER_UNROLL
  for (int first = 0; first < kSteps; first += 3) {
    BIPER_UNROLL
    for (int h = 0; h < H; ++h) {
      typename I::PairCounts counts[J];
      BIPER_UNROLL
      for (int step = first; step < (first + 3 < kSteps ? first + 3 : kSteps); ++step) {
        const int word = step / PARTS, part = step % PARTS;
        const typename I::PairRow row = I::pair_row(windows[h][at[word] + part]);
        BIPER_UNROLL
        for (int j = 0; j < J; ++j) {
          const uint32_t* from = weights + word * (J * I::kParts * I::kPartWords);
          I::count_pair(counts[j], row, from, part, j, J, step == first);
        }
      }
      BIPER_UNROLL
      for (int j = 0; j < J; ++j) I::add_counts(sums[h * J + j], counts[j]);
    }
  }
}

// Counts H pairs of windows against J vectors: dots[p][J * kLanes] = border - 2 * popc(a ^ w) for
// 2 * H pixels.
template <class I, int H, int J, int PARTS>
static void pair_tile(const uint16_t* const* windows, const int32_t* const* borders,
                      const int32_t* offsets, int64_t depth, const uint32_t* weights,
                      int32_t* dots) {
  constexpr int64_t kWordsPerSum = PARTS <= 4 ? 12 : 6;
  constexpr int64_t kWeights = J * I::kParts * I::kPartWords;  // of a word
  for (int64_t first = 0; first < depth; first += kWordsPerTotal) {
    const int64_t last = min64(first + kWordsPerTotal, depth);
    typename I::PairTotals totals[H * J];
    BIPER_UNROLL
    for (int i = 0; i < H * J; ++i) totals[i] = I::no_totals();
    for (int64_t k = first; k < last;) {
      typename I::PairSum sums[H * J];
      BIPER_UNROLL
      for (int i = 0; i < H * J; ++i) sums[i] = I::no_pairs();
      const int64_t end = min64(k + kWordsPerSum, last);
      for (; k + 3 <= end; k += 3) {
        count_pair_words<I, H, J, PARTS, 3>(windows, offsets + k, weights + k * kWeights, sums);
      }
      for (; k < end; ++k) {
        count_pair_words<I, H, J, PARTS, 1>(windows, offsets + k, weights + k * kWeights, sums);
      }
      BIPER_UNROLL
      for (int i = 0; i < H * J; ++i) I::widen(totals[i], sums[i]);
    }
    BIPER_UNROLL
    for (int h = 0; h < H; ++h) {
      BIPER_UNROLL
      for (int j = 0; j < J; ++j) {
        int32_t* to = dots + (2 * h * J + j) * I::kLanes;
        int32_t* next = to + J * I::kLanes;
        const int32_t* from = first == 0 ? borders[2 * h] + j * I::kLanes : to;
        const int32_t* from_next = first == 0 ? borders[2 * h + 1] + j * I::kLanes : next;
        I::subtract_twice(to, from, totals[h * J + j], 0);
        I::subtract_twice(next, from_next, totals[h * J + j], 1);
      }
    }
  }
}

// Runs the tile of `pairs` <= H pairs; `half` says that words have 16 bits or fewer.
template <class I, int H, int J>
BIPER_INLINE void pair_tile_of(int64_t pairs, const uint16_t* const* windows,
                               const int32_t* const* borders, const int32_t* offsets, int64_t depth,
                               bool half, const uint32_t* weights, int32_t* dots) {
  if (pairs == H) {
    if (half) {
      pair_tile<I, H, J, 4>(windows, borders, offsets, depth, weights, dots);
    } else {
      pair_tile<I, H, J, 8>(windows, borders, offsets, depth, weights, dots);
    }
  } else if constexpr (H > 1) {
    pair_tile_of<I, H - 1, J>(pairs, windows, borders, offsets, depth, half, weights, dots);
  }
}

}  // namespace biper
