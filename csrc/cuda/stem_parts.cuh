// Shared parts of the stem's kernels: reading pixels, and finishing sums.

#pragma once

#include "divisor.cuh"
#include "stem.h"
#include "streams.cuh"

namespace biper::stems {

constexpr int kThreads = 128;
constexpr int kGroup = 32;  // output channels of a warp: a word
constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(int(0xff800000u)); }

// -- pixels --------------------------------------------------------------------------------------

// The start of a block's patch in its image.
struct Patch {
  int64_t image;  // elements before the image
  int top, left;
  const float* scale;  // scales of 4 channels in shared memory, then their offsets
};

constexpr int kScaleFloats = 8;

// Copy scales and offsets to shared memory. A barrier must follow.
__device__ __forceinline__ void load_scales(const StemArgs& a, float* shared) {
  if (a.scale == nullptr || threadIdx.x >= 8) return;
  const int c = threadIdx.x % 4;
  const float* from = threadIdx.x < 4 ? a.scale : a.offset;
  shared[threadIdx.x] = c < a.c ? from[c] : 0.0f;
}

// Read one pixel, with zeros outside of the image and beyond its channels. At least SURE channels
// exist. The launcher ensures that an image spans less than 2^31 elements.
template <int IMAGE, int SURE, int CHANNELS>
__device__ __forceinline__ void read_pixel(const StemArgs& a, const Patch& patch, int row,
                                           int column, float (&values)[CHANNELS]) {
  const int y = patch.top + row, x = patch.left + column;
  const bool inside = uint32_t(y) < uint32_t(a.h) && uint32_t(x) < uint32_t(a.w);
  const typename Stream<IMAGE>::Value* image =
      static_cast<const typename Stream<IMAGE>::Value*>(a.x) + patch.image;
  const int at = y * static_cast<int>(a.stride_h) + x * static_cast<int>(a.stride_w);
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const bool there = inside && (c < SURE || c < a.c);
    values[c] = there ? Stream<IMAGE>::load(image[at + c * static_cast<int>(a.stride_c)]) : 0.0f;
  }
}

