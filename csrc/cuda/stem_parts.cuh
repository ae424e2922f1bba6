// What the kernels of the stem share: reading pixels, and what becomes of finished sums.

#pragma once

#include "divisor.cuh"
#include "stem.h"
#include "streams.cuh"

namespace biper::stems {

constexpr int kThreads = 128;
constexpr int kGroup = 32;  // output channels of a warp: a word
constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(int(0xff800000u)); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// -- pixels --------------------------------------------------------------------------------------

// The image of a block, and where its patch starts in it.
struct Patch {
  int64_t image;
  int top, left;
};

// One pixel, normalised, zeros outside of the image and beyond its channels.
template <int IMAGE, int CHANNELS>
__device__ __forceinline__ void read_pixel(const StemArgs& a, const Patch& patch, int row,
                                           int column, float (&values)[CHANNELS]) {
  const int y = patch.top + row, x = patch.left + column;
  const bool inside = uint32_t(y) < uint32_t(a.h) && uint32_t(x) < uint32_t(a.w);
  const int64_t at = patch.image * a.stride_n + y * a.stride_h + x * a.stride_w;
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    values[c] = inside && c < a.c ? load_value<IMAGE>(a.x, at + c * a.stride_c) : 0.0f;
  }
  if (a.scale == nullptr) return;
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    if (inside && c < a.c) values[c] = values[c] * a.scale[c] + a.offset[c];
  }
}

// Call load with the image's type as a constant.
template <class Load>
__device__ __forceinline__ void with_image_type(int type, const Load& load) {
  if (type == kFloat32) {
    load(Stream<kFloat32>{});
  } else if (type == kFloat16) {
    load(Stream<kFloat16>{});
  } else if (type == kBfloat16) {
    load(Stream<kBfloat16>{});
  } else {
    load(Stream<kUint8>{});
  }
}

// -- finished sums -------------------------------------------------------------------------------

// What a lane keeps of the parameters: lane t of four neighbours has channels 8 * t and on of the
// group. Channels that are not there have a threshold that no value meets.
struct LaneChannels {
  int first;       // channel
  int count;       // from 0 to 8
  uint32_t sense;  // a bit for each
};

__device__ __forceinline__ LaneChannels lane_channels(const StemArgs& a, int group) {
  LaneChannels lane;
  lane.first = group * kGroup + (threadIdx.x % 4) * 8;
  lane.count = a.o - lane.first < 0 ? 0 : a.o - lane.first > 8 ? 8 : a.o - lane.first;
  lane.sense = 0;
  if (a.sense) {
    for (int i = 0; i < lane.count; ++i) lane.sense |= uint32_t(a.sense[lane.first + i]) << i;
  }
  return lane;
}

// Thresholds, then biases, of `groups` from `group` on to shared memory. A barrier must follow.
__device__ __forceinline__ void load_channels(const StemArgs& a, int group, int groups,
                                              float* shared) {
  for (int i = threadIdx.x; i < groups * kGroup; i += blockDim.x) {
    const int channel = group * kGroup + i;
    const bool there = channel < a.o;
    shared[i] = !there ? not_a_number() : a.threshold ? a.threshold[channel] : 0.0f;
    shared[groups * kGroup + i] = there && a.bias ? a.bias[channel] : 0.0f;
  }
}

// Clamp and store the pooled sums of a pixel, and their bits. All lanes of a warp take part; the
// four of a pixel are neighbours. `thresholds` are the lane's own.
template <int COMPUTE>
__device__ __forceinline__ void emit(const StemArgs& a, const LaneChannels& lane,
                                     const float* thresholds, int64_t pixel, bool valid,
                                     float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = fminf(fmaxf(values[i], a.clamp_min), a.clamp_max);
  if (a.out && valid) {
    const int64_t at = pixel * a.o + lane.first;
    if (lane.count == 8 && a.o % 8 == 0) {
      store_values<COMPUTE, 8>(a.out, at, values);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < lane.count) store_value<COMPUTE>(a.out, at + i, values[i]);
      }
    }
  }
  if (a.bits == nullptr) return;
  float limits[8];
  load_values<kFloat32, 8>(thresholds, 0, limits);
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool bit = (lane.sense >> i) & 1 ? values[i] <= limits[i] : values[i] >= limits[i];
    word |= uint32_t(bit) << i;
  }
  word <<= threadIdx.x % 4 * 8;
  word |= __shfl_xor_sync(kAllLanes, word, 1);
  word |= __shfl_xor_sync(kAllLanes, word, 2);
  const int group = lane.first / kGroup;
  if (valid && threadIdx.x % 4 == 0) a.bits[pixel * ((a.o + 31) / 32) + group] = word;
}

// -- products ------------------------------------------------------------------------------------

template <int COMPUTE>
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  if constexpr (COMPUTE == kFloat16) {
    hmma_f16(sums, a, b);
  } else {
    hmma_bf16(sums, a, b);
  }
}

// `bias` is the lane's own.
__device__ __forceinline__ void start_sums(const float* bias, float (&sums)[4][4]) {
  float values[8];
  load_values<kFloat32, 8>(bias, 0, values);
#pragma unroll
  for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = values[i / 4 * 2 + i % 2];
}

// The four tiles of a lane hold 8 neighbouring channels for row `half` and `half` + 8.
__device__ __forceinline__ void lane_values(const float (&sums)[4][4], int half,
                                            float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = sums[i / 2][2 * half + i % 2];
}

}  // namespace biper::stems
