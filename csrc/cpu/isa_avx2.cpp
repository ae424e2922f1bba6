// AVX2, which has no popcount: a vector is 32 output channels, a byte each.
//
// A nibble n of a weight and a nibble v of an input word differ in popc(n ^ v) bits. The 16 values
// for one v are a row of a table; VPSHUFB looks up 32 weights' nibbles in it at once, so that four
// input channels of 32 output channels cost one shuffle and one addition. Convolutions take two
// pixels with each shuffle (see pairs.h): 8 vector operations for 768 products, not 12.
#include "algorithm.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace biper {
namespace {

// Row v, column n: popc(n ^ v).
alignas(64) constexpr uint8_t kDifferences[16][16] = {
    {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4},
    {1, 0, 2, 1, 2, 1, 3, 2, 2, 1, 3, 2, 3, 2, 4, 3},
    {1, 2, 0, 1, 2, 3, 1, 2, 2, 3, 1, 2, 3, 4, 2, 3},
    {2, 1, 1, 0, 3, 2, 2, 1, 3, 2, 2, 1, 4, 3, 3, 2},
    {1, 2, 2, 3, 0, 1, 1, 2, 2, 3, 3, 4, 1, 2, 2, 3},
    {2, 1, 3, 2, 1, 0, 2, 1, 3, 2, 4, 3, 2, 1, 3, 2},
    {2, 3, 1, 2, 1, 2, 0, 1, 3, 4, 2, 3, 2, 3, 1, 2},
    {3, 2, 2, 1, 2, 1, 1, 0, 4, 3, 3, 2, 3, 2, 2, 1},
    {1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3},
    {2, 1, 3, 2, 3, 2, 4, 3, 1, 0, 2, 1, 2, 1, 3, 2},
    {2, 3, 1, 2, 3, 4, 2, 3, 1, 2, 0, 1, 2, 3, 1, 2},
    {3, 2, 2, 1, 4, 3, 3, 2, 2, 1, 1, 0, 3, 2, 2, 1},
    {2, 3, 3, 4, 1, 2, 2, 3, 1, 2, 2, 3, 0, 1, 1, 2},
    {3, 2, 4, 3, 2, 1, 3, 2, 2, 1, 3, 2, 1, 0, 2, 1},
    {3, 4, 2, 3, 2, 3, 1, 2, 2, 3, 1, 2, 1, 2, 0, 1},
    {4, 3, 3, 2, 3, 2, 2, 1, 3, 2, 2, 1, 2, 1, 1, 0},
};

// Row v0 + 16 * v1, column n: popc(n ^ v0) + 16 * popc(n ^ v1); see pairs.h.
struct PairDifferences {
  alignas(64) uint8_t rows[256][16];
  constexpr PairDifferences() : rows() {
    for (int v = 0; v < 256; ++v) {
      for (int n = 0; n < 16; ++n) {
        const int counts = kDifferences[v & 15][n] + 16 * kDifferences[v >> 4][n];
        rows[v][n] = static_cast<uint8_t>(counts);
      }
    }
  }
};
constexpr PairDifferences kPairDifferences;

struct Avx2 {
  using Sum = __m256i;
  using Word = __m256i;
  using Weights = __m256i;
  using Float = __m256;
  using Signs = __m256i;
  struct Table {
    __m256 three, two;
  };

  static constexpr int kLanes = 32;
  static constexpr int kVectors = 2;
  static constexpr int kAccumulators = 8;  // of 16 registers
  static constexpr bool kPairs = true;
  static constexpr int kParts = 8;            // nibbles of a word
  static constexpr int kPartWords = 8;        // 32 bytes, a nibble each
  static constexpr int64_t kWordsPerSum = 7;  // a word adds 32 at most: 7 * 32 fits a byte
  static constexpr int kFloats = 8;
  // 12 sums, 2 weights and a value in 16 registers.
  static constexpr int kFloatVectors = 2;
  static constexpr int kFloatPixels = 6;
  static constexpr int kFloatTiles = 2;  // 7 sums each
  static constexpr bool kSumsFitFloats = false;
  // 8 sums, 4 weights, a table and two values in 16 registers.
  static constexpr int kSignVectors = 4;
  static constexpr int kSignRows = 2;
  static constexpr int kTableFloats = 12;  // the signed sums of three inputs, and of two
  static constexpr int kPeakPairs = 5;     // two registers each

