// Bits in words, and float maps as vectors: what the kernels of every instruction set share.
#pragma once

#include "kernels.h"

#define BIPER_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define BIPER_UNROLL _Pragma("unroll")
#else
#define BIPER_UNROLL _Pragma("GCC unroll 32")
#endif
// Before a loop whose turns don't read what others write, though it may write what it has read.
// Clang's form of it warns of loops that it does not make vectors of.
#if defined(__clang__)
#define BIPER_INDEPENDENT
#else
#define BIPER_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace biper {

BIPER_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
BIPER_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

BIPER_INLINE uint32_t low_bits(int64_t count) {
  return count >= kWordBits ? ~0u : (1u << count) - 1;
}

// Writes `count` <= 32 bits of a pixel, from channel `channel` on. Calls come in rising order of
// channels without a gap, so the first write to a word is the one that holds its lowest bit.
BIPER_INLINE void put_bits(uint32_t* words, int64_t channel, uint32_t bits, int64_t count) {
  const int64_t shift = channel % kWordBits;
  uint32_t* word = words + channel / kWordBits;
  *word = shift == 0 ? bits : *word | bits << shift;
  if (shift + count > kWordBits) word[1] = bits >> (kWordBits - shift);
}

// Reads `count` <= 32 bits from `channel` on.
BIPER_INLINE uint32_t get_bits(const uint32_t* words, int64_t channel, int64_t count) {
  const int64_t shift = channel % kWordBits;
  const uint32_t* word = words + channel / kWordBits;
  uint32_t bits = *word >> shift;
  if (shift + count > kWordBits) bits |= word[1] << (kWordBits - shift);
  return bits & low_bits(count);
}

// Loads kFloats values from element `index` of a stream; where not kFull only the first `count`.
template <class I, bool kFull>
BIPER_INLINE typename I::Float load_stream(const void* base, FloatType type, int64_t index,
                                           int64_t count) {
  const char* from = static_cast<const char*>(base) + index * float_bytes(type);
  alignas(64) char part[4 * I::kFloats];
  if (!kFull) {
    __builtin_memset(part, 0, sizeof part);
    __builtin_memcpy(part, from, static_cast<size_t>(count * float_bytes(type)));
    from = part;
  }
  if (type == FloatType::kFloat32) return I::load(reinterpret_cast<const float*>(from));
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
  return type == FloatType::kFloat16 ? I::load_float16(halves) : I::load_bfloat16(halves);
}

template <class I, bool kFull>
BIPER_INLINE void store_stream(void* base, FloatType type, int64_t index, int64_t count,
                               typename I::Float value) {
  char* target = static_cast<char*>(base) + index * float_bytes(type);
  alignas(64) char part[4 * I::kFloats];
  char* to = kFull ? target : part;
  if (type == FloatType::kFloat32) {
    I::store(reinterpret_cast<float*>(to), value);
  } else if (type == FloatType::kFloat16) {
    I::store_float16(reinterpret_cast<uint16_t*>(to), value);
  } else {
    I::store_bfloat16(reinterpret_cast<uint16_t*>(to), value);
  }
  if (!kFull) __builtin_memcpy(target, part, static_cast<size_t>(count * float_bytes(type)));
}

template <class I, bool kFull>
BIPER_INLINE typename I::Float load_channels(const float* values, int64_t channel, int64_t count) {
  return load_stream<I, kFull>(values, FloatType::kFloat32, channel, count);
}

// bit = inverted ? v <= threshold : v >= threshold
template <class I>
BIPER_INLINE uint32_t compare(typename I::Float v, typename I::Float threshold, uint32_t inverted) {
  const uint32_t above = I::at_least(v, threshold);
  if (inverted == 0) return above;
  return (above & ~inverted) | (I::at_least(threshold, v) & inverted);
}

}  // namespace biper
