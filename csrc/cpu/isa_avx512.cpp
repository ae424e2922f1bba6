// AVX-512 with VPOPCNTDQ: a vector is 16 output channels, a 32-bit lane each.
#include "algorithm.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's intrinsics pass a self-initialised value where an operand does not matter.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#if defined(__AVX512VPOPCNTDQ__)
#include <immintrin.h>

namespace biper {
namespace {

struct Avx512 {
  using Sum = __m512i;
  using Word = __m512i;
  using Weights = __m512i;
  using Float = __m512;
  using Signs = __m512i;
  struct Table {
    __m512 low, high;  // by the sign of the fifth input
  };

  static constexpr int kLanes = 16;
  // 4 x 4 sums, 4 weights and a broadcast word leave room in 32 registers; with 4 vectors of
  // weights a word that is loaded once counts 64 times.
  static constexpr int kVectors = 4;
  static constexpr int kAccumulators = 16;
  static constexpr bool kPairs = false;
  static constexpr int kParts = 1;
  static constexpr int kPartWords = 16;
  static constexpr int64_t kWordsPerSum = 0;  // K < 2^24 fits a lane
  static constexpr int kFloats = 16;
  // 24 sums, 4 weights and a value in 32 registers.
  static constexpr int kFloatVectors = 4;
  static constexpr int kFloatPixels = 6;
  static constexpr int kFloatTiles = 4;  // 7 sums each
  static constexpr bool kSumsFitFloats = true;
  // 16 sums, 4 weights and a table in 32 registers.
  static constexpr int kSignVectors = 4;
  static constexpr int kSignRows = 4;
  static constexpr int kTableFloats = 32;
  static constexpr int kPeakSums = 16;

  BIPER_INLINE Sum zero() { return _mm512_setzero_si512(); }
  BIPER_INLINE Weights load_weights(const uint32_t* from) { return _mm512_loadu_si512(from); }
  BIPER_INLINE Word spread(const uint32_t* word, int) {
    return _mm512_set1_epi32(static_cast<int32_t>(*word));
  }
  BIPER_INLINE Sum count(Sum sum, Word a, Weights w) {
    // As instructions, since GCC 12 gathers all xors of a tile first, then copies every sum in
    // every step and spills some.
    __m512i bits;
    asm("vpxord %[a], %[w], %[bits]\n\t"
        "vpopcntd %[bits], %[bits]\n\t"
        "vpaddd %[bits], %[sum], %[sum]"
        : [bits] "=&v"(bits), [sum] "+v"(sum)
        : [a] "v"(a), [w] "v"(w));
    return sum;
  }
  BIPER_INLINE void subtract_twice(int32_t* to, const int32_t* from, Sum sum) {
    const __m512i minuend = _mm512_loadu_si512(from);
    _mm512_storeu_si512(to, _mm512_sub_epi32(minuend, _mm512_slli_epi32(sum, 1)));
  }
  BIPER_INLINE Float float_dots(const int32_t* border, Sum sum) {
    return _mm512_cvtepi32_ps(
        _mm512_sub_epi32(_mm512_loadu_si512(border), _mm512_slli_epi32(sum, 1)));
  }
  static void pack_word(const uint32_t* canonical, int64_t stride, int64_t rows, uint32_t* packed,
                        int64_t) {
    for (int64_t l = 0; l < kLanes; ++l) packed[l] = l < rows ? canonical[l * stride] : 0;
  }
  BIPER_INLINE void opaque(__m512i& value) { asm volatile("" : "+v"(value)); }

  BIPER_INLINE Signs load_signs(const uint32_t* from) { return _mm512_loadu_si512(from); }
  BIPER_INLINE Signs next_signs(Signs signs) { return _mm512_srli_epi32(signs, 5); }
  BIPER_INLINE Table load_table(const float* from) {
    return {_mm512_load_ps(from), _mm512_load_ps(from + 16)};
  }
  // VPERMT2PS reads the lowest five bits of a lane.
  BIPER_INLINE Float add_look_up(Float sum, const Table& table, Signs signs) {
    return _mm512_add_ps(sum, _mm512_permutex2var_ps(table.low, signs, table.high));
  }
  BIPER_INLINE Float signed_value(Float x, uint16_t positive) {
    const __m512i flipped = _mm512_maskz_set1_epi32(static_cast<__mmask16>(~positive), INT32_MIN);
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), flipped));
  }
  BIPER_INLINE void make_table(const float* x, float* table) {
    const auto input = [&](int i, uint16_t positive) {
      return signed_value(_mm512_set1_ps(x[i]), positive);
    };
    const __m512 three =
        _mm512_add_ps(_mm512_add_ps(input(0, 0xaaaa), input(1, 0xcccc)), input(2, 0xf0f0));
    const __m512 fourth = input(3, 0xff00);
    _mm512_store_ps(table, _mm512_add_ps(three, _mm512_add_ps(fourth, input(4, 0))));
    _mm512_store_ps(table + 16, _mm512_add_ps(three, _mm512_add_ps(fourth, input(4, 0xffff))));
  }

  BIPER_INLINE Float broadcast(float x) { return _mm512_set1_ps(x); }
  BIPER_INLINE Float load(const float* from) { return _mm512_loadu_ps(from); }
  BIPER_INLINE void store(float* to, Float v) { _mm512_storeu_ps(to, v); }
  BIPER_INLINE Float load_float16(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  BIPER_INLINE void store_float16(uint16_t* to, Float v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  BIPER_INLINE Float load_bfloat16(const uint16_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  // VCVTNEPS2BF16 flushes denormals, so round to nearest even by hand.
  BIPER_INLINE void store_bfloat16(uint16_t* to, Float v) {
    const __m512i x = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7fff)), odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  BIPER_INLINE Float to_float(const int32_t* from) {
    return _mm512_cvtepi32_ps(_mm512_loadu_si512(from));
  }
  BIPER_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  BIPER_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  BIPER_INLINE Float subtract(Float a, Float b) { return _mm512_sub_ps(a, b); }
  BIPER_INLINE Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  // Values at even and at odd places of a, then of b.
  BIPER_INLINE Float even(Float a, Float b) {
    const __m512i places =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(a, places, b);
  }
  BIPER_INLINE Float odd(Float a, Float b) {
    const __m512i places =
        _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_permutex2var_ps(a, places, b);
  }
  // MAXPS and MINPS return their second operand where neither is larger: exactly v < low ? low : v
  // and v > high ? high : v, also for zeros of either sign.
  BIPER_INLINE Float at_least_or(Float v, Float low) { return _mm512_max_ps(low, v); }
  BIPER_INLINE Float at_most_or(Float v, Float high) { return _mm512_min_ps(high, v); }
  BIPER_INLINE Float where_negative(Float v, Float negative, Float other) {
    return _mm512_mask_mov_ps(other, _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ),
                              negative);
  }
  BIPER_INLINE uint32_t at_least(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
};

}  // namespace

extern const Kernels kAvx512Kernels = kernels_of<Avx512>("avx512", 3);

}  // namespace biper
#endif
