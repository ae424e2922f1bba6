// The gradient of a sign whose activations are scaled per sample.
//
// With n values x of a sample, their mean m, r = (variance + epsilon)^-1/2, u = r * x, g the
// gradient of the sign and w(u) the surrogate's window:
//
//   out = r * w(u) * g - (x - m) * r^3 * sum(w(u) * g * x) / (n - 1)
//
// Three sums and the result make four passes over a sample, which a level 2 cache holds: memory is
// read once and written once. Values go to kSampleLanes lanes in turn, whatever the vector set; a
// lane sums kSampleRows of them in float, the rest is in double. So all instruction sets have equal
// bytes.
#pragma once

#include "vectors.h"

namespace biper {

constexpr int kSampleLanes = 32;
constexpr int64_t kSampleRows = 128;

// Returns the sum of term(x, g) over rows of kSampleLanes values.
template <class I, class Term>
BIPER_INLINE double sum_rows(const float* x, const float* g, int64_t rows, const Term& term) {
  constexpr int kParts = kSampleLanes / I::kFloats;
  double total = 0.0;
  for (int64_t start = 0; start < rows; start += kSampleRows) {
    typename I::Float lanes[kParts];
    BIPER_UNROLL
    for (int p = 0; p < kParts; ++p) lanes[p] = I::broadcast(0.0f);
    const int64_t end = min64(rows, start + kSampleRows);
    for (int64_t row = start; row < end; ++row) {
      BIPER_UNROLL
      for (int p = 0; p < kParts; ++p) {
        const int64_t at = row * kSampleLanes + p * I::kFloats;
        lanes[p] = I::add(lanes[p], term(I::load(x + at), I::load(g + at)));
      }
    }
    alignas(64) float sums[kSampleLanes];
    BIPER_UNROLL
    for (int p = 0; p < kParts; ++p) I::store(sums + p * I::kFloats, lanes[p]);
    for (int l = 0; l < kSampleLanes; ++l) total += static_cast<double>(sums[l]);
  }
  return total;
}

// Returns the gradient g within the window; NaN where x or g is NaN.
template <class I, Surrogate kSurrogate>
BIPER_INLINE typename I::Float windowed(typename I::Float x, typename I::Float g,
                                        typename I::Float scale) {
  using Float = typename I::Float;
  if (kSurrogate == Surrogate::kIdentity) return g;
  const Float zero = I::broadcast(0.0f), u = I::multiply(x, scale);
  const Float size = I::at_least_or(u, I::subtract(zero, u));
  if (kSurrogate == Surrogate::kClip) {
    const Float inside = I::subtract(I::broadcast(1.0f), size);
    return I::multiply(I::where_negative(inside, zero, I::broadcast(1.0f)), g);
  }
  const Float room = I::subtract(I::broadcast(2.0f), I::add(size, size));
  return I::multiply(I::at_least_or(room, zero), g);
}

// The last values of a sample, fewer than kSampleLanes, and others that add nothing to a sum.
struct LastValues {
  alignas(64) float x[kSampleLanes];
  alignas(64) float g[kSampleLanes];
  alignas(64) float out[kSampleLanes];
};

template <class I, Surrogate kSurrogate>
static void sign_gradient_sample(const SignGradientCall& call, int64_t sample) {
  using Float = typename I::Float;
  const int64_t n = call.length, rows = n / kSampleLanes, whole = rows * kSampleLanes;
  const float *x = call.x + sample * n, *g = call.gradient + sample * n;
  float* out = call.out + sample * n;
  const size_t rest_bytes = static_cast<size_t>(n - whole) * sizeof(float);
  LastValues last = {};
  __builtin_memcpy(last.x, x + whole, rest_bytes);
  __builtin_memcpy(last.g, g + whole, rest_bytes);
  const auto sum_all = [&](const auto& term) {
    return sum_rows<I>(x, g, rows, term) + sum_rows<I>(last.x, last.g, rest_bytes > 0, term);
  };

  const double total = sum_all([](Float value, Float) { return value; });
  const float mean = static_cast<float>(total / static_cast<double>(n));
  for (int64_t l = n - whole; l < kSampleLanes; ++l) last.x[l] = mean;
  const Float means = I::broadcast(mean);
  const double squares = sum_all([&](Float value, Float) {
    const Float centred = I::subtract(value, means);
    return I::multiply(centred, centred);
  });
  const double degrees = static_cast<double>(n - 1);
  const double scale = 1.0 / __builtin_sqrt(squares / degrees + call.epsilon);
  const Float scales = I::broadcast(static_cast<float>(scale));
  const double dot = sum_all([&](Float value, Float gradient) {
    return I::multiply(windowed<I, kSurrogate>(value, gradient, scales), value);
  });
  const Float pull = I::broadcast(static_cast<float>(dot * (scale * scale * scale) / degrees));

  const auto write = [&](const float* values, const float* gradients, float* to, int64_t count) {
    for (int64_t at = 0; at < count; at += I::kFloats) {
      const Float value = I::load(values + at);
      const Float gradient = windowed<I, kSurrogate>(value, I::load(gradients + at), scales);
      const Float through = I::multiply(I::subtract(value, means), pull);
      I::store(to + at, I::subtract(I::multiply(gradient, scales), through));
    }
  };
  write(x, g, out, whole);
  write(last.x, last.g, last.out, rest_bytes > 0 ? kSampleLanes : 0);
  __builtin_memcpy(out + whole, last.out, rest_bytes);
}

template <class I>
static void sign_gradient(const SignGradientCall& call, int64_t first, int64_t last) {
  for (int64_t sample = first; sample < last; ++sample) {
    if (call.surrogate == Surrogate::kBireal) {
      sign_gradient_sample<I, Surrogate::kBireal>(call, sample);
    } else if (call.surrogate == Surrogate::kClip) {
      sign_gradient_sample<I, Surrogate::kClip>(call, sample);
    } else {
      sign_gradient_sample<I, Surrogate::kIdentity>(call, sample);
    }
  }
}

}  // namespace biper
