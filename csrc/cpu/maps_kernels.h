// Kernels of packed maps: from floats, to floats, and their max pool.
#pragma once

#include "vectors.h"

namespace biper {

template <class I, bool kFull>
BIPER_INLINE uint32_t binarize_vector(const BinarizeCall& call, int64_t pixel, int64_t channel,
                                      int64_t count) {
  using Float = typename I::Float;
  const int64_t index = pixel * call.channels + channel;
  const Float v = load_stream<I, kFull>(call.x, call.type, index, count);
  const Float threshold =
      call.threshold ? load_channels<I, kFull>(call.threshold, channel, count) : I::broadcast(0.0f);
  const uint32_t inverted = call.sense ? get_bits(call.sense, channel, count) : 0;
  return compare<I>(v, threshold, inverted);
}

// Returns the bits of `count` <= 32 channels of a pixel.
template <class I>
BIPER_INLINE uint32_t binarize_word(const BinarizeCall& call, int64_t pixel, int64_t channel,
                                    int64_t count) {
  uint32_t word = 0;
  int64_t at = 0;
  for (; at + I::kFloats <= count; at += I::kFloats) {
    word |= binarize_vector<I, true>(call, pixel, channel + at, I::kFloats) << at;
  }
  if (at < count) word |= binarize_vector<I, false>(call, pixel, channel + at, count - at) << at;
  return word & low_bits(count);
}

// The same for whole words of float32 against 0, which is what networks begin with.
template <class I>
BIPER_INLINE uint32_t binarize_plain_word(const float* x) {
  const typename I::Float zero = I::broadcast(0.0f);
  uint32_t word = 0;
  BIPER_UNROLL
  for (int at = 0; at < kWordBits; at += I::kFloats) {
    word |= I::at_least(I::load(x + at), zero) << at;
  }
  return word;
}

template <class I>
static void binarize(const BinarizeCall& call, int64_t first_pixel, int64_t last_pixel) {
  const int64_t words = (call.channels + kWordBits - 1) / kWordBits;
  const int64_t whole = call.channels / kWordBits;
  const bool plain = call.type == FloatType::kFloat32 && !call.threshold && !call.sense;
  for (int64_t pixel = first_pixel; pixel < last_pixel; ++pixel) {
    uint32_t* bits = call.bits + pixel * words;
    if (plain) {
      const float* x = static_cast<const float*>(call.x) + pixel * call.channels;
      for (int64_t w = 0; w < whole; ++w) bits[w] = binarize_plain_word<I>(x + w * kWordBits);
    } else {
      for (int64_t w = 0; w < whole; ++w) {
        bits[w] = binarize_word<I>(call, pixel, w * kWordBits, kWordBits);
      }
    }
    if (whole < words) {
      const int64_t channel = whole * kWordBits;
      bits[whole] = binarize_word<I>(call, pixel, channel, call.channels - channel);
    }
  }
}

// Packs x >= 0. Returns whether the bits say all: no value is 0, which has no sign, or NaN.
template <class I>
static bool pack_signs(const SignsCall& call, int64_t first_pixel, int64_t last_pixel) {
  const typename I::Float zero = I::broadcast(0.0f);
  const float* x = call.x + first_pixel * call.channels;
  uint32_t* bits = call.bits + first_pixel * ((call.channels + kWordBits - 1) / kWordBits);
  uint32_t unsaid = 0;
  for (int64_t pixel = first_pixel; pixel < last_pixel; ++pixel) {
    for (int64_t left = call.channels; left > 0; left -= kWordBits) {
      const int64_t count = min64(left, kWordBits);
      uint32_t positive = 0, negative = 0;
      const auto add = [&](typename I::Float v, int64_t at) {
        positive |= I::at_least(v, zero) << at;
        negative |= I::at_least(zero, v) << at;
      };
      int64_t at = 0;
      for (; at + I::kFloats <= count; at += I::kFloats) add(I::load(x + at), at);
      if (at < count) add(load_channels<I, false>(x, at, count - at), at);
      *bits++ = positive & low_bits(count);
      unsaid |= ~(positive ^ negative) & low_bits(count);
      x += count;
    }
  }
  return unsaid == 0;
}

// Writes +1 or -1 as a bit pattern: that of -1, its sign flipped where a bit is 1.
template <class I, class Pattern>
BIPER_INLINE void unbinarize_pixel(const uint32_t* bits, int64_t channels, Pattern minus_one,
                                   Pattern* x) {
  constexpr int kSignBit = sizeof(Pattern) * 8 - 1;
  for (int64_t start = 0; start < channels; start += kWordBits) {
    const uint32_t word = bits[start / kWordBits];
    const int64_t count = min64(channels - start, kWordBits);
    for (int64_t c = 0; c < count; ++c) {
      x[start + c] = static_cast<Pattern>(minus_one ^ ((word >> c & 1u) << kSignBit));
    }
  }
}

template <class I>
static void unbinarize(const UnbinarizeCall& call, int64_t first_pixel, int64_t last_pixel) {
  const int64_t words = (call.channels + kWordBits - 1) / kWordBits;
  for (int64_t pixel = first_pixel; pixel < last_pixel; ++pixel) {
    const uint32_t* bits = call.bits + pixel * words;
    const int64_t index = pixel * call.channels;
    if (call.type == FloatType::kFloat32) {
      unbinarize_pixel<I, uint32_t>(bits, call.channels, 0xbf800000u,
                                    static_cast<uint32_t*>(call.x) + index);
    } else {
      const uint16_t minus_one = call.type == FloatType::kFloat16 ? 0xbc00 : 0xbf80;
      unbinarize_pixel<I, uint16_t>(bits, call.channels, minus_one,
                                    static_cast<uint16_t*>(call.x) + index);
    }
  }
}

template <class I>
static void maxpool_row(const PoolCall& call, int64_t row) {
  const Window& window = call.window;
  const int64_t top = row % call.out_h * window.stride_h - window.pad_h;
  const int64_t y0 = max64(top, 0), y1 = min64(top + window.kernel_h, call.height);
  const uint32_t* image = call.bits + row / call.out_h * call.height * call.width * call.words;
  uint32_t* out = call.out + row * call.out_w * call.words;
  for (int64_t x = 0; x < call.out_w; ++x, out += call.words) {
    const int64_t left = x * window.stride_w - window.pad_w;
    const int64_t x0 = max64(left, 0), x1 = min64(left + window.kernel_w, call.width);
    for (int64_t w = 0; w < call.words; ++w) {
      uint32_t any = 0, all = ~0u;
      for (int64_t y = y0; y < y1; ++y) {
        for (int64_t at = x0; at < x1; ++at) {
          const uint32_t word = image[(y * call.width + at) * call.words + w];
          any |= word;
          all &= word;
        }
      }
      const uint32_t take_and = call.take_and ? call.take_and[w] : 0;
      const uint32_t used = low_bits(call.channels - w * kWordBits);
      out[w] = ((any & ~take_and) | (all & take_and)) & used;
    }
  }
}

}  // namespace biper
