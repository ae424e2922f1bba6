// NEON of aarch64: a vector is 16 output channels, a 32-bit lane each, in four registers.
//
// CNT counts the bits of bytes, and bytes are what is summed: every lane holds four counts until
// they are added up at the end. CNT and the vectors of floats are part of every aarch64 processor.
#include "algorithm.h"

#if defined(__aarch64__)
#if defined(__AARCH64EB__)
#error "Packed maps are words of little-endian machines; big-endian aarch64 is not supported."
#endif
#include <arm_neon.h>

namespace biper {
namespace {

struct Neon {
  struct Lanes {
    uint32x4_t quarter[4];
  };
  struct Bytes {
    uint8x16_t quarter[4];
  };
  using Sum = Bytes;  // four byte counts in every lane
  using Word = uint32x4_t;
  using Weights = Lanes;
  using Float = float32x4_t;
  using Signs = uint32x4_t;
  struct Table {
    uint8x16x2_t three;
    uint8x16_t two;
  };

  static constexpr int kLanes = 16;
  static constexpr int kVectors = 2;
  static constexpr int kAccumulators = 4;  // of four registers each: 16 of 32, and 8 for weights
  static constexpr bool kPairs = false;
  static constexpr int kParts = 1;
  static constexpr int kPartWords = 16;
  static constexpr int64_t kWordsPerSum = 31;  // a word adds 8 to a byte at most
  static constexpr int kFloats = 4;
  // 24 sums, 4 weights and a value in 32 registers.
  static constexpr int kFloatVectors = 4;
  static constexpr int kFloatPixels = 6;
  static constexpr int kFloatTiles = 4;  // 7 sums each
  static constexpr bool kSumsFitFloats = false;
  static constexpr int kSignVectors = 4;
  static constexpr int kSignRows = 2;
  static constexpr int kTableFloats = 12;  // the signed sums of three inputs, and of two
  static constexpr int kPeakSums = 4;

  BIPER_INLINE Sum zero() {
    const uint8x16_t none = vdupq_n_u8(0);
    return {{none, none, none, none}};
  }
  BIPER_INLINE Weights load_weights(const uint32_t* from) {
    return {{vld1q_u32(from), vld1q_u32(from + 4), vld1q_u32(from + 8), vld1q_u32(from + 12)}};
  }
  BIPER_INLINE Word spread(const uint32_t* word, int) { return vld1q_dup_u32(word); }
  BIPER_INLINE Sum count(Sum sum, Word a, const Weights& w) {
    BIPER_UNROLL
    for (int q = 0; q < 4; ++q) {
      const uint8x16_t bits = vreinterpretq_u8_u32(veorq_u32(a, w.quarter[q]));
      sum.quarter[q] = vaddq_u8(sum.quarter[q], vcntq_u8(bits));
    }
    return sum;
  }
  BIPER_INLINE void subtract_twice(int32_t* to, const int32_t* from, const Sum& sum) {
    BIPER_UNROLL
    for (int q = 0; q < 4; ++q) {
      const uint32x4_t counts = vpaddlq_u16(vpaddlq_u8(sum.quarter[q]));
      const int32x4_t twice = vreinterpretq_s32_u32(vshlq_n_u32(counts, 1));
      vst1q_s32(to + 4 * q, vsubq_s32(vld1q_s32(from + 4 * q), twice));
    }
  }
  static void pack_word(const uint32_t* canonical, int64_t stride, int64_t rows, uint32_t* packed,
                        int64_t) {
    for (int64_t l = 0; l < kLanes; ++l) packed[l] = l < rows ? canonical[l * stride] : 0;
  }
  BIPER_INLINE void opaque(Word& value) { asm volatile("" : "+w"(value)); }
  BIPER_INLINE void opaque(Sum& value) {
    asm volatile(""
                 : "+w"(value.quarter[0]), "+w"(value.quarter[1]), "+w"(value.quarter[2]),
                   "+w"(value.quarter[3]));
  }

