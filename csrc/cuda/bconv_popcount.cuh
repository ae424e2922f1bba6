// Binary convolution of any geometry, including groups, by xor and popcount.
//
// A warp computes 32 neighbouring output channels of one pixel, one per lane. The words of the
// pixel are the same in all lanes (or in all lanes of a group), the words of the weights are
// neighbours in memory, and the bits of the result are one ballot. An accumulator is, over the taps
// V inside the image,
//
//     dot = |V| * C / groups - 2 * popc(a ^ w)
//
// A pool computes its window's accumulators one after the other, again for overlapping windows.

#pragma once

#include "epilogue.cuh"

namespace biper {

struct BconvPopcountParams {
  ConvShape shape;
  ConvEpilogue epilogue;
  ConvOutputs outputs;
  const uint32_t* bits;
  const uint32_t* words;  // [taps, words of a group, O]
  int in_words;
  int group_words;
  int group_channels;
  uint32_t last_mask;  // channels of a group's last word
  uint32_t pixels;     // output pixels of all images
};

// Return word `at` of the bits of a pixel from bit `start` on.
__device__ __forceinline__ uint32_t group_word(const uint32_t* pixel, int in_words, int start,
                                               int at) {
  const int word = start / 32 + at;
  const uint32_t low = word < in_words ? pixel[word] : 0u;
  if (start % 32 == 0) return low;
  const uint32_t high = word + 1 < in_words ? pixel[word + 1] : 0u;
  return __funnelshift_r(low, high, start % 32);
}

__device__ __forceinline__ int accumulate(const BconvPopcountParams& p, int image, int conv_row,
                                          int conv_column, int channel) {
  const ConvShape& s = p.shape;
  const int group = channel / (s.out_channels / s.groups);
  const int start = group * p.group_channels;
  int valid = 0, different = 0;
  for (int i = 0; i < s.conv.kernel_h; ++i) {
    const int y = conv_row * s.conv.stride_h - s.conv.pad_top + i * s.conv.dilation_h;
    if (y < 0 || y >= s.height) continue;
    for (int j = 0; j < s.conv.kernel_w; ++j) {
      const int x = conv_column * s.conv.stride_w - s.conv.pad_left + j * s.conv.dilation_w;
      if (x < 0 || x >= s.width) continue;
      const uint32_t* pixel =
          p.bits + ((static_cast<int64_t>(image) * s.height + y) * s.width + x) * p.in_words;
      const uint32_t* weights =
          p.words +
          (static_cast<int64_t>(i * s.conv.kernel_w + j) * p.group_words * s.out_channels) +
          channel;
      ++valid;
      for (int k = 0; k < p.group_words; ++k) {
        const uint32_t mask = k == p.group_words - 1 ? p.last_mask : 0xffffffffu;
        const uint32_t a = group_word(pixel, p.in_words, start, k);
        different += __popc((a ^ weights[static_cast<int64_t>(k) * s.out_channels]) & mask);
      }
    }
  }
  return valid * p.group_channels - 2 * different;
}

__device__ __forceinline__ int pooled(const BconvPopcountParams& p, int image, int row, int column,
                                      int channel) {
  const ConvShape& s = p.shape;
  const bool minimum = p.epilogue.pool_min != nullptr && p.epilogue.pool_min[channel];
  int result = minimum ? 0x7fffffff : -0x7fffffff;
  for (int i = 0; i < s.pool.kernel_h; ++i) {
    const int y = row * s.pool.stride_h - s.pool.pad_top + i;
    if (y < 0 || y >= s.conv_h) continue;
    for (int j = 0; j < s.pool.kernel_w; ++j) {
      const int x = column * s.pool.stride_w - s.pool.pad_left + j;
      if (x < 0 || x >= s.conv_w) continue;
      const int dot = accumulate(p, image, y, x, channel);
      result = (dot > result) == minimum ? result : dot;
    }
  }
  return result;
}

// Apply the epilogue to one value and store it; return its bit.
__device__ __forceinline__ bool finish_one(const BconvPopcountParams& p, int channel, int64_t index,
                                           int dot) {
  const ConvEpilogue& e = p.epilogue;
  const ConvOutputs& out = p.outputs;
  if (out.dots != nullptr) {
    out.dots[index] = dot;
    return false;
  }
  if (e.first != nullptr) {
    return static_cast<uint32_t>(dot - e.first[channel]) <= e.span[channel];
  }
  float v = __fmaf_rn(e.multiplier[channel], static_cast<float>(dot), e.bias[channel]);
  if (out.residual_type == kFloat32) {
    v = __fadd_rn(v, load_value<kFloat32>(out.residual, index));
  } else if (out.residual_type == kFloat16) {
    v = __fadd_rn(v, load_value<kFloat16>(out.residual, index));
  } else if (out.residual_type == kBfloat16) {
    v = __fadd_rn(v, load_value<kBfloat16>(out.residual, index));
  }
  if (e.slope != nullptr) {
    v = v < 0.0f ? __fmul_rn(v, e.slope[channel]) : v;
  } else {
    v = v < e.clamp_min ? e.clamp_min : v;
    v = v > e.clamp_max ? e.clamp_max : v;
  }
  if (e.shift != nullptr) v = __fadd_rn(v, e.shift[channel]);
  if (out.float_type == kFloat32) {
    store_value<kFloat32>(out.floats, index, v);
  } else if (out.float_type == kFloat16) {
    store_value<kFloat16>(out.floats, index, v);
  } else if (out.float_type == kBfloat16) {
    store_value<kBfloat16>(out.floats, index, v);
  }
  if (out.bits == nullptr) return false;
  const float threshold = e.threshold != nullptr ? e.threshold[channel] : 0.0f;
  const bool sense = e.sense != nullptr && e.sense[channel];
  return sense ? v <= threshold : v >= threshold;
}

constexpr int kPopcountThreads = 128;

__global__ void __launch_bounds__(kPopcountThreads, 8) bconv_popcount(BconvPopcountParams p) {
  const ConvShape& s = p.shape;
  const int lane = threadIdx.x % 32;
  const int channel = static_cast<int>(blockIdx.y) * 32 + lane;
  const uint32_t warps = gridDim.x * (kPopcountThreads / 32);
  uint32_t pixel = blockIdx.x * (kPopcountThreads / 32) + threadIdx.x / 32;
  const int out_words = (s.out_channels + 31) / 32;
  for (; pixel < p.pixels; pixel += warps) {
    const uint32_t rows = pixel / static_cast<uint32_t>(s.out_w);
    const int column = static_cast<int>(pixel - rows * s.out_w);
    const int image = static_cast<int>(rows / static_cast<uint32_t>(s.out_h));
    const int row = static_cast<int>(rows) - image * s.out_h;
    bool bit = false;
    if (channel < s.out_channels) {
      const int dot = pooled(p, image, row, column, channel);
      bit = finish_one(p, channel, static_cast<int64_t>(pixel) * s.out_channels + channel, dot);
    }
    if (p.outputs.bits == nullptr) continue;
    const uint32_t word = __ballot_sync(0xffffffffu, bit);
    if (lane == 0) p.outputs.bits[static_cast<int64_t>(pixel) * out_words + blockIdx.y] = word;
  }
}

}  // namespace biper
