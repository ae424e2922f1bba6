// How an output map is cut into units of work, for binary and float convolutions alike.
#pragma once

#include <algorithm>
#include <cstdint>

namespace biper {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What can be cut: rows of output, of which a strip should have some, and channels, into blocks.
struct Cut {
  int64_t rows, fewest_rows, blocks;

  // Returns how many strips of rows, of nearly the same height, to make of an image that `threads`
  // threads work on, for `pieces` units of it.
  //
  // Each of the threads gets as many strips, so that rows which a thread has written lie in its own
  // cache when it comes to the next layer: on processors whose cores share no last-level cache, a
  // row of another thread's costs several times as much. Where rows cannot be shared evenly, those
  // of small maps, channels are.
  int64_t strips(int64_t pieces, int64_t threads) const {
    const int64_t most = std::min(pieces, std::max<int64_t>(1, rows / fewest_rows));
    if (most < threads) return most;
    const bool even = rows % threads == 0 || rows >= 16 * threads;
    return even || blocks < 2 * threads ? most / threads * threads : 1;
  }
};

}  // namespace biper
