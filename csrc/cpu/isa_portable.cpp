// Plain C++ for every processor: a vector is 16 output channels, a 32-bit lane each.
#include "algorithm.h"

namespace biper {
namespace {

struct Portable {
  struct Lanes {
    uint32_t lane[16];
  };
  struct Floats {
    float lane[4];
  };
  using Sum = Lanes;  // four byte counts in every lane
  using Word = uint32_t;
  using Weights = Lanes;
  using Float = Floats;
  struct Signs {
    uint32_t lane[4];
  };
  using Table = const float*;

  static constexpr int kLanes = 16;
  static constexpr int kVectors = 2;
  static constexpr int kAccumulators = 2;
  static constexpr bool kPairs = false;
  static constexpr int kParts = 1;
  static constexpr int kPartWords = 16;
  static constexpr int64_t kWordsPerSum = 31;  // a word adds 8 to a byte at most
  static constexpr int kFloats = 4;
  static constexpr int kFloatVectors = 4;
  static constexpr int kFloatPixels = 2;
  static constexpr int kFloatTiles = 1;  // 7 sums each
  static constexpr bool kSumsFitFloats = false;
  static constexpr int kSignVectors = 4;
  static constexpr int kSignRows = 2;
  static constexpr int kTableFloats = 32;
  static constexpr int kPeakSums = 1;

  BIPER_INLINE Sum zero() { return Sum{}; }
  BIPER_INLINE Weights load_weights(const uint32_t* from) {
    Weights w;
    __builtin_memcpy(&w, from, sizeof w);
    return w;
  }
  BIPER_INLINE Word spread(const uint32_t* word, int) { return *word; }
  // Counts bits in pairs, nibbles and bytes of every lane; see Warren, Hacker's Delight, 5-1.
  BIPER_INLINE Sum count(Sum sum, Word a, Weights w) {
    for (int l = 0; l < kLanes; ++l) {
      uint32_t x = a ^ w.lane[l];
      x -= x >> 1 & 0x55555555u;
      x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
      sum.lane[l] += (x + (x >> 4)) & 0x0f0f0f0fu;
    }
    return sum;
  }
  BIPER_INLINE void subtract_twice(int32_t* to, const int32_t* from, Sum sum) {
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t pairs = (sum.lane[l] & 0x00ff00ffu) + (sum.lane[l] >> 8 & 0x00ff00ffu);
      to[l] = from[l] - 2 * static_cast<int32_t>((pairs & 0xffffu) + (pairs >> 16));
    }
  }
  static void pack_word(const uint32_t* canonical, int64_t stride, int64_t rows, uint32_t* packed,
                        int64_t) {
    for (int64_t l = 0; l < kLanes; ++l) packed[l] = l < rows ? canonical[l * stride] : 0;
  }
  template <class T>
  BIPER_INLINE void opaque(T& value) {
    asm volatile("" : "+m"(value));
  }

  BIPER_INLINE Signs load_signs(const uint32_t* from) {
    Signs signs;
    __builtin_memcpy(&signs, from, sizeof signs);
    return signs;
  }
  BIPER_INLINE Signs next_signs(Signs signs) {
    for (int l = 0; l < kFloats; ++l) signs.lane[l] >>= 5;
    return signs;
  }
  BIPER_INLINE Table load_table(const float* from) { return from; }
  BIPER_INLINE Float add_look_up(Float sum, Table table, Signs signs) {
    return each([&](int l) { return sum.lane[l] + table[signs.lane[l] & 31u]; });
  }
  BIPER_INLINE void make_table(const float* x, float* table) {
    for (int i = 0; i < 32; ++i) {
      const auto input = [&](int k) { return i >> k & 1 ? x[k] : -x[k]; };
      table[i] = ((input(0) + input(1)) + input(2)) + (input(3) + input(4));
    }
  }

