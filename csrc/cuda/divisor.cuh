// Division of 31-bit indices by a number that is fixed for a launch, without a divide instruction.
//
// With s = ceil(log2(d)) and m = floor(2^32 * (2^s - d) / d) + 1, n / d = (n + high(n * m)) >> s;
// n below 2^31 keeps that sum within 32 bits.
// Source: Granlund and Montgomery, "Division by invariant integers using multiplication",
// figure 4.1.

#pragma once

#include "platform.cuh"

namespace biper {

struct Divisor {
  uint32_t divisor, multiplier, shift;

  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> 32);
    return (n + high) >> shift;
  }

  __device__ __forceinline__ uint32_t remainder(uint32_t n) const {
    return n - quotient(n) * divisor;
  }
};

// `divisor` is from 1 to 2^31.
inline Divisor make_divisor(int64_t divisor) {
  uint32_t shift = 0;
  while ((int64_t{1} << shift) < divisor) ++shift;
  const uint64_t excess = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
  const uint64_t multiplier = (excess << 32) / static_cast<uint64_t>(divisor) + 1;
  return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(multiplier), shift};
}

}  // namespace biper