  BIPER_INLINE Sum zero() { return _mm256_setzero_si256(); }
  BIPER_INLINE Weights load_weights(const uint32_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  BIPER_INLINE Word spread(const uint32_t* word, int part) {
    // The nibble times 16, the offset of its row, in one shift and one mask.
    const uint32_t offset = (part == 0 ? *word << 4 : *word >> (4 * part - 4)) & 0xf0u;
    const uint8_t* row = reinterpret_cast<const uint8_t*>(kDifferences) + offset;
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(row)));
  }
  BIPER_INLINE Sum count(Sum sum, Word row, Weights w) {
    // As instructions, since GCC 12 adds the shuffles of a word up as a tree and spills them.
    __m256i counts;
    asm("vpshufb %[w], %[row], %[counts]\n\t"
        "vpaddb %[counts], %[sum], %[sum]"
        : [counts] "=&x"(counts), [sum] "+x"(sum)
        : [row] "x"(row), [w] "x"(w));
    return sum;
  }
  BIPER_INLINE void subtract_twice(int32_t* to, const int32_t* from, Sum sum) {
    alignas(32) uint8_t bytes[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), sum);
    BIPER_UNROLL
    for (int l = 0; l < kLanes; l += 8) {
      const __m256i counts =
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + l)));
      const __m256i minuend = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + l));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + l),
                          _mm256_sub_epi32(minuend, _mm256_slli_epi32(counts, 1)));
    }
  }
  static void pack_word(const uint32_t* canonical, int64_t stride, int64_t rows, uint32_t* packed,
                        int64_t part_stride) {
    for (int part = 0; part < kParts; ++part) {
      uint8_t nibbles[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        nibbles[l] = l < rows ? static_cast<uint8_t>(canonical[l * stride] >> (4 * part) & 15u) : 0;
      }
      __builtin_memcpy(packed + part * part_stride, nibbles, sizeof nibbles);
    }
  }
  BIPER_INLINE void opaque(__m256i& value) { asm volatile("" : "+x"(value)); }

  // Pairs of pixels. Bytes of sums are in the order of lanes; those of totals, of 16 bits, are the
  // even and the odd lanes of the first pixel, then of the second.
  using PairRow = __m256i;
  using PairCounts = __m256i;
  struct PairSum {
    __m256i all, high;
  };
  struct PairTotals {
    __m256i even[2], odd[2];
  };

  BIPER_INLINE PairSum no_pairs() { return {zero(), zero()}; }
  BIPER_INLINE PairTotals no_totals() { return {{zero(), zero()}, {zero(), zero()}}; }
  // `offset` is in bytes from the start of the table.
  BIPER_INLINE PairRow pair_row(uint16_t offset) {
    const uint8_t* row = &kPairDifferences.rows[0][0] + offset;
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(row)));
  }
  // Adds the counts of a nibble; `weights` are those of a word, of vector j of J.
  BIPER_INLINE void count_pair(PairCounts& counts, PairRow row, const uint32_t* weights, int part,
                               int j, int vectors, bool first) {
    const __m256i* w = reinterpret_cast<const __m256i*>(weights) + (part * vectors + j);
    look_up_pair(counts, row, *w, first);
  }
  BIPER_INLINE void look_up_pair(PairCounts& counts, PairRow row, const __m256i_u& w, bool first) {
    if (first) {
      asm("vpshufb %[w], %[row], %[counts]" : [counts] "=x"(counts) : [row] "x"(row), [w] "xm"(w));
      return;
    }
    __m256i more;
    asm("vpshufb %[w], %[row], %[more]\n\t"
        "vpaddb %[more], %[counts], %[counts]"
        : [more] "=&x"(more), [counts] "+x"(counts)
        : [row] "x"(row), [w] "xm"(w));
  }
  BIPER_INLINE void add_counts(PairSum& sum, PairCounts counts) {
    asm("vpaddb %[counts], %[all], %[all]\n\t"
        "vpsrlw $4, %[counts], %[counts]\n\t"
        "vpaddb %[counts], %[high], %[high]"
        : [all] "+x"(sum.all), [high] "+x"(sum.high), [counts] "+x"(counts));
  }
  BIPER_INLINE void widen(PairTotals& totals, const PairSum& sum) {
    const __m256i byte = _mm256_set1_epi16(0x00ff);
    const __m256i odd1 = _mm256_srli_epi16(sum.high, 8);
    const __m256i odd0 = _mm256_and_si256(
        _mm256_sub_epi16(_mm256_srli_epi16(sum.all, 8), _mm256_slli_epi16(odd1, 4)), byte);
    const __m256i even1 =
        _mm256_and_si256(_mm256_sub_epi16(sum.high, _mm256_slli_epi16(odd0, 4)), byte);
    const __m256i even0 =
        _mm256_and_si256(_mm256_sub_epi16(sum.all, _mm256_slli_epi16(even1, 4)), byte);
    totals.even[0] = _mm256_add_epi16(totals.even[0], even0);
    totals.odd[0] = _mm256_add_epi16(totals.odd[0], odd0);
    totals.even[1] = _mm256_add_epi16(totals.even[1], even1);
    totals.odd[1] = _mm256_add_epi16(totals.odd[1], odd1);
  }
  // to = from - 2 * the total of a pixel.
  BIPER_INLINE void subtract_twice(int32_t* to, const int32_t* from, const PairTotals& totals,
                                   int pixel) {
    const __m256i even = _mm256_slli_epi16(totals.even[pixel], 1);
    const __m256i odd = _mm256_slli_epi16(totals.odd[pixel], 1);
    const __m256i low = _mm256_unpacklo_epi16(even, odd);   // lanes 0 to 7, 16 to 23
    const __m256i high = _mm256_unpackhi_epi16(even, odd);  // lanes 8 to 15, 24 to 31
    const __m128i eights[4] = {_mm256_castsi256_si128(low), _mm256_castsi256_si128(high),
                               _mm256_extracti128_si256(low, 1), _mm256_extracti128_si256(high, 1)};
    BIPER_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m256i minuend = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 8 * i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * i),
                          _mm256_sub_epi32(minuend, _mm256_cvtepu16_epi32(eights[i])));
    }
  }
  // Writes the offsets of rows for the nibbles of `words` words of two pixels.
  static void pair_words(const uint32_t* a, const uint32_t* b, int64_t words, uint16_t* to) {
    const __m128i low = _mm_set1_epi8(0x0f), high = _mm_set1_epi8(static_cast<char>(0xf0));
    for (int64_t k = 0; k < words; k += 4, to += 4 * kWordParts) {
      uint32_t first[4] = {}, second[4] = {};
      const int64_t count = min64(words - k, 4);
      if (count < 4) {
        __builtin_memcpy(first, a + k, static_cast<size_t>(4 * count));
        __builtin_memcpy(second, b + k, static_cast<size_t>(4 * count));
      }
      const uint32_t *from0 = count < 4 ? first : a + k, *from1 = count < 4 ? second : b + k;
      const __m128i v0 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from0));
      const __m128i v1 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from1));
      // The nibbles at even and at odd places of both, as bytes.
      const __m128i even =
          _mm_or_si128(_mm_and_si128(v0, low), _mm_and_si128(_mm_slli_epi16(v1, 4), high));
      const __m128i odd =
          _mm_or_si128(_mm_and_si128(_mm_srli_epi16(v0, 4), low), _mm_and_si128(v1, high));
      const __m128i halves[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
      __m256i offsets[2];
      BIPER_UNROLL
      for (int i = 0; i < 2; ++i) {
        offsets[i] = _mm256_slli_epi16(_mm256_cvtepu8_epi16(halves[i]), 4);
      }
      __builtin_memcpy(to, offsets, static_cast<size_t>(2 * kWordParts * count));
    }
  }

  BIPER_INLINE Signs load_signs(const uint32_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  BIPER_INLINE Signs next_signs(Signs signs) { return _mm256_srli_epi32(signs, 5); }
  BIPER_INLINE Table load_table(const float* from) {
    return {_mm256_loadu_ps(from), _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from + 8))};
  }
  // VPERMPS reads the lowest three bits of a lane, VPERMILPS two. A product with 1 and a sum are
  // rounded once, as a sum is; Intel's port of permutations has no FMA but does add.
  BIPER_INLINE Float add_look_up(Float sum, const Table& table, Signs signs) {
    const __m256 three = _mm256_permutevar8x32_ps(table.three, signs);
    const __m256 two = _mm256_permutevar_ps(table.two, _mm256_srli_epi32(signs, 3));
    const __m256 one = _mm256_set1_ps(1.0f);
    return _mm256_fmadd_ps(_mm256_fmadd_ps(three, one, two), one, sum);
  }
  BIPER_INLINE void make_table(const float* x, float* table) {
    const __m256 odd = _mm256_setr_ps(-0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f);
    const __m256 second = _mm256_setr_ps(-0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f);
    const __m256 third = _mm256_setr_ps(-0.0f, -0.0f, -0.0f, -0.0f, 0.0f, 0.0f, 0.0f, 0.0f);
    const auto input = [&](int i, __m256 sign) {
      return _mm256_xor_ps(_mm256_set1_ps(x[i]), sign);
    };
    const __m256 pair = _mm256_add_ps(input(0, odd), input(1, second));
    _mm256_storeu_ps(table, _mm256_add_ps(pair, input(2, third)));
    const __m256 two = _mm256_add_ps(input(3, odd), input(4, second));
    _mm_storeu_ps(table + 8, _mm256_castps256_ps128(two));
  }

  BIPER_INLINE Float broadcast(float x) { return _mm256_set1_ps(x); }
  BIPER_INLINE Float load(const float* from) { return _mm256_loadu_ps(from); }
  BIPER_INLINE void store(float* to, Float v) { _mm256_storeu_ps(to, v); }
  BIPER_INLINE Float load_float16(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  BIPER_INLINE void store_float16(uint16_t* to, Float v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  BIPER_INLINE Float load_bfloat16(const uint16_t* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  BIPER_INLINE void store_bfloat16(uint16_t* to, Float v) {
    const __m256i x = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i packed = _mm256_packus_epi32(rounded, rounded);  // within 128-bit halves
    const __m256i ordered = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(ordered));
  }
  BIPER_INLINE Float to_float(const int32_t* from) {
    return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  BIPER_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  BIPER_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  BIPER_INLINE Float subtract(Float a, Float b) { return _mm256_sub_ps(a, b); }
  BIPER_INLINE Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  // Values at even and at odd places of a, then of b.
  BIPER_INLINE Float even(Float a, Float b) { return in_order(_mm256_shuffle_ps(a, b, 0x88)); }
  BIPER_INLINE Float odd(Float a, Float b) { return in_order(_mm256_shuffle_ps(a, b, 0xdd)); }
  // Pairs of a, b, a, b become pairs of a, a, b, b.
  BIPER_INLINE Float in_order(Float v) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
  }
  // MAXPS and MINPS return their second operand where neither is larger: exactly v < low ? low : v
  // and v > high ? high : v, also for zeros of either sign.
  BIPER_INLINE Float at_least_or(Float v, Float low) { return _mm256_max_ps(low, v); }
  BIPER_INLINE Float at_most_or(Float v, Float high) { return _mm256_min_ps(high, v); }
  BIPER_INLINE Float where_negative(Float v, Float negative, Float other) {
    return _mm256_blendv_ps(other, negative, _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_LT_OQ));
  }
  BIPER_INLINE uint32_t at_least(Float a, Float b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
  }
};

