// Kernels of activations: functions of single floats.
//
// They are computed in double, by operations that IEEE 754 rounds alike everywhere, and rounded
// once to float: that gives the same bytes on every instruction set, and all but always the float
// that is nearest to the exact value.
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace biper {

// exp(x) for |x| <= 105, to a relative error below 2^-41. NaN gives NaN.
//
// exp(x) = 2^k exp(r) with k = round(x / ln 2) and |r| <= ln(2) / 2 = 0.3466. Taylor's terms of r
// up to r^10 leave r^11 / 11! < 2.3e-13 of exp(r), and r is exact to |k| 2^-54 < 2^-46. Adding 1.5
// * 2^52 rounds to an integer, which then is in the low bits of the sum, also a negative one modulo
// 2^12; 2^k is made from these bits.
BIPER_INLINE double exponential(double x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = x * 1.4426950408889634 + kRound;
  const double r = x - (shifted - kRound) * 0.6931471805599453;
  double sum = 1.0 / 3628800;
  sum = sum * r + 1.0 / 362880;
  sum = sum * r + 1.0 / 40320;
  sum = sum * r + 1.0 / 5040;
  sum = sum * r + 1.0 / 720;
  sum = sum * r + 1.0 / 120;
  sum = sum * r + 1.0 / 24;
  sum = sum * r + 1.0 / 6;
  sum = sum * r + 0.5;
  sum = sum * r + 1.0;
  sum = sum * r + 1.0;
  uint64_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 52) + 0x3ff0000000000000u;
  double power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return sum * power;
}

// out[i] = 1 / (1 + exp(-x[i])): 0.5 at both zeros, 0 at -inf, 1 at inf, NaN at NaN.
template <class I>
static void sigmoid(const FunctionCall& call, int64_t first, int64_t last) {
  constexpr double kMost = 105.0;  // from 104 on, exp(-x) is less than half the smallest float
  for (int64_t i = first; i < last; ++i) {
    double x = -static_cast<double>(call.x[i]);
    x = x < -kMost ? -kMost : x;
    x = x > kMost ? kMost : x;
    call.out[i] = static_cast<float>(1.0 / (1.0 + exponential(x)));
  }
}

}  // namespace biper
