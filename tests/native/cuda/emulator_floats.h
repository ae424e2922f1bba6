// 16-bit floats, held as their bits.

#pragma once

#include <cstdint>

#include "emulator_intrinsics.h"

namespace biper {

inline float half_to_float(uint16_t bits) {
  // As a float's fields, then scaled by the difference of the exponents' biases: 2 ** (127 - 15).
  const uint32_t magnitude = bits & 0x7fffu;
  const float scaled = __uint_as_float(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0;  // infinite or NaN
  return __uint_as_float(__float_as_uint(scaled) | special | (bits & 0x8000u) << 16);
}

// To nearest, ties to even; beyond the range: infinity.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    return 0x7fff;
  } else if (magnitude >= 0x477ff000u) {  // 65520, halfway between the largest and the next
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {
    // Below 2 ** -14 a unit of the last place is 2 ** -24, as it is of a float from 0.5 on.
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

inline float bfloat_to_float(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace biper