// The same for weights that the caches don't hold, whose bytes are what a single row of input waits
// for: a byte has two nibbles, which two masks and a shift take apart.
struct Avx2Heavy : Avx2 {
  struct Word {  // rows of the table for a byte of input
    __m256i low, high;
  };
  struct Weights {  // nibbles
    __m256i low, high;
  };

  static constexpr int kParts = 4;  // bytes of a word

  BIPER_INLINE Weights load_weights(const uint32_t* from) {
    const __m256i bytes = Avx2::load_weights(from), nibble = _mm256_set1_epi8(0x0f);
    return {_mm256_and_si256(bytes, nibble), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble)};
  }
  BIPER_INLINE Word spread(const uint32_t* word, int part) {
    return {Avx2::spread(word, 2 * part), Avx2::spread(word, 2 * part + 1)};
  }
  BIPER_INLINE Sum count(Sum sum, const Word& word, const Weights& w) {
    return Avx2::count(Avx2::count(sum, word.low, w.low), word.high, w.high);
  }
  BIPER_INLINE void count_pair(PairCounts& counts, PairRow row, const uint32_t* weights, int part,
                               int j, int vectors, bool first) {
    const __m256i* from = reinterpret_cast<const __m256i*>(weights) + (part / 2 * vectors + j);
    const __m256i bytes = _mm256_loadu_si256(from);
    const __m256i shifted = part % 2 ? _mm256_srli_epi16(bytes, 4) : bytes;
    look_up_pair(counts, row, _mm256_and_si256(shifted, _mm256_set1_epi8(0x0f)), first);
  }
  static void pack_word(const uint32_t* canonical, int64_t stride, int64_t rows, uint32_t* packed,
                        int64_t part_stride) {
    for (int part = 0; part < kParts; ++part) {
      uint8_t bytes[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        bytes[l] = l < rows ? static_cast<uint8_t>(canonical[l * stride] >> (8 * part)) : 0;
      }
      __builtin_memcpy(packed + part * part_stride, bytes, sizeof bytes);
    }
  }
};

}  // namespace

extern const Kernels kAvx2Kernels = kernels_of<Avx2, Avx2Heavy>("avx2", 2);

}  // namespace biper
#endif
