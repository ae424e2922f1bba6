// Kernels of packed maps. All of them only move bytes: one pass, coalesced, 16 bytes per access.
//
// Per 16 bytes of a float map, binarize issues 1 load, 4 or 8 comparisons and as many conversions
// and inserts, and log2(lanes of a word) shuffles: about 40 instructions for 512 bytes per warp. A
// multiprocessor of an H200 needs 27 clocks, or 108 issue slots, to receive those bytes.

#pragma once

#include "divisor.cuh"
#include "maps.h"
#include "streams.cuh"

namespace biper::maps {

constexpr int kMapThreads = 256;
constexpr int kMapVectors = 4;  // 16-byte accesses that a thread has in flight
constexpr int kStridedThreads = 128;
constexpr int kPoolThreads = 128;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct BinarizeParams {
  BinarizeArgs args;
  int64_t pixels;
  int words;
  int block_pixels;       // dense: pixels of a block
  Divisor pixel_vectors;  // dense: 16-byte vectors of a pixel, rounded up to whole words
  Divisor width;          // strided
};

__device__ __forceinline__ uint32_t bit_of(float value, float threshold, bool sense) {
  return sense ? value <= threshold : value >= threshold;
}

// -- floats to bits ------------------------------------------------------------------------------

// The map is dense with channels last, and each pixel is aligned to 16 bytes. A lane reads 16 bytes
// and makes 4 or 8 bits of them; the neighbouring lanes of a word join them by shuffles.
template <int TYPE>
__global__ void __launch_bounds__(kMapThreads) binarize_dense(const BinarizeParams p) {
  constexpr int kValues = 16 / Stream<TYPE>::kBytes;
  constexpr int kWordLanes = 32 / kValues;
  const int64_t first_pixel = static_cast<int64_t>(blockIdx.x) * p.block_pixels;
  const uint32_t vectors = p.block_pixels * p.pixel_vectors.divisor;
  const uint4* x = static_cast<const uint4*>(p.args.x);
  const int stored_vectors = p.args.c / kValues;  // per pixel; the rest only fill a word

  for (uint32_t start = threadIdx.x; start - threadIdx.x < vectors;
       start += kMapThreads * kMapVectors) {
    uint4 raw[kMapVectors];
    int64_t pixel[kMapVectors];
    int vector[kMapVectors];
#pragma unroll
    for (int i = 0; i < kMapVectors; ++i) {
      const uint32_t index = start + i * kMapThreads;
      const uint32_t local = p.pixel_vectors.quotient(index);
      vector[i] = index - local * p.pixel_vectors.divisor;
      pixel[i] = index < vectors ? first_pixel + local : p.pixels;
      raw[i] = {0, 0, 0, 0};
      if (pixel[i] < p.pixels && vector[i] < stored_vectors) {
        raw[i] = x[pixel[i] * stored_vectors + vector[i]];
      }
    }
#pragma unroll
    for (int i = 0; i < kMapVectors; ++i) {
      const int channel = vector[i] * kValues;
      const bool stored = vector[i] < stored_vectors;
      float values[kValues];
      unpack_word<TYPE>(raw[i].x, values);
      unpack_word<TYPE>(raw[i].y, values + kValues / 4);
      unpack_word<TYPE>(raw[i].z, values + kValues / 2);
      unpack_word<TYPE>(raw[i].w, values + kValues / 4 * 3);
      float threshold[kValues] = {};
      uint32_t sense[kValues / 4] = {};  // one byte per channel
      if (p.args.threshold && stored) {
        load_values<kFloat32, kValues>(p.args.threshold, channel, threshold);
      }
      if (p.args.sense && stored) {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(p.args.sense + channel);
#pragma unroll
        for (int j = 0; j < kValues / 4; ++j) sense[j] = from[j];
      }
      uint32_t bits = 0;
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        bits |= bit_of(values[j], threshold[j], (sense[j / 4] >> (j % 4 * 8)) & 1) << j;
      }
      bits = stored ? bits << (channel % 32) : 0;
#pragma unroll
      for (int lane = 1; lane < kWordLanes; lane *= 2) {
        bits |= __shfl_xor_sync(kAllLanes, bits, lane);
      }
      if (pixel[i] < p.pixels && vector[i] % kWordLanes == 0) {
        p.args.bits[pixel[i] * p.words + vector[i] / kWordLanes] = bits;
      }
    }
  }
}

// For any strides. A thread makes one word; lanes run along the pixels of an image, so that planes
// are read in whole cache lines. Blocks: pixels of an image, images, words.
template <int TYPE>
__global__ void __launch_bounds__(kStridedThreads) binarize_strided(const BinarizeParams p) {
  const BinarizeArgs& a = p.args;
  const uint32_t plane = static_cast<uint32_t>(a.h) * a.w;
  const uint32_t pixel = blockIdx.x * kStridedThreads + threadIdx.x;
  if (pixel >= plane) return;
  const int first = blockIdx.z * 32;
  const int count = a.c - first < 32 ? a.c - first : 32;
  const uint32_t y = p.width.quotient(pixel);
  const int64_t within =
      y * a.stride_h + (pixel - y * p.width.divisor) * a.stride_w + first * a.stride_c;
  for (int64_t image = blockIdx.y; image < a.n; image += gridDim.y) {
    const int64_t start = image * a.stride_n + within;
    uint32_t word = 0;
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const float value = load_value<TYPE>(a.x, start + i * a.stride_c);
      const float threshold = a.threshold ? a.threshold[first + i] : 0.0f;
      const bool sense = a.sense ? a.sense[first + i] : false;
      word |= bit_of(value, threshold, sense) << i;
    }
    a.bits[(image * plane + pixel) * p.words + blockIdx.z] = word;
  }
}