template <int CHANNELS>
__device__ __forceinline__ void normalise_pixel(const StemArgs& a, const Patch& patch, int row,
                                                int column, float (&values)[CHANNELS]) {
  const int y = patch.top + row, x = patch.left + column;
  const bool inside = uint32_t(y) < uint32_t(a.h) && uint32_t(x) < uint32_t(a.w);
  float scale[4], offset[4];
  load_values<kFloat32, 4>(patch.scale, 0, scale);
  load_values<kFloat32, 4>(patch.scale, 4, offset);
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    values[c] = inside ? __fmaf_rn(values[c], scale[c], offset[c]) : 0.0f;
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

// The parameters of a lane: lane t of four neighbours has the channels from 8 * t on of the
// group.
struct LaneChannels {
  int first;            // first channel
  int count;            // number of channels that exist, from 0 to 8
  bool whole;           // all exist, and are aligned to 16 bytes in every pixel
  const float* shared;  // the lane's values in the first of the arrays of load_channels
  int array;            // floats between these arrays
};

// Copy the parameters of each channel to shared memory, in three arrays of `groups` groups from
// `group` on: bias, sign and limit of the comparison. `bit` is value * sign + limit >= 0. A barrier
// must follow.
//
// The sign is -1 if `sense` and else 1, and the limit is -sign * threshold. The sum is rounded once
// and has the sign of the exact sum. It is +0 if both are equal: the limit of a threshold of 0 is
// +0, and -0 + 0 is +0. The bit is therefore the inverted sign bit. The limit is minus infinity for
// channels that do not exist, and for NaN.
constexpr int kChannelArrays = 3;

__device__ __forceinline__ void load_channels(const StemArgs& a, int group, int groups,
                                              float* shared) {
  const int array = groups * kGroup;
  for (int i = threadIdx.x; i < array; i += blockDim.x) {
    const int channel = group * kGroup + i;
    const bool there = channel < a.o;
    const float threshold = there && a.threshold ? a.threshold[channel] : 0.0f;
    const bool sense = there && a.sense && a.sense[channel];
    const bool never = !there || threshold != threshold;
    shared[i] = there && a.bias ? a.bias[channel] : 0.0f;
    shared[array + i] = sense ? -1.0f : 1.0f;
    shared[2 * array + i] = never ? minus_infinity() : 0.0f + (sense ? threshold : -threshold);
  }
}

// Return the parameters of local group `group` of `groups`, which is group `all_group` overall.
__device__ __forceinline__ LaneChannels lane_channels(const StemArgs& a, int group, int groups,
                                                      int all_group, const float* shared) {
  LaneChannels lane;
  lane.first = all_group * kGroup + threadIdx.x % 4 * 8;
  lane.count = a.o - lane.first < 0 ? 0 : a.o - lane.first > 8 ? 8 : a.o - lane.first;
  lane.whole = lane.count == 8 && a.o % 8 == 0;
  lane.shared = shared + group * kGroup + threadIdx.x % 4 * 8;
  lane.array = groups * kGroup;
  return lane;
}

struct ChannelValues {
  float bias[8], sign[8], limit[8];
};

__device__ __forceinline__ void load_channel_values(const LaneChannels& lane,
                                                    ChannelValues& channels) {
  load_values<kFloat32, 8>(lane.shared, 0, channels.bias);
  load_values<kFloat32, 8>(lane.shared + lane.array, 0, channels.sign);
  load_values<kFloat32, 8>(lane.shared + 2 * lane.array, 0, channels.limit);
}

// The destination of a lane's channels of a pixel.
template <int COMPUTE>
struct Destination {
  typename Stream<COMPUTE>::Value* out;
  uint32_t* bits;

  __device__ __forceinline__ Destination(const StemArgs& a, const LaneChannels& lane, int64_t pixel)
      : out(static_cast<typename Stream<COMPUTE>::Value*>(a.out) + pixel * a.o + lane.first),
        bits(a.bits + pixel * ((a.o + 31) / 32) + lane.first / kGroup) {}

  __device__ __forceinline__ void advance(const StemArgs& a, int pixels) {
    out += static_cast<int64_t>(pixels) * a.o;
    bits += static_cast<int64_t>(pixels) * ((a.o + 31) / 32);
  }
};

// Add the bias, clamp, and store floats and bits of the pooled sums of a pixel. All lanes of a warp
// take part; the four of a pixel are neighbours. The bias follows the pool: rounding is monotonic.
template <int COMPUTE>
__device__ __forceinline__ void emit(const StemArgs& a, const LaneChannels& lane,
                                     const ChannelValues& channels, const Destination<COMPUTE>& to,
                                     bool valid, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[i] = fminf(fmaxf(values[i] + channels.bias[i], a.clamp_min), a.clamp_max);
  }
  if (a.out && valid) {
    if (lane.whole) {
      store_values<COMPUTE, 8>(to.out, 0, values);
    } else {
#pragma unroll 1
      for (int i = 0; i < lane.count; ++i) {
        // A loop over registers would need them in memory.
        float value = values[0];
#pragma unroll
        for (int j = 1; j < 8; ++j) value = i == j ? values[j] : value;
        store_value<COMPUTE>(to.out, i, value);
      }
    }
  }
  if (a.bits == nullptr) return;
  uint32_t below = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    const float distance = fmaf(values[i], channels.sign[i], channels.limit[i]);
    below = __funnelshift_l(__float_as_uint(distance), below, 1);
  }
  uint32_t word = (below ^ 0xff) << (threadIdx.x % 4 * 8);
  word |= __shfl_xor_sync(kAllLanes, word, 1);
  word |= __shfl_xor_sync(kAllLanes, word, 2);
  if (valid && threadIdx.x % 4 == 0) *to.bits = word;
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

// The four tiles of a lane hold 8 neighbouring channels for row `half` and `half` + 8.
__device__ __forceinline__ void lane_values(const float (&sums)[4][4], int half,
                                            float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = sums[i / 2][2 * half + i % 2];
}

}  // namespace biper::stems
