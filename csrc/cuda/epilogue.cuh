// The epilogue for the accumulators of eight neighbouring output channels of one pixel.
//
// The steps, their order and their rounding follow biper_engine/ops/epilogue.py. The file is built
// with -fmad=false; every fused multiply-add is explicit.
//
// An output takes about 12 instructions here. A network on bits executes these more than any
// others, so the steps are chosen to need few instructions:
//
// - A clamp is a minimum and a maximum, unless a limit is zero: these do not keep a zero's sign.
// - A bit `v >= t` is the sign of v - t, which rounding does not change. One funnel shift moves it
//   into the byte. Zero minus zero must be +0, so the addend is +0 for t = 0 of any sign. `v <= t`
//   is the sign of t - v. A factor of +-1 and one addend give both: fma(v, factor, addend).

#pragma once

#include "bconv.h"
#include "streams.cuh"

namespace biper {

constexpr int kLane = 8;  // channels that one thread finishes at once

// How many of a thread's channels exist, 0 to 8, and whether all exist and are aligned to 16 bytes
// in every map.
struct Lane {
  int count;
  bool whole;
};

// The block's copy of per-channel parameters, in shared memory.
struct SharedScales {
  float* multiplier;
  float* bias;
  float* slope;
  float* shift;
  float* factor;  // factor of the comparison with the threshold
  float* addend;
  int* pool_min;  // 1 if the pool takes the minimum
};

constexpr int kSharedVectors = 7;

struct Comparison {
  float factor, addend;
};

// The numbers that turn `v >= threshold`, or `<=` if `sense`, into a sign: see above.
__device__ __forceinline__ Comparison comparison(float threshold, bool sense) {
  const float addend = sense ? threshold : -threshold;
  return {sense ? -1.0f : 1.0f, threshold == 0.0f ? 0.0f : addend};
}

__device__ __forceinline__ void load_vector(const float* from, float (&values)[kLane]) {
#pragma unroll
  for (int i = 0; i < kLane / 4; ++i) {
    const float4 four = reinterpret_cast<const float4*>(from)[i];
    values[4 * i] = four.x;
    values[4 * i + 1] = four.y;
    values[4 * i + 2] = four.z;
    values[4 * i + 3] = four.w;
  }
}

__device__ __forceinline__ void load_integers(const int* from, int (&values)[kLane]) {
#pragma unroll
  for (int i = 0; i < kLane / 4; ++i) {
    const int4 four = reinterpret_cast<const int4*>(from)[i];
    values[4 * i] = four.x;
    values[4 * i + 1] = four.y;
    values[4 * i + 2] = four.z;
    values[4 * i + 3] = four.w;
  }
}

// Load eight values of a map, or only those that exist.
template <int TYPE, bool WHOLE>
__device__ __forceinline__ void load_lane(const void* base, int64_t index, Lane lane,
                                          float (&values)[kLane]) {
  if (WHOLE) {
    if (lane.whole) load_values<TYPE, kLane>(base, index, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    values[i] = i < lane.count ? load_value<TYPE>(base, index + i) : 0.0f;
  }
}

template <int TYPE, bool WHOLE>
__device__ __forceinline__ void store_lane(void* base, int64_t index, Lane lane,
                                           const float (&values)[kLane]) {
  if (WHOLE) {
    if (lane.whole) store_values<TYPE, kLane>(base, index, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    if (i < lane.count) store_value<TYPE>(base, index + i, values[i]);
  }
}

// The same if the type of the map is only known at run time.
__device__ __forceinline__ void load_any(int type, const void* base, int64_t index, Lane lane,
                                         float (&values)[kLane]) {
  if (type == kFloat16) {
    load_lane<kFloat16, false>(base, index, lane, values);
  } else if (type == kBfloat16) {
    load_lane<kBfloat16, false>(base, index, lane, values);
  } else {
    load_lane<kFloat32, false>(base, index, lane, values);
  }
}

__device__ __forceinline__ void store_any(int type, void* base, int64_t index, Lane lane,
                                          const float (&values)[kLane]) {
  if (type == kFloat16) {
    store_lane<kFloat16, false>(base, index, lane, values);
  } else if (type == kBfloat16) {
    store_lane<kBfloat16, false>(base, index, lane, values);
  } else {
    store_lane<kFloat32, false>(base, index, lane, values);
  }
}

__device__ __forceinline__ void clamp(const ConvEpilogue& epilogue, float (&v)[kLane]) {
  const float low = epilogue.clamp_min, high = epilogue.clamp_max;
  if (low == 0.0f || high == 0.0f) {
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      v[i] = v[i] < low ? low : v[i];
      v[i] = v[i] > high ? high : v[i];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) v[i] = fminf(fmaxf(v[i], low), high);
}

// Activation and shift.
__device__ __forceinline__ void activate(const ConvEpilogue& epilogue, const SharedScales& scales,
                                         int channel, float (&v)[kLane]) {
  if (epilogue.slope != nullptr) {
    float slope[kLane];
    load_vector(scales.slope + channel, slope);
#pragma unroll
    for (int i = 0; i < kLane; ++i) v[i] = v[i] < 0.0f ? __fmul_rn(v[i], slope[i]) : v[i];
  } else {
    clamp(epilogue, v);
  }
  if (epilogue.shift != nullptr) {
    float shift[kLane];
    load_vector(scales.shift + channel, shift);
#pragma unroll
    for (int i = 0; i < kLane; ++i) v[i] = __fadd_rn(v[i], shift[i]);
  }
}

// Return the bits of eight values.
__device__ __forceinline__ uint32_t compare(const ConvEpilogue& epilogue,
                                            const SharedScales& scales, int channel,
                                            const float (&v)[kLane]) {
  uint32_t negative = 0;
  if (epilogue.threshold == nullptr) {
#pragma unroll
    for (int i = kLane - 1; i >= 0; --i) {
      negative = __funnelshift_l(__float_as_uint(__fadd_rn(v[i], 0.0f)), negative, 1);
    }
  } else {
    float factor[kLane], addend[kLane];
    load_vector(scales.factor + channel, factor);
    load_vector(scales.addend + channel, addend);
#pragma unroll
    for (int i = kLane - 1; i >= 0; --i) {
      const float difference = __fmaf_rn(v[i], factor[i], addend[i]);
      negative = __funnelshift_l(__float_as_uint(difference), negative, 1);
    }
  }
  return ~negative & 0xffu;
}

// Return the bits of eight accumulators by their limits; see ConvEpilogue.
__device__ __forceinline__ uint32_t within(const int* first, const int* span,
                                           const int (&dots)[kLane]) {
  int firsts[kLane], spans[kLane];
  load_integers(first, firsts);
  load_integers(span, spans);
  uint32_t byte = 0;
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    const uint32_t beyond = static_cast<uint32_t>(dots[i] - firsts[i]);
    byte |= beyond <= static_cast<uint32_t>(spans[i]) ? 1u << i : 0u;
  }
  return byte;
}

// Store accumulators as they are.
__device__ __forceinline__ void store_dots(int32_t* base, int64_t index, Lane lane,
                                           const int (&dots)[kLane]) {
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    if (i < lane.count) base[index + i] = dots[i];
  }
}

}  // namespace biper