// -- bits to floats ------------------------------------------------------------------------------

struct UnbinarizeParams {
  UnbinarizeArgs args;
  int64_t pixels;
  int words;
  int block_pixels;
  Divisor pixel_vectors;  // runs of VALUES channels in a pixel
};

// VALUES: 16 bytes of channels, or 1 if the channels do not fill them.
template <int TYPE, int VALUES>
__global__ void __launch_bounds__(kMapThreads) unbinarize_kernel(const UnbinarizeParams p) {
  const int64_t first_pixel = static_cast<int64_t>(blockIdx.x) * p.block_pixels;
  const uint32_t vectors = p.block_pixels * p.pixel_vectors.divisor;
  for (uint32_t index = threadIdx.x; index < vectors; index += kMapThreads) {
    const uint32_t local = p.pixel_vectors.quotient(index);
    const uint32_t vector = index - local * p.pixel_vectors.divisor;
    const int64_t pixel = first_pixel + local;
    if (pixel >= p.pixels) return;
    const uint32_t channel = vector * VALUES;
    const uint32_t bits = p.args.bits[pixel * p.words + channel / 32] >> (channel % 32);
    float values[VALUES];
#pragma unroll
    for (int i = 0; i < VALUES; ++i) values[i] = (bits >> i) & 1 ? 1.0f : -1.0f;
    const int64_t at = pixel * p.args.c + channel;
    if constexpr (VALUES == 1) {
      store_value<TYPE>(p.args.x, at, values[0]);
    } else {
      store_values<TYPE, VALUES>(p.args.x, at, values);
    }
  }
}

// -- pool ----------------------------------------------------------------------------------------

struct BitPoolParams {
  BitPoolArgs args;
  int words;
  uint32_t last_mask;     // channels of a pixel's last word
  Divisor pixel_vectors;  // runs of VECTOR words in a pixel
  Divisor out_width;
};

template <int VECTOR>
struct Words {
  uint32_t v[VECTOR];
};

template <int VECTOR>
__device__ __forceinline__ Words<VECTOR> load_words(const uint32_t* from) {
  Words<VECTOR> words;
  if constexpr (VECTOR == 4) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    words.v[0] = raw.x, words.v[1] = raw.y, words.v[2] = raw.z, words.v[3] = raw.w;
  } else {
    words.v[0] = *from;
  }
  return words;
}

template <int VECTOR>
__device__ __forceinline__ void store_words(uint32_t* to, const Words<VECTOR>& words) {
  if constexpr (VECTOR == 4) {
    *reinterpret_cast<uint4*>(to) = {words.v[0], words.v[1], words.v[2], words.v[3]};
  } else {
    *to = words.v[0];
  }
}

// A thread makes VECTOR words of one output pixel. Blocks: vectors of an output image, images.
// Dynamic shared memory: the words of `take_and`, if it is given.
template <int VECTOR>
__global__ void __launch_bounds__(kPoolThreads, 6) bit_pool_kernel(const BitPoolParams p) {
  const BitPoolArgs& a = p.args;
  uint32_t* and_words = reinterpret_cast<uint32_t*>(dynamic_shared());
  if (a.take_and) {
    const int lane = threadIdx.x % 32;
    for (int word = threadIdx.x / 32; word < p.words; word += kPoolThreads / 32) {
      const int channel = word * 32 + lane;
      const uint32_t mask = __ballot_sync(kAllLanes, channel < a.c && a.take_and[channel]);
      if (lane == 0) and_words[word] = mask;
    }
    __syncthreads();
  }
  const uint32_t index = blockIdx.x * kPoolThreads + threadIdx.x;
  const uint32_t pixel = p.pixel_vectors.quotient(index);
  const uint32_t word = (index - pixel * p.pixel_vectors.divisor) * VECTOR;
  const int out_y = p.out_width.quotient(pixel);
  const int out_x = p.out_width.remainder(pixel);
  if (out_y >= a.out_h) return;

  const int top = out_y * a.stride_h - a.padding_h, left = out_x * a.stride_w - a.padding_w;
  const int y_begin = top < 0 ? 0 : top, x_begin = left < 0 ? 0 : left;
  const int y_end = top + a.kernel_h < a.h ? top + a.kernel_h : a.h;
  const int x_end = left + a.kernel_w < a.w ? left + a.kernel_w : a.w;
  for (int64_t image = blockIdx.y; image < a.n; image += gridDim.y) {
    Words<VECTOR> any, all;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) any.v[i] = 0, all.v[i] = ~0u;
    for (int y = y_begin; y < y_end; ++y) {
      const uint32_t* row = a.bits + ((image * a.h + y) * a.w) * p.words + word;
      for (int x = x_begin; x < x_end; ++x) {
        const Words<VECTOR> taps = load_words<VECTOR>(row + static_cast<int64_t>(x) * p.words);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) any.v[i] |= taps.v[i], all.v[i] &= taps.v[i];
      }
    }
    if (a.take_and) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        const uint32_t mask = and_words[word + i];
        any.v[i] = (any.v[i] & ~mask) | (all.v[i] & mask);
      }
    }
    if (word + VECTOR == static_cast<uint32_t>(p.words)) any.v[VECTOR - 1] &= p.last_mask;
    const int64_t at = (image * a.out_h + out_y) * a.out_w + out_x;
    store_words<VECTOR>(a.out + at * p.words + word, any);
  }
}

}  // namespace biper::maps
