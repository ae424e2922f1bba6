// Values of float maps and images, read and written as float32 for any storage type.
//
// Stores round to nearest, ties to even. Several neighbours move in accesses of up to 16 bytes; the
// caller must ensure that the first of them is aligned to the size of the access.

#pragma once

#include <cstring>

#include "platform.cuh"
#include "types.h"

namespace biper {

template <int TYPE>
struct Stream;

template <>
struct Stream<kFloat32> {
  static constexpr int kType = kFloat32;
  using Value = float;
  static constexpr int kBytes = 4;
  __device__ __forceinline__ static float load(Value value) { return value; }
  __device__ __forceinline__ static Value store(float value) { return value; }
};

template <>
struct Stream<kFloat16> {
  static constexpr int kType = kFloat16;
  using Value = uint16_t;
  static constexpr int kBytes = 2;
  __device__ __forceinline__ static float load(Value value) { return half_to_float(value); }
  __device__ __forceinline__ static Value store(float value) { return float_to_half(value); }
};

template <>
struct Stream<kBfloat16> {
  static constexpr int kType = kBfloat16;
  using Value = uint16_t;
  static constexpr int kBytes = 2;
  __device__ __forceinline__ static float load(Value value) { return bfloat_to_float(value); }
  __device__ __forceinline__ static Value store(float value) { return float_to_bfloat(value); }
};

// For images only: nothing is stored as bytes.
template <>
struct Stream<kUint8> {
  static constexpr int kType = kUint8;
  using Value = uint8_t;
  static constexpr int kBytes = 1;
  __device__ __forceinline__ static float load(Value value) { return static_cast<float>(value); }
};

// -- one value -----------------------------------------------------------------------------------

template <int TYPE>
__device__ __forceinline__ float load_value(const void* base, int64_t index) {
  return Stream<TYPE>::load(static_cast<const typename Stream<TYPE>::Value*>(base)[index]);
}

template <int TYPE>
__device__ __forceinline__ void store_value(void* base, int64_t index, float value) {
  static_cast<typename Stream<TYPE>::Value*>(base)[index] = Stream<TYPE>::store(value);
}

// -- values that share a word --------------------------------------------------------------------

template <int TYPE>
__device__ __forceinline__ void unpack_word(uint32_t word, float* values) {
  if (TYPE == kFloat32) {
    memcpy(values, &word, sizeof(float));
    return;
  }
  constexpr int kBits = 8 * Stream<TYPE>::kBytes;
#pragma unroll
  for (int i = 0; i < 4 / Stream<TYPE>::kBytes; ++i) {
    using Value = typename Stream<TYPE>::Value;
    values[i] = Stream<TYPE>::load(static_cast<Value>(word >> (i * kBits % 32)));
  }
}

template <int TYPE>
__device__ __forceinline__ uint32_t pack_word(const float* values) {
  uint32_t word = 0;
  if (TYPE == kFloat32) {
    memcpy(&word, values, sizeof(word));
    return word;
  }
#ifdef __CUDACC__
  // One instruction for the pair; not every compiler merges two conversions into one.
  if constexpr (TYPE == kFloat16) {
    const __half2 pair = __floats2half2_rn(values[0], values[1]);
    memcpy(&word, &pair, sizeof(word));
    return word;
  } else if constexpr (TYPE == kBfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
    memcpy(&word, &pair, sizeof(word));
    return word;
  }
#endif
  const uint32_t low = static_cast<uint32_t>(Stream<TYPE>::store(values[0]));
  const uint32_t high = static_cast<uint32_t>(Stream<TYPE>::store(values[1]));
  return low | high << 16;
}

// -- neighbours in memory ------------------------------------------------------------------------

// Load COUNT values from `index` on. Together they are 4, 8 or a multiple of 16 bytes.
template <int TYPE, int COUNT>
__device__ __forceinline__ void load_values(const void* base, int64_t index,
                                            float (&values)[COUNT]) {
  constexpr int kBytes = COUNT * Stream<TYPE>::kBytes;
  static_assert(kBytes == 4 || kBytes == 8 || kBytes % 16 == 0, "whole accesses");
  constexpr int kEach = 4 / Stream<TYPE>::kBytes;
  const unsigned char* from =
      static_cast<const unsigned char*>(base) + index * Stream<TYPE>::kBytes;
  if (kBytes == 4) {
    unpack_word<TYPE>(*reinterpret_cast<const uint32_t*>(from), values);
  } else if (kBytes == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    unpack_word<TYPE>(words.x, values);
    unpack_word<TYPE>(words.y, values + kEach);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 words = reinterpret_cast<const uint4*>(from)[i];
      unpack_word<TYPE>(words.x, values + (4 * i) * kEach);
      unpack_word<TYPE>(words.y, values + (4 * i + 1) * kEach);
      unpack_word<TYPE>(words.z, values + (4 * i + 2) * kEach);
      unpack_word<TYPE>(words.w, values + (4 * i + 3) * kEach);
    }
  }
}

// Store the same values, each rounded to the stored type.
template <int TYPE, int COUNT>
__device__ __forceinline__ void store_values(void* base, int64_t index,
                                             const float (&values)[COUNT]) {
  constexpr int kBytes = COUNT * Stream<TYPE>::kBytes;
  static_assert(kBytes == 4 || kBytes == 8 || kBytes % 16 == 0, "whole accesses");
  constexpr int kEach = 4 / Stream<TYPE>::kBytes;
  unsigned char* to = static_cast<unsigned char*>(base) + index * Stream<TYPE>::kBytes;
  if (kBytes == 4) {
    *reinterpret_cast<uint32_t*>(to) = pack_word<TYPE>(values);
  } else if (kBytes == 8) {
    uint2 words;
    words.x = pack_word<TYPE>(values);
    words.y = pack_word<TYPE>(values + kEach);
    *reinterpret_cast<uint2*>(to) = words;
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      uint4 words;
      words.x = pack_word<TYPE>(values + (4 * i) * kEach);
      words.y = pack_word<TYPE>(values + (4 * i + 1) * kEach);
      words.z = pack_word<TYPE>(values + (4 * i + 2) * kEach);
      words.w = pack_word<TYPE>(values + (4 * i + 3) * kEach);
      reinterpret_cast<uint4*>(to)[i] = words;
    }
  }
}

}  // namespace biper
