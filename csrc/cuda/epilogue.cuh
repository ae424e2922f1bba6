// What becomes of the accumulators of eight neighbouring output channels of one pixel.
//
// The steps, their order and their rounding are those of biper_engine/ops/epilogue.py. Built with
// -fmad=false; the one fused multiply-add is explicit.

#pragma once

#include "bconv.h"
#include "streams.cuh"

namespace biper {

constexpr int kLane = 8;  // channels that one thread finishes at once

// How many of a thread's channels there are, 0 to 8, and whether all are and lie on a boundary of
// 16 bytes in every map.
struct Lane {
  int count;
  bool whole;
};

// Parameters of eight channels, in registers.
struct ChannelScales {
  float multiplier[kLane];
  float bias[kLane];
};

// The block's copy of per-channel parameters, [channels] each, in shared memory.
struct SharedScales {
  float* multiplier;
  float* bias;
  float* slope;
  float* shift;
  float* threshold;
  int* pool_min;   // 1 where the pool takes the minimum
  uint32_t* sign;  // the sign bit where `sense`, else 0
};

constexpr int kSharedVectors = 7;

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

template <int TYPE>
__device__ __forceinline__ void load_some(const void* base, int64_t index, Lane lane,
                                          float (&values)[kLane]) {
  if (lane.whole) {
    load_values<TYPE, kLane>(base, index, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    values[i] = i < lane.count ? load_value<TYPE>(base, index + i) : 0.0f;
  }
}

template <int TYPE>
__device__ __forceinline__ void store_some(void* base, int64_t index, Lane lane,
                                           const float (&values)[kLane]) {
  if (lane.whole) {
    store_values<TYPE, kLane>(base, index, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    if (i < lane.count) store_value<TYPE>(base, index + i, values[i]);
  }
}

__device__ __forceinline__ void load_stream(int type, const void* base, int64_t index, Lane lane,
                                            float (&values)[kLane]) {
  if (type == kFloat16) {
    load_some<kFloat16>(base, index, lane, values);
  } else if (type == kBfloat16) {
    load_some<kBfloat16>(base, index, lane, values);
  } else {
    load_some<kFloat32>(base, index, lane, values);
  }
}

__device__ __forceinline__ void store_stream(int type, void* base, int64_t index, Lane lane,
                                             const float (&values)[kLane]) {
  if (type == kFloat16) {
    store_some<kFloat16>(base, index, lane, values);
  } else if (type == kBfloat16) {
    store_some<kBfloat16>(base, index, lane, values);
  } else {
    store_some<kFloat32>(base, index, lane, values);
  }
}

// By selection, not minimum and maximum, which do not keep the sign of a zero at a limit of zero.
__device__ __forceinline__ float clamp(const ConvEpilogue& epilogue, float v) {
  v = v < epilogue.clamp_min ? epilogue.clamp_min : v;
  return v > epilogue.clamp_max ? epilogue.clamp_max : v;
}

// Bits of eight values: bit i is `values[i] >= threshold[i]`, or `<=` where the sign is set, which
// turns both sides around.
__device__ __forceinline__ uint32_t compare(const float (&values)[kLane], const float* threshold,
                                            const uint32_t* sign) {
  uint32_t byte = 0;
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    const float v = __uint_as_float(__float_as_uint(values[i]) ^ sign[i]);
    const float t = __uint_as_float(__float_as_uint(threshold[i]) ^ sign[i]);
    byte |= v >= t ? 1u << i : 0u;
  }
  return byte;
}

// The float steps for eight channels. Returns the bits, 0 where none leave and
// for channels that there are not.
__device__ __forceinline__ uint32_t finish(const ConvEpilogue& epilogue, const ConvOutputs& outputs,
                                           const SharedScales& scales, const ChannelScales& own,
                                           int channel, int64_t index, Lane lane,
                                           const int (&dots)[kLane]) {
  float v[kLane];
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    v[i] = __fmaf_rn(own.multiplier[i], static_cast<float>(dots[i]), own.bias[i]);
  }
  if (outputs.residual != nullptr && lane.count > 0) {
    float residual[kLane];
    load_stream(outputs.residual_type, outputs.residual, index, lane, residual);
#pragma unroll
    for (int i = 0; i < kLane; ++i) v[i] = __fadd_rn(v[i], residual[i]);
  }
  if (epilogue.slope != nullptr) {
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      v[i] = v[i] < 0.0f ? __fmul_rn(v[i], scales.slope[channel + i]) : v[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i) v[i] = clamp(epilogue, v[i]);
  }
  if (epilogue.shift != nullptr) {
#pragma unroll
    for (int i = 0; i < kLane; ++i) v[i] = __fadd_rn(v[i], scales.shift[channel + i]);
  }
  if (outputs.floats != nullptr && lane.count > 0) {
    store_stream(outputs.float_type, outputs.floats, index, lane, v);
  }
  if (outputs.bits == nullptr) return 0;
  return compare(v, scales.threshold + channel, scales.sign + channel) & ((1u << lane.count) - 1u);
}

// Store eight accumulators as they are.
__device__ __forceinline__ void store_dots(int32_t* base, int64_t index, Lane lane,
                                           const int (&dots)[kLane]) {
  if (lane.whole) {
    int4* to = reinterpret_cast<int4*>(base + index);
    to[0] = make_int4(dots[0], dots[1], dots[2], dots[3]);
    to[1] = make_int4(dots[4], dots[5], dots[6], dots[7]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    if (i < lane.count) base[index + i] = dots[i];
  }
}

}  // namespace biper