  template <class Of>
  BIPER_INLINE Float each(Of of) {
    Float result;
    for (int l = 0; l < kFloats; ++l) result.lane[l] = of(l);
    return result;
  }
  BIPER_INLINE Float broadcast(float x) {
    return each([&](int) { return x; });
  }
  BIPER_INLINE Float load(const float* from) {
    return each([&](int l) { return from[l]; });
  }
  BIPER_INLINE void store(float* to, Float v) { __builtin_memcpy(to, &v, sizeof v); }
  BIPER_INLINE float from_pattern(uint32_t pattern) {
    float x;
    __builtin_memcpy(&x, &pattern, sizeof x);
    return x;
  }
  BIPER_INLINE uint32_t to_pattern(float x) {
    uint32_t pattern;
    __builtin_memcpy(&pattern, &x, sizeof pattern);
    return pattern;
  }
  static float from_float16(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return from_pattern(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // Exponents differ by 112; scaling by 2^112 as a float also makes denormals right.
    const float scaled = from_pattern(magnitude << 13) * 0x1p112f;
    return from_pattern(to_pattern(scaled) | sign);
  }
  static uint16_t to_float16(float x) {
    const uint32_t pattern = to_pattern(x);
    const uint32_t sign = pattern >> 16 & 0x8000u, magnitude = pattern & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520 on
    if (magnitude < 0x38800000u) {
      // Below 2^-14 a float16 is a multiple of 2^-24: adding 0.5, whose last place is that, rounds.
      const uint32_t sum = to_pattern(from_pattern(magnitude) + 0.5f);
      return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23);
    return static_cast<uint16_t>(sign | rounded >> 13);
  }
  BIPER_INLINE Float load_float16(const uint16_t* from) {
    return each([&](int l) { return from_float16(from[l]); });
  }
  BIPER_INLINE void store_float16(uint16_t* to, Float v) {
    for (int l = 0; l < kFloats; ++l) to[l] = to_float16(v.lane[l]);
  }
  BIPER_INLINE Float load_bfloat16(const uint16_t* from) {
    return each([&](int l) { return from_pattern(uint32_t{from[l]} << 16); });
  }
  BIPER_INLINE void store_bfloat16(uint16_t* to, Float v) {
    for (int l = 0; l < kFloats; ++l) {
      const uint32_t x = to_pattern(v.lane[l]);
      to[l] = static_cast<uint16_t>((x + 0x7fffu + (x >> 16 & 1u)) >> 16);
    }
  }
  BIPER_INLINE Float to_float(const int32_t* from) {
    return each([&](int l) { return static_cast<float>(from[l]); });
  }
  BIPER_INLINE Float fma(Float a, Float b, Float c) {
    return each([&](int l) { return __builtin_fmaf(a.lane[l], b.lane[l], c.lane[l]); });
  }
  BIPER_INLINE Float add(Float a, Float b) {
    return each([&](int l) { return a.lane[l] + b.lane[l]; });
  }
  BIPER_INLINE Float subtract(Float a, Float b) {
    return each([&](int l) { return a.lane[l] - b.lane[l]; });
  }
  BIPER_INLINE Float multiply(Float a, Float b) {
    return each([&](int l) { return a.lane[l] * b.lane[l]; });
  }
  // Values at even and at odd places of a, then of b.
  BIPER_INLINE Float even(Float a, Float b) { return every_second(a, b, 0); }
  BIPER_INLINE Float odd(Float a, Float b) { return every_second(a, b, 1); }
  BIPER_INLINE Float every_second(Float a, Float b, int first) {
    return each([&](int l) {
      const int place = 2 * l + first;
      return place < kFloats ? a.lane[place] : b.lane[place - kFloats];
    });
  }
  BIPER_INLINE Float at_least_or(Float v, Float low) {
    return each([&](int l) { return v.lane[l] < low.lane[l] ? low.lane[l] : v.lane[l]; });
  }
  BIPER_INLINE Float at_most_or(Float v, Float high) {
    return each([&](int l) { return v.lane[l] > high.lane[l] ? high.lane[l] : v.lane[l]; });
  }
  BIPER_INLINE Float where_negative(Float v, Float negative, Float other) {
    return each([&](int l) { return v.lane[l] < 0.0f ? negative.lane[l] : other.lane[l]; });
  }
  BIPER_INLINE uint32_t at_least(Float a, Float b) {
    uint32_t bits = 0;
    for (int l = 0; l < kFloats; ++l) bits |= uint32_t{a.lane[l] >= b.lane[l]} << l;
    return bits;
  }
};

}  // namespace

extern const Kernels kPortableKernels = kernels_of<Portable>("portable", 1);

}  // namespace biper
