// Mean over an image, then a linear layer.
//
// A block computes a slice of the classes for IMAGES images. It reads its images once, 16 bytes per
// lane, with several rows of lanes that share the pixels, and stores the means in shared memory.
// Then each warp multiplies two classes at a time, with lanes along the channels. The weights are
// read once for all images of the block, 16 bytes per lane. One reduction sums over the lanes and
// distributes the results among them: 16 sums in 16 shuffles.
//
// For 512 channels, 7x7, 1000 classes in float16, the map of an image has 50 KB and the weights
// 1 MB. At batch 256, with 8 images and 200 classes per block, the map is read 5 times and the
// weights 32 times, all but once from L2: 96 MB, 17 us at 5.5 TB/s, or 0.07 us per image. For two
// classes, a lane loads 16 * 8 means of 4 bytes from shared memory, 64 clocks per class and 8
// images: 16 K clocks of each of 132 multiprocessors, 9 us; multiply-adds take half of that.

#pragma once

#include "pooled_linear.h"
#include "streams.cuh"

namespace biper::linear {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Params {
  PooledLinearArgs args;
  int slice;    // classes of a block
  int vectors;  // vectors of a pixel
  int turns;    // threads that share a vector of a pixel
};

// VALUES channels are read together: 16 bytes, or 1 value if the channels do not fill these.
template <int TYPE, int VALUES>
__device__ __forceinline__ void load_run(const void* from, int64_t index, float (&values)[VALUES]) {
  if constexpr (VALUES == 1) {
    values[0] = load_value<TYPE>(from, index);
  } else if constexpr (VALUES * Stream<TYPE>::kBytes == 4 || VALUES * Stream<TYPE>::kBytes == 8 ||
                       VALUES * Stream<TYPE>::kBytes % 16 == 0) {
    load_values<TYPE, VALUES>(from, index, values);
  }
}

__device__ __forceinline__ float load_as(const void* from, int type, int64_t index) {
  if (type == kFloat16) return load_value<kFloat16>(from, index);
  if (type == kBfloat16) return load_value<kBfloat16>(from, index);
  return load_value<kFloat32>(from, index);
}

// Store the means of image `image` in means[c]. `partial` is [turns, VALUES, vectors]: lanes write
// neighbouring values.
template <int TYPE, int VALUES>
__device__ __forceinline__ void pool_image(const Params& p, int64_t image, float* partial,
                                           float* means) {
  const PooledLinearArgs& a = p.args;
  const int pixels = a.h * a.w;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.turns * p.vectors; i += kThreads) {
    const int turn = i / p.vectors, vector = i - turn * p.vectors;
    float sums[VALUES] = {};
#pragma unroll 4
    for (int pixel = turn; pixel < pixels; pixel += p.turns) {
      float values[VALUES];
      load_run<TYPE, VALUES>(a.x, (image * pixels + pixel) * a.c + vector * VALUES, values);
#pragma unroll
      for (int j = 0; j < VALUES; ++j) sums[j] += values[j];
    }
#pragma unroll
    for (int j = 0; j < VALUES; ++j) partial[turn * a.c + j * p.vectors + vector] = sums[j];
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < a.c; i += kThreads) {
    const int j = i / p.vectors, vector = i - j * p.vectors;
    float sum = partial[i];
#pragma unroll 1
    for (int turn = 1; turn < p.turns; ++turn) sum += partial[turn * a.c + i];
    means[vector * VALUES + j] = sum / static_cast<float>(pixels);
  }
  __syncthreads();  // before the next image writes to `partial`
}

// Return the sum over all lanes of value `lane / (32 / COUNT)`. COUNT is a power of two. In each
// step, half of the values are exchanged with the other half of the lanes, until one is left.
// OTHER: distance in lanes to that half.
template <int COUNT, int OTHER = 16>
__device__ __forceinline__ float sum_of_lanes(const float (&values)[COUNT]) {
  if constexpr (OTHER == 0) {
    return values[0];
  } else if constexpr (COUNT == 1) {
    const float sum[1] = {values[0] + __shfl_xor_sync(kAllLanes, values[0], OTHER)};
    return sum_of_lanes<1, OTHER / 2>(sum);
  } else {
    const bool upper = threadIdx.x & OTHER;
    float sums[COUNT / 2];
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      const float low = values[i], high = values[i + COUNT / 2];
      sums[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, OTHER);
    }
    return sum_of_lanes<COUNT / 2, OTHER / 2>(sums);
  }
}

constexpr int kClasses = 2;  // classes of a warp at a time

// Compute sums[IMAGES * class + image]. A class beyond the last gets the sums of the last.
template <int WEIGHT, int VALUES, int IMAGES>
__device__ __forceinline__ void class_sums(const Params& p, int first, const float* means,
                                           float (&sums)[kClasses * IMAGES]) {
  const PooledLinearArgs& a = p.args;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kClasses * IMAGES; ++i) sums[i] = 0.0f;
#pragma unroll 2
  for (int c = lane * VALUES; c < a.c; c += 32 * VALUES) {
    float weight[kClasses][VALUES];
#pragma unroll
    for (int k = 0; k < kClasses; ++k) {
      const int64_t row = first + k < a.classes ? first + k : a.classes - 1;
      load_run<WEIGHT, VALUES>(a.weight, row * a.c + c, weight[k]);
    }
#pragma unroll
    for (int image = 0; image < IMAGES; ++image) {
      float mean[VALUES];
      load_run<kFloat32, VALUES>(means + image * a.c, c, mean);
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
        float& sum = sums[IMAGES * k + image];
#pragma unroll
        for (int j = 0; j < VALUES; ++j) sum = fmaf(mean[j], weight[k][j], sum);
      }
    }
  }
}

// Blocks: runs of IMAGES images, slices of classes. VALUES values are at least 16 bytes of x or of
// the weights, and whole accesses of the other; or VALUES is 1.
// Dynamic shared memory: means [IMAGES, c], then sums of turns [turns, c].
template <int TYPE, int WEIGHT, int VALUES, int IMAGES>
__global__ void __launch_bounds__(kThreads, 2) pooled_linear_kernel(const Params p) {
  const PooledLinearArgs& a = p.args;
  float* means = reinterpret_cast<float*>(dynamic_shared());
  float* partial = means + IMAGES * a.c;
  const int64_t first_image = static_cast<int64_t>(blockIdx.x) * IMAGES;
#pragma unroll 1
  for (int image = 0; image < IMAGES; ++image) {
    // Beyond the last image, its means are computed again, but the results are not stored.
    const int64_t index = first_image + image < a.n ? first_image + image : a.n - 1;
    pool_image<TYPE, VALUES>(p, index, partial, means + image * a.c);
  }
  const int slice = blockIdx.y * p.slice;
  const int end = a.classes - slice < p.slice ? a.classes : slice + p.slice;
  constexpr int kSums = kClasses * IMAGES, kSumLanes = 32 / kSums;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = slice + threadIdx.x / 32 * kClasses; first < end; first += kWarps * kClasses) {
    float sums[kSums];
    class_sums<WEIGHT, VALUES, IMAGES>(p, first, means, sums);
    float sum = sum_of_lanes(sums);
    const int k = first + lane / kSumLanes / IMAGES;
    const int64_t image = first_image + lane / kSumLanes % IMAGES;
    if (lane % kSumLanes || k >= end || image >= a.n) continue;
    if (a.bias) sum += load_as(a.bias, a.bias_type, k);
    store_value<TYPE>(a.out, image * a.classes + k, sum);
  }
}

}  // namespace biper::linear
