// Functions of the numbers at each place of up to three operands, which strides broadcast or
// permute.
#pragma once

#include "activations.h"

namespace biper {

// Numbers of an operand that are brought together at once where they do not lie so.
constexpr int64_t kGathered = 256;

template <class Of>
BIPER_INLINE void each(const float* const* x, float* out, int64_t count, Of of) {
  const float *const a = x[0], *const b = x[1], *const c = x[2];
  BIPER_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) out[i] = of(a[i], b[i], c[i]);
}

template <class Of>
BIPER_INLINE void each(const float* a, float* out, int64_t count, Of of) {
  BIPER_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) out[i] = of(a[i]);
}

BIPER_INLINE float six_steps(float x) {
  const float y = x + 3.0f;
  const float low = y < 0.0f ? 0.0f : y;
  return low > 6.0f ? 6.0f : low;
}

// out[i] = function(x[0][i]) of `count` numbers that lie side by side.
template <class I>
static void apply_to_one(Function function, const float* a, float* out, int64_t n) {
  const double most = exponent_limit();
  switch (function) {
    case Function::kAbs:
      return each(a, out, n, [](float x) { return __builtin_fabsf(x); });
    case Function::kCeil:
      return each(a, out, n, [](float x) { return ceil_of(x); });
    case Function::kErf:
      return each(a, out, n, [](float x) { return static_cast<float>(error_function(x)); });
    case Function::kExp:
      return each(a, out, n,
                  [most](float x) { return static_cast<float>(bounded_exponential(x, most)); });
    case Function::kFloor:
      return each(a, out, n, [](float x) { return floor_of(x); });
    case Function::kGelu:
      return each(a, out, n, [](float x) { return gelu_of(x); });
    case Function::kGeluTanh:
      return each(a, out, n, [most](float x) { return tanh_gelu_of(x, most); });
    case Function::kHardSigmoid:
      return each(a, out, n, [](float x) { return six_steps(x) / 6.0f; });
    case Function::kHardSwish:
      return each(a, out, n, [](float x) { return x * six_steps(x) / 6.0f; });
    case Function::kLog:
      return each(a, out, n, [](float x) { return static_cast<float>(logarithm_of_any(x)); });
    case Function::kLog1p:
      return each(a, out, n, [](float x) { return static_cast<float>(logarithm_of_more(x)); });
    case Function::kLogSigmoid:
      return each(a, out, n, [most](float x) {
        return static_cast<float>((x < 0.0f ? x : 0.0f) - soft_step(-__builtin_fabsf(x), most));
      });
    case Function::kMish:
      return each(a, out, n, [most](float x) { return mish_of(x, most); });
    case Function::kNegative:
      return each(a, out, n, [](float x) { return -x; });
    case Function::kReciprocal:
      return each(a, out, n, [](float x) { return 1.0f / x; });
    case Function::kRound:
      return each(a, out, n, [](float x) { return nearest_integer(x); });
    case Function::kRsqrt:
      return each(a, out, n, [](float x) { return 1.0f / __builtin_sqrtf(x); });
    case Function::kSigmoid:
      return each(a, out, n, [most](float x) { return static_cast<float>(logistic(x, most)); });
    case Function::kSign:
      return each(a, out, n,
                  [](float x) { return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f); });
    case Function::kSilu:
      return each(a, out, n, [most](float x) { return silu_of(x, most); });
    case Function::kSqrt:
      return each(a, out, n, [](float x) { return __builtin_sqrtf(x); });
    case Function::kSquare:
      return each(a, out, n, [](float x) { return x * x; });
    case Function::kTanh:
      return each(a, out, n,
                  [most](float x) { return static_cast<float>(hyperbolic_tangent(x, most)); });
    case Function::kTrunc:
      return each(a, out, n, [](float x) { return trunc_of(x); });
    default:
      return;
  }
}

// The larger or smaller number, NaN where one is.
template <bool kLarger>
BIPER_INLINE float extreme_of(float a, float b) {
  const float chosen = (kLarger ? a > b : a < b) ? a : b;
  return a != a ? a : chosen;
}

template <class I>
static void apply_to_more(Function function, const float* const* x, float* out, int64_t n) {
  const double most = exponent_limit();
  switch (function) {
    case Function::kAdd:
      return each(x, out, n, [](float a, float b, float) { return a + b; });
    case Function::kDivide:
      return each(x, out, n, [](float a, float b, float) { return a / b; });
    case Function::kElu:
      return each(x, out, n, [most](float a, float b, float) {
        return a > 0.0f ? a : static_cast<float>(b * exponential_less_one(a, most));
      });
    case Function::kEqual:
      return each(x, out, n, [](float a, float b, float) { return a == b ? 1.0f : 0.0f; });
    case Function::kGreater:
      return each(x, out, n, [](float a, float b, float) { return a > b ? 1.0f : 0.0f; });
    case Function::kGreaterEqual:
      return each(x, out, n, [](float a, float b, float) { return a >= b ? 1.0f : 0.0f; });
    case Function::kMaximum:
      return each(x, out, n, [](float a, float b, float) { return extreme_of<true>(a, b); });
    case Function::kMinimum:
      return each(x, out, n, [](float a, float b, float) { return extreme_of<false>(a, b); });
    case Function::kMultiply:
      return each(x, out, n, [](float a, float b, float) { return a * b; });
    case Function::kNotEqual:
      return each(x, out, n, [](float a, float b, float) { return a != b ? 1.0f : 0.0f; });
    case Function::kPrelu:
      return each(x, out, n, [](float a, float b, float) { return a > 0.0f ? a : a * b; });
    case Function::kSoftplus:
      return each(x, out, n, [most](float a, float b, float) {
        return a > b ? a : static_cast<float>(soft_step(a, most));
      });
    case Function::kSubtract:
      return each(x, out, n, [](float a, float b, float) { return a - b; });
    case Function::kAddProduct:
      return each(x, out, n, [](float a, float b, float c) { return a + b * c; });
    case Function::kClamp:
      return each(x, out, n, [](float a, float low, float high) {
        const float v = a < low ? low : a;
        return v > high ? high : v;
      });
    case Function::kWhere:
      return each(x, out, n, [](float a, float b, float c) { return a != 0.0f ? b : c; });
    default:
      return;
  }
}