  BIPER_INLINE Signs load_signs(const uint32_t* from) { return vld1q_u32(from); }
  BIPER_INLINE Signs next_signs(Signs signs) { return vshrq_n_u32(signs, 5); }
  BIPER_INLINE Table load_table(const float* from) {
    const auto bytes = [&](int64_t i) { return vreinterpretq_u8_f32(vld1q_f32(from + i)); };
    return {{{bytes(0), bytes(4)}}, bytes(8)};
  }
  // The numbers of the four bytes of a float, whose number is in the `last` bits of a lane.
  BIPER_INLINE uint8x16_t bytes_of(Signs signs, uint32_t last) {
    const uint32x4_t number = vandq_u32(signs, vdupq_n_u32(last));
    return vreinterpretq_u8_u32(
        vmlaq_u32(vdupq_n_u32(0x03020100u), number, vdupq_n_u32(0x04040404u)));
  }
  BIPER_INLINE Float add_look_up(Float sum, const Table& table, Signs signs) {
    const uint8x16_t three = vqtbl2q_u8(table.three, bytes_of(signs, 7));
    const uint8x16_t two = vqtbl1q_u8(table.two, bytes_of(vshrq_n_u32(signs, 3), 3));
    return vaddq_f32(sum, vaddq_f32(vreinterpretq_f32_u8(three), vreinterpretq_f32_u8(two)));
  }
  BIPER_INLINE void make_table(const float* x, float* table) {
    for (int i = 0; i < 8; ++i) {
      const float pair = (i & 1 ? x[0] : -x[0]) + (i & 2 ? x[1] : -x[1]);
      table[i] = pair + (i & 4 ? x[2] : -x[2]);
    }
    for (int i = 0; i < 4; ++i) table[8 + i] = (i & 1 ? x[3] : -x[3]) + (i & 2 ? x[4] : -x[4]);
  }

  BIPER_INLINE Float broadcast(float x) { return vdupq_n_f32(x); }
  BIPER_INLINE Float load(const float* from) { return vld1q_f32(from); }
  BIPER_INLINE void store(float* to, Float v) { vst1q_f32(to, v); }
  BIPER_INLINE Float load_float16(const uint16_t* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
  }
  BIPER_INLINE void store_float16(uint16_t* to, Float v) {
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(v)));
  }
  BIPER_INLINE Float load_bfloat16(const uint16_t* from) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16));
  }
  // BFCVT is not part of every processor, so round to nearest even by hand.
  BIPER_INLINE void store_bfloat16(uint16_t* to, Float v) {
    const uint32x4_t x = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
    vst1_u16(to, vshrn_n_u32(vaddq_u32(vaddq_u32(x, vdupq_n_u32(0x7fff)), odd), 16));
  }
  BIPER_INLINE Float to_float(const int32_t* from) { return vcvtq_f32_s32(vld1q_s32(from)); }
  BIPER_INLINE Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  BIPER_INLINE Float add(Float a, Float b) { return vaddq_f32(a, b); }
  BIPER_INLINE Float subtract(Float a, Float b) { return vsubq_f32(a, b); }
  BIPER_INLINE Float multiply(Float a, Float b) { return vmulq_f32(a, b); }
  // Values at even and at odd places of a, then of b.
  BIPER_INLINE Float even(Float a, Float b) { return vuzp1q_f32(a, b); }
  BIPER_INLINE Float odd(Float a, Float b) { return vuzp2q_f32(a, b); }
  // FMAX orders zeros by their sign, so compare and select: exactly v < low ? low : v and
  // v > high ? high : v.
  BIPER_INLINE Float at_least_or(Float v, Float low) {
    return vbslq_f32(vcltq_f32(v, low), low, v);
  }
  BIPER_INLINE Float at_most_or(Float v, Float high) {
    return vbslq_f32(vcgtq_f32(v, high), high, v);
  }
  BIPER_INLINE Float where_negative(Float v, Float negative, Float other) {
    return vbslq_f32(vcltzq_f32(v), negative, other);
  }
  BIPER_INLINE uint32_t at_least(Float a, Float b) {
    const uint32x4_t place = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), place));
  }
};

}  // namespace

extern const Kernels kNeonKernels = kernels_of<Neon>("neon", 4);

}  // namespace biper
#endif
