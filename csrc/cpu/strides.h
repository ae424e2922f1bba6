// Places of numbers in memory: dimensions with their sizes and strides.
#pragma once

#include <vector>

#include "conv.h"

namespace biper {

// Sizes of some dimensions, outermost first, and for each of several operands its strides along
// them. Operands of one number have strides of 0.
struct Dimensions {
  std::vector<int64_t> sizes;
  std::vector<std::vector<int64_t>> strides;  // [operands][dimensions]

  // Joins neighbouring dimensions along which every operand lies as along a single one.
  void join();
};

// Throws unless every place of the dimensions, from `offset` on, is one of `values` in memory.
void require_places(const char* name, const std::vector<int64_t>& sizes,
                    const std::vector<int64_t>& strides, int64_t offset, int64_t values);

}  // namespace biper