// Returns where `count` numbers lie side by side: those at `from`, or copies of them in `held`.
BIPER_INLINE const float* side_by_side(const float* from, int64_t stride, int64_t count,
                                       float* held) {
  if (stride == 1) return from;
  for (int64_t i = 0; i < count; ++i) held[i] = from[i * stride];
  return held;
}

// Computes `count` numbers of the innermost dimension from those at `x`.
template <class I>
BIPER_INLINE void elementwise_run(const ElementwiseCall& call, const float* const* x, float* out,
                                  int64_t count) {
  alignas(64) float held[kMostOperands][kGathered];
  int64_t stride[kMostOperands];
  bool plain = true;
  for (int o = 0; o < call.operands; ++o) {
    stride[o] = call.strides[o][call.dims - 1];
    plain = plain && stride[o] == 1;
  }
  const int64_t step = plain ? count : kGathered;
  const float* ready[kMostOperands] = {nullptr, nullptr, nullptr};
  for (int64_t first = 0; first < count; first += step) {
    const int64_t n = min64(step, count - first);
    for (int o = 0; o < call.operands; ++o) {
      if (first > 0 && stride[o] == 0) continue;  // held already
      ready[o] = side_by_side(x[o] + first * stride[o], stride[o], n, held[o]);
    }
    for (int o = call.operands; o < kMostOperands; ++o) ready[o] = ready[0];
    if (call.operands == 1) {
      apply_to_one<I>(call.function, ready[0], out + first, n);
    } else {
      apply_to_more<I>(call.function, ready, out + first, n);
    }
  }
}

// Rows of the innermost dimension that make one run: 1 unless they are short, and each operand has
// those of the dimension before it side by side or, as numbers of channels are, repeated.
BIPER_INLINE int64_t rows_of_run(const ElementwiseCall& call) {
  const int inner = call.dims - 1;
  const int64_t rows = kGathered / max64(call.sizes[inner], 1);
  if (inner < 1 || rows < 2) return 1;
  for (int o = 0; o < call.operands; ++o) {
    const int64_t step = call.strides[o][inner - 1];
    const bool joins = step == 0 || step == call.sizes[inner];
    if (call.strides[o][inner] != 1 || !joins) return 1;
  }
  return rows;
}

// Returns the numbers of whole rows that begin at `from`: those there, or in `tile` copies of one
// row, which are made unless `tiled` says that they are.
BIPER_INLINE const float* whole_rows(const float* from, int64_t step, int64_t length, float* tile,
                                     const float** tiled) {
  if (step != 0) return from;
  if (*tiled != from) {
    for (int64_t at = 0; at + length <= kGathered; at += length) {
      __builtin_memcpy(tile + at, from, static_cast<size_t>(length) * sizeof(float));
    }
    *tiled = from;
  }
  return tile;
}

// Computes the places [first, last) of the output.
template <class I>
static void elementwise(const ElementwiseCall& call, int64_t first, int64_t last) {
  const int inner = call.dims - 1;
  const int64_t length = call.sizes[inner], most_rows = rows_of_run(call);
  alignas(64) float tiles[kMostOperands][kGathered];
  const float* tiled[kMostOperands] = {nullptr, nullptr, nullptr};
  int64_t column = first % length, rest = first / length;
  int64_t index[kMostDims], offset[kMostOperands] = {0, 0, 0};
  for (int d = inner - 1; d >= 0; --d) {
    index[d] = rest % call.sizes[d];
    rest /= call.sizes[d];
    for (int o = 0; o < call.operands; ++o) offset[o] += index[d] * call.strides[o][d];
  }
  while (first < last) {
    int64_t rows = 1;
    if (most_rows > 1 && column == 0) {
      rows = min64(min64(call.sizes[inner - 1] - index[inner - 1], most_rows),
                   (last - first) / length);
    }
    const float* x[kMostOperands];
    if (rows > 1) {
      const int64_t count = rows * length;
      for (int o = 0; o < call.operands; ++o) {
        x[o] = whole_rows(call.x[o] + offset[o], call.strides[o][inner - 1], length, tiles[o],
                          &tiled[o]);
      }
      elementwise_run<I>(call, x, call.out + first, count);
      first += count;
    } else {
      rows = 1;
      const int64_t count = min64(length - column, last - first);
      for (int o = 0; o < call.operands; ++o) {
        x[o] = call.x[o] + offset[o] + column * call.strides[o][inner];
      }
      elementwise_run<I>(call, x, call.out + first, count);
      first += count;
      column = 0;
    }
    for (int d = inner - 1; d >= 0; --d) {
      for (int o = 0; o < call.operands; ++o) offset[o] += rows * call.strides[o][d];
      if ((index[d] += rows) < call.sizes[d]) break;
      index[d] = 0;
      for (int o = 0; o < call.operands; ++o) offset[o] -= call.sizes[d] * call.strides[o][d];
      rows = 1;
    }
  }
}

}  // namespace biper
