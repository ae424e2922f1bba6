// Intrinsics that concern one thread: bits, floats, min and max, atomics.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator_state.h"
#include "emulator_types.h"

[[noreturn]] inline void __trap() { biper::emulator::fail("__trap()"); }

// -- bits -----------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

inline unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(x);
}

// Bits of high:low, shifted by `shift` modulo 32: the low word to the right, the high to the left.
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  const uint64_t both = uint64_t{high} << 32 | low;
  return static_cast<unsigned>(both >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  const uint64_t both = uint64_t{high} << 32 | low;
  return static_cast<unsigned>(both << (shift & 31) >> 32);
}
// The same with shifts above 32 as 32.
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}

// Byte i of the result is byte (selector >> 4 * i) & 7 of y:x, or its sign in all bits where
// bit 3 of that is set.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned which = selector >> (4 * i);
    unsigned byte = static_cast<unsigned>(both >> (8 * (which & 7))) & 0xff;
    if (which & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(uint64_t{x} * y >> 32);
}
inline int __mulhi(int x, int y) { return static_cast<int>(int64_t{x} * y >> 32); }

// The sum of the products of bytes, and `sum`; modulo 2 ** 32.
inline unsigned __dp4a(unsigned x, unsigned y, unsigned sum) {
  for (int shift = 0; shift < 32; shift += 8) sum += (x >> shift & 0xff) * (y >> shift & 0xff);
  return sum;
}
inline int __dp4a(int x, int y, int sum) {
  unsigned all = static_cast<unsigned>(sum);
  for (int shift = 0; shift < 32; shift += 8) {
    all += static_cast<unsigned>(static_cast<int8_t>(x >> shift) * static_cast<int8_t>(y >> shift));
  }
  return static_cast<int>(all);
}

// -- floats ---------------------------------------------------------------------------------------

namespace biper {
namespace emulator {
template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace emulator
}  // namespace biper

inline int __float_as_int(float x) { return biper::emulator::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return biper::emulator::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return biper::emulator::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return biper::emulator::bit_cast<float>(x); }

// Exact only where the compiler does not contract products and sums: -ffp-contract=off.
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

// The one that is not NaN, where one is.
inline float min(float x, float y) { return std::fmin(x, y); }
inline float max(float x, float y) { return std::fmax(x, y); }
inline double min(double x, double y) { return std::fmin(x, y); }
inline double max(double x, double y) { return std::fmax(x, y); }

#define BIPER_EMULATOR_MIN_MAX(TYPE)                        \
  inline TYPE min(TYPE x, TYPE y) { return y < x ? y : x; } \
  inline TYPE max(TYPE x, TYPE y) { return x < y ? y : x; }
BIPER_EMULATOR_MIN_MAX(int)
BIPER_EMULATOR_MIN_MAX(unsigned)
BIPER_EMULATOR_MIN_MAX(long)
BIPER_EMULATOR_MIN_MAX(unsigned long)
BIPER_EMULATOR_MIN_MAX(long long)
BIPER_EMULATOR_MIN_MAX(unsigned long long)
#undef BIPER_EMULATOR_MIN_MAX

// Mixed signs compare without them, as CUDA's do.
inline unsigned min(int x, unsigned y) { return min(static_cast<unsigned>(x), y); }
inline unsigned min(unsigned x, int y) { return min(x, static_cast<unsigned>(y)); }
inline unsigned max(int x, unsigned y) { return max(static_cast<unsigned>(x), y); }
inline unsigned max(unsigned x, int y) { return max(x, static_cast<unsigned>(y)); }

// -- memory ---------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// A thread gives way only where it waits, so that nothing comes between the parts of these.
#define BIPER_EMULATOR_ATOMIC(NAME, TYPE, RESULT) \
  inline TYPE NAME(TYPE* address, TYPE value) {   \
    const TYPE old = *address;                    \
    *address = RESULT;                            \
    return old;                                   \
  }
#define BIPER_EMULATOR_ATOMICS(TYPE)                                  \
  BIPER_EMULATOR_ATOMIC(atomicMin, TYPE, (value < old ? value : old)) \
  BIPER_EMULATOR_ATOMIC(atomicMax, TYPE, (old < value ? value : old)) \
  BIPER_EMULATOR_ATOMIC(atomicAnd, TYPE, old& value)                  \
  BIPER_EMULATOR_ATOMIC(atomicOr, TYPE, old | value)                  \
  BIPER_EMULATOR_ATOMIC(atomicXor, TYPE, old ^ value)                 \
  BIPER_EMULATOR_ATOMIC(atomicExch, TYPE, value)
BIPER_EMULATOR_ATOMICS(int)
BIPER_EMULATOR_ATOMICS(unsigned)
BIPER_EMULATOR_ATOMICS(unsigned long long)
BIPER_EMULATOR_ATOMIC(atomicAdd, unsigned, old + value)
BIPER_EMULATOR_ATOMIC(atomicAdd, unsigned long long, old + value)
BIPER_EMULATOR_ATOMIC(atomicAdd, float, old + value)
BIPER_EMULATOR_ATOMIC(atomicExch, float, value)
#undef BIPER_EMULATOR_ATOMICS
#undef BIPER_EMULATOR_ATOMIC

inline int atomicAdd(int* address, int value) {  // wraps around
  const int old = *address;
  *address = static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));
  return old;
}

template <class T>
T atomicCAS(T* address, T compare, T value) {
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}
