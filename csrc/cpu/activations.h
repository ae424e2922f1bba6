// Functions of single numbers.
//
// Those that are not single float operations are computed in double, by operations that IEEE 754
// rounds alike everywhere, and rounded once to float: that gives the same bytes on every
// instruction set, and all but always the float that is nearest to the exact value.
#pragma once

#include "vectors.h"

namespace biper {

// Arguments of `exponential` are kept within this limit: exp of others is no float, or 0. A
// compiler that knew the number would compute exp of it and branch, and could not vectorise loops,
// so they read it before they begin.
BIPER_INLINE double exponent_limit() {
  static const volatile double kMost = 700.0;
  return kMost;
}

// exp(x) for |x| <= 700, to a relative error below 2^-41. NaN gives NaN.
//
// exp(x) = 2^k exp(r) with k = round(x / ln 2) and |r| <= ln(2) / 2 = 0.3466. Taylor's terms of r
// up to r^10 leave r^11 / 11! < 2.3e-13 of exp(r), and r is exact to |k| 2^-54 < 2^-43. Adding 1.5
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

BIPER_INLINE double bounded_exponential(double x, double most) {
  x = x < -most ? -most : x;
  return exponential(x > most ? most : x);
}

// Arguments of `exponential_below_zero` are kept above this limit, whose exp rounds to 0.
BIPER_INLINE float least_exponent() {
  static const volatile float kLeast = -104.0f;  // volatile as in exponent_limit
  return kLeast;
}

// exp(x) for x <= 0 in float, to a relative error below 2^-23 where the result is no denormal: 0
// from `least` on, NaN at NaN.
//
// As `exponential`, up to r^7, which leaves r^8 / 8! < 2^-27 of it. ln 2 is in two parts, of which
// k times the first is exact; 2^k, which may be no float, is the product of two powers.
BIPER_INLINE float exponential_below_zero(float x, float least) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23, of the bits 0x4b400000
  x = x < least ? least : x;
  const float shifted = x * 1.44269504f + kRound, k = shifted - kRound;
  const float r = x - k * 0.693359375f + k * 2.12194440e-4f;
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r * r + r + 1.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  const int32_t whole = static_cast<int32_t>(bits - 0x4b400000u), half = whole >> 1;
  const uint32_t low_bits = static_cast<uint32_t>(half + 127) << 23;
  const uint32_t high_bits = static_cast<uint32_t>(whole - half + 127) << 23;
  float low, high;
  __builtin_memcpy(&low, &low_bits, sizeof low);
  __builtin_memcpy(&high, &high_bits, sizeof high);
  return sum * low * high;
}

// ln(x) for normal x > 0, to a relative error below 2^-45.
//
// x = 2^k m with m in [sqrt(1/2), sqrt(2)), and ln(m) = 2 artanh(s) with s = (m - 1) / (m + 1), so
// that |s| < 0.1716; terms up to s^19 / 19 leave s^20 / 21 < 2.5e-17 of it.
BIPER_INLINE double logarithm(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  int64_t k = static_cast<int64_t>(bits >> 52) - 1023;
  bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
  double m;
  __builtin_memcpy(&m, &bits, sizeof m);
  if (m >= 1.4142135623730951) {
    m *= 0.5;
    ++k;
  }
  const double s = (m - 1.0) / (m + 1.0), square = s * s;
  double sum = 0.0;
  for (int term = 19; term >= 1; term -= 2) sum = sum * square + 2.0 / term;
  return static_cast<double>(k) * 0.6931471805599453 + sum * s;
}

// ln(x) for any float x: -inf at 0, NaN below.
BIPER_INLINE double logarithm_of_any(double x) {
  const bool inside = x > 0.0 && x < __builtin_inf();
  const double value = logarithm(inside ? x : 1.0);
  const double edge = x == 0.0 ? -__builtin_inf() : x > 0.0 ? x : __builtin_nan("");
  return inside ? value : edge;
}

// ln(1 + x) for any float x; what is lost in the sum is put back to first order.
BIPER_INLINE double logarithm_of_more(double x) {
  const double sum = 1.0 + x, lost = (sum - 1.0) - x;
  const bool inside = sum > 0.0 && sum < __builtin_inf();
  return logarithm_of_any(sum) - (inside ? lost / sum : 0.0);
}

// ln(1 + exp(x)).
BIPER_INLINE double soft_step(double x, double most) {
  return logarithm_of_more(bounded_exponential(x, most));
}

// 1 / (1 + exp(-x)): 0.5 at both zeros, 0 at -inf, 1 at inf, NaN at NaN.
BIPER_INLINE double logistic(double x, double most) {
  return 1.0 / (1.0 + bounded_exponential(-x, most));
}

