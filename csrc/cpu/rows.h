// Functions of rows of numbers that lie side by side: softmax, normalisation, reductions.
//
// Sums are in double, in eight lanes of their own and then from the first lane to the last, so that
// they are the same on every instruction set.
#pragma once

#include "activations.h"

namespace biper {

constexpr int kSumLanes = 8;

// The sum of term(i) for i below `count`.
template <class Term>
BIPER_INLINE double row_sum(int64_t count, Term term) {
  double lanes[kSumLanes] = {0, 0, 0, 0, 0, 0, 0, 0};
  const int64_t whole = count / kSumLanes * kSumLanes;
  for (int64_t i = 0; i < whole; i += kSumLanes) {
    BIPER_UNROLL
    for (int l = 0; l < kSumLanes; ++l) lanes[l] += term(i + l);
  }
  for (int64_t i = whole; i < count; ++i) lanes[i - whole] += term(i);
  double sum = 0.0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

// The largest or smallest number, NaN where one is. Whether one is is asked of integers: compilers
// make vectors of that, but not of a comparison that may be one with NaN.
template <bool kLargest>
BIPER_INLINE float row_extreme(const float* x, int64_t count) {
  constexpr int64_t kLanes = 16;
  float lanes[kLanes];
  uint32_t magnitudes[kLanes];
  __builtin_memset(magnitudes, 0, sizeof magnitudes);
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = x[min64(l, count - 1)];
  const auto better = [](float v, float so_far) {
    if constexpr (kLargest) return v > so_far ? v : so_far;
    return v < so_far ? v : so_far;
  };
  const auto larger = [](float v, uint32_t so_far) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, sizeof bits);
    bits &= 0x7fffffffu;
    return bits > so_far ? bits : so_far;
  };
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = better(x[i + l], lanes[l]);
    for (int64_t l = 0; l < kLanes; ++l) magnitudes[l] = larger(x[i + l], magnitudes[l]);
  }
  for (int64_t i = whole; i < count; ++i) {
    lanes[i - whole] = better(x[i], lanes[i - whole]);
    magnitudes[i - whole] = larger(x[i], magnitudes[i - whole]);
  }
  float best = lanes[0];
  uint32_t magnitude = magnitudes[0];
  for (int64_t l = 1; l < kLanes; ++l) {
    best = better(lanes[l], best);
    magnitude = magnitudes[l] > magnitude ? magnitudes[l] : magnitude;
  }
  return magnitude > 0x7f800000u ? __builtin_nanf("") : best;
}

BIPER_INLINE double row_mean(const float* x, int64_t count) {
  const double sum = row_sum(count, [x](int64_t i) { return static_cast<double>(x[i]); });
  return sum / static_cast<double>(count);
}

// The sum of squares of differences from `mean`.
BIPER_INLINE double row_spread(const float* x, int64_t count, double mean) {
  return row_sum(count, [x, mean](int64_t i) {
    const double off = static_cast<double>(x[i]) - mean;
    return off * off;
  });
}

// The sum of exp(x - largest).
BIPER_INLINE double row_sum_exp(const float* x, int64_t count, double largest) {
  const double most = exponent_limit();
  return row_sum(count, [x, largest, most](int64_t i) {
    return bounded_exponential(static_cast<double>(x[i]) - largest, most);
  });
}

// Exponentials are in float: a number d below the largest adds a relative error of d 2^-24 to
// theirs, which is below 2^-23.
template <class I>
static void softmax_row(const float* x, float* out, int64_t count) {
  const float largest = row_extreme<true>(x, count), least = least_exponent();
  BIPER_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) out[i] = exponential_below_zero(x[i] - largest, least);
  const double sum = row_sum(count, [out](int64_t i) { return static_cast<double>(out[i]); });
  const double scale = 1.0 / sum;
  BIPER_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<float>(static_cast<double>(out[i]) * scale);
  }
}

template <class I>
static void log_softmax_row(const float* x, float* out, int64_t count) {
  const double most = row_extreme<true>(x, count);
  const double less = most + logarithm(row_sum_exp(x, count, most));
  BIPER_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<float>(static_cast<double>(x[i]) - less);
  }
}

template <class I>
static void normalize_row(const RowsCall& call, const float* x, float* out) {
  const int64_t count = call.length;
  const double mean = call.centred ? row_mean(x, count) : 0.0;
  const double variance = row_spread(x, count, mean) / static_cast<double>(count);
  const double scale = 1.0 / __builtin_sqrt(variance + call.epsilon);
  BIPER_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<float>((static_cast<double>(x[i]) - mean) * scale);
  }
  if (call.weight != nullptr) {
    BIPER_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) out[i] *= call.weight[i];
  }
  if (call.bias != nullptr) {
    BIPER_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) out[i] += call.bias[i];
  }
}

template <class I>
static double reduced_row(const RowsCall& call, const float* x) {
  const int64_t count = call.length;
  switch (call.function) {
    case RowFunction::kMaximum:
      return row_extreme<true>(x, count);
    case RowFunction::kMinimum:
      return row_extreme<false>(x, count);
    case RowFunction::kMean:
      return row_mean(x, count);
    case RowFunction::kNorm1:
      return row_sum(count, [x](int64_t i) { return static_cast<double>(__builtin_fabsf(x[i])); });
    case RowFunction::kNorm2:
      return __builtin_sqrt(row_spread(x, count, 0.0));
    case RowFunction::kSum:
      return row_sum(count, [x](int64_t i) { return static_cast<double>(x[i]); });
    case RowFunction::kVariance:
      return row_spread(x, count, row_mean(x, count)) / call.divisor;
    case RowFunction::kDeviation:
      return __builtin_sqrt(row_spread(x, count, row_mean(x, count)) / call.divisor);
    default: {  // kLogSumExp
      const double most = row_extreme<true>(x, count);
      if (most - most != 0.0) return most;  // infinite, or NaN
      return most + logarithm(row_sum_exp(x, count, most));
    }
  }
}

template <class I>
static void rows(const RowsCall& call, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    const float* x = call.x + r * call.length;
    float* out = call.out + r * call.length;
    switch (call.function) {
      case RowFunction::kSoftmax:
        softmax_row<I>(x, out, call.length);
        break;
      case RowFunction::kLogSoftmax:
        log_softmax_row<I>(x, out, call.length);
        break;
      case RowFunction::kNormalize:
        normalize_row<I>(call, x, out);
        break;
      default:
        call.out[r] = static_cast<float>(reduced_row<I>(call, x));
    }
  }
}

}  // namespace biper