// erfc(z) for z >= 0, to 2^-38 of it below 10.3; beyond it is less than 2^-153.
//
// exp(z^2) erfc(z) (1 + 2 z) is a polynomial of u = (z - 4) / (z + 4), interpolated at Chebyshev's
// points of [0, 10.3], to a relative error below 2^-39.
BIPER_INLINE double complementary_error(double z) {
  constexpr double kTerms[] = {
      -1.6374903461530173e-05, -1.8385165130632947e-05, 1.6077216922650867e-04,
      -1.9812269886750893e-04, -7.6221760829662210e-04, 5.0303804938736650e-03,
      -1.6196933875449203e-02, 3.7167914208242434e-02,  -6.6330433390425420e-02,
      9.3732793847394840e-02,  -1.0103906325563107e-01, 6.8097055985881210e-02,
      1.5379652046985208e-02,  -1.3962111686091552e-01, 1.2329951186258277e+00};
  z = z > 26.0 ? 26.0 : z;
  const double u = (z - 4.0) / (z + 4.0);
  double sum = 0.0;
  BIPER_UNROLL
  for (int i = 0; i < 15; ++i) sum = sum * u + kTerms[i];
  return exponential(-z * z) * sum / (1.0 + 2.0 * z);
}

// erf(x), by its own Taylor series to x^13 below 1/4, where 1 - erfc(x) would cancel.
BIPER_INLINE double error_function(double x) {
  const double z = x < 0.0 ? -x : x, square = x * x;
  const double tail = 1.0 - complementary_error(z);
  double sum = 1.0 / 9360;
  sum = sum * square - 1.0 / 1320;
  sum = sum * square + 1.0 / 216;
  sum = sum * square - 1.0 / 42;
  sum = sum * square + 1.0 / 10;
  sum = sum * square - 1.0 / 3;
  sum = sum * square + 1.0;
  const double small = sum * x * 1.1283791670955126;  // 2 / sqrt(pi)
  return z < 0.25 ? small : x < 0.0 ? -tail : tail;
}

// tanh(x), by its own Taylor series to x^9 below 1/8, where the quotient would cancel.
BIPER_INLINE double hyperbolic_tangent(double x, double most) {
  const double square = x * x;
  double sum = 62.0 / 2835;
  sum = sum * square - 17.0 / 315;
  sum = sum * square + 2.0 / 15;
  sum = sum * square - 1.0 / 3;
  sum = sum * square + 1.0;
  const double large = 1.0 - 2.0 / (bounded_exponential(2.0 * x, most) + 1.0);
  return square < 0.015625 ? sum * x : large;
}

// exp(x) - 1 for x <= 0, by Taylor's series to x^6 above -1/16.
BIPER_INLINE double exponential_less_one(double x, double most) {
  double sum = 1.0 / 5040;
  sum = sum * x + 1.0 / 720;
  sum = sum * x + 1.0 / 120;
  sum = sum * x + 1.0 / 24;
  sum = sum * x + 1.0 / 6;
  sum = sum * x + 0.5;
  sum = sum * x + 1.0;
  const double large = bounded_exponential(x, most) - 1.0;
  return x > -0.0625 ? sum * x : large;
}

// 1 / (1 + exp(-x)); 0 where x times it is less than any float.
BIPER_INLINE double logistic_gate(double x, double most) {
  return x < -most ? 0.0 : logistic(x, most);
}

// The normal distribution's function at x.
BIPER_INLINE double gaussian_gate(double x) {
  const double tail = 0.5 * complementary_error((x < 0.0 ? -x : x) * 0.7071067811865476);
  return x > 0.0 ? 1.0 - tail : tail;
}

// x times a gate, and 0 where twice the gate is 1 + s in floats for an s that rounds to -1: there
// PyTorch's GELU is 0, which a sign behind it tells from any other value.
BIPER_INLINE float gelu_gated(double x, double gate) {
  return static_cast<float>(x * (gate <= 0x1p-26 ? 0.0 : gate));
}

BIPER_INLINE float gelu_of(double x) { return gelu_gated(x, gaussian_gate(x)); }

BIPER_INLINE float silu_of(double x, double most) {
  return static_cast<float>(x * logistic_gate(x, most));
}

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
BIPER_INLINE float tanh_gelu_of(double x, double most) {
  const double twice = 1.5957691216057308 * (x + 0.044715 * x * x * x);
  return gelu_gated(x, logistic_gate(twice, most));
}

// x tanh(ln(1 + exp(x))) = x n / (n + 2) with n = exp(x) (exp(x) + 2); x from 40 on.
BIPER_INLINE float mish_of(double x, double most) {
  const double e = bounded_exponential(x > 40.0 ? 40.0 : x, most), n = e * (e + 2.0);
  const double gate = x < -most ? 0.0 : n / (n + 2.0);
  return static_cast<float>(x * gate);
}

// The nearest integer, an even one at ties. From 2^23 on, floats are integers; a zero has the sign
// of x.
BIPER_INLINE float nearest_integer(float x) {
  const float magnitude = __builtin_fabsf(x);
  const float rounded = (magnitude + 8388608.0f) - 8388608.0f;
  return magnitude < 8388608.0f ? __builtin_copysignf(rounded, x) : x;
}

BIPER_INLINE float floor_of(float x) {
  const float near = nearest_integer(x);
  return near > x ? near - 1.0f : near;
}

// Keeps the sign of a zero, so that -0.5 becomes -0.
BIPER_INLINE float ceil_of(float x) {
  const float near = nearest_integer(x);
  return __builtin_copysignf(near < x ? near + 1.0f : near, x);
}

BIPER_INLINE float trunc_of(float x) {
  const float magnitude = __builtin_fabsf(x);
  return __builtin_copysignf(floor_of(magnitude), x);
}

}  // namespace biper
