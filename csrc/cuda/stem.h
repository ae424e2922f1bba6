// The first layer of a network on a GPU: fused float convolution, max pool, clamp and binarize.
//
// Launchers return nullptr, or the reason why nothing was launched; an empty batch is not launched.

#pragma once

#include <cstdint>

#include "types.h"

namespace biper {

// The computation, where o is the output channel:
//   pixel = round(fma(x, scale[c], offset[c]))    in float32, then round(); 0 at the padding
//   v = sum of pixel * round(weight) in float32, in no fixed order
//   v = max of v in the pool window; positions outside of the convolution's output never win
//   v = clamp(v + bias[o], clamp_min, clamp_max)
//   out = round(v);  bit = sense[o] ? v <= threshold[o] : v >= threshold[o]
// round() rounds to `compute`. Pixels must be finite in this type: a pixel that is not may corrupt
// outputs to its left whose windows end before it. Strides are in elements.
struct StemArgs {
  const void* x;  // [n, c, h, w], any stream type, c from 1 to 4
  int type;
  int64_t stride_n, stride_c, stride_h, stride_w;
  const float* scale;  // [c]; nullptr with `offset`: the pixel is x
  const float* offset;
  const void* weight;      // in a layout below, aligned to 16 bytes
  const float* bias;       // [o]; nullptr: 0
  const float* threshold;  // [o]; nullptr: 0
  const bool* sense;       // [o]; nullptr: false
  void* out;               // dense, [n, out_h, out_w, o], in `compute`; nullptr: not stored
  uint32_t* bits;          // [n, out_h, out_w, words(o)]; nullptr: not stored
  int compute;             // kFloat32, kFloat16 or kBfloat16
  bool tensor_cores;       // which of the two layouts the weights have
  int64_t n;
  int c, h, w, o;
  int kernel_h, kernel_w, stride_y, stride_x, padding_top, padding_left;
  int conv_h, conv_w;  // size of the convolution's output
  int pool_kernel_h, pool_kernel_w, pool_stride_h, pool_stride_w, pool_padding_h, pool_padding_w;
  int out_h, out_w;
  float clamp_min, clamp_max;  // infinite: none
};

const char* stem(const StemArgs& args, void* stream);

// Whether the current device multiplies matrices of `compute` exactly, with sums in float32. If
// not, the float32 kernel runs with the rounded weights: the same products, slower.
bool stem_has_tensor_cores(int compute);

// Layouts of the weights; output channels are padded with zeros to whole groups of 32.
//
// Without tensor cores: float32 [groups, kernel_h, kernel_w, c, 32], rounded to `compute`.
//
// With them, K is divided into runs of 8 values. A pixel has C' values: c, or c + 1 if c * stride_x
// is odd (the last value is then 0), so that every window starts at a whole word. A kernel row has
// kernel_w * C' values, (tap, channel), padded with zeros to R = ceil(kernel_w * C' / 8) runs. Rows
// follow each other, and an odd number of runs is padded with one run of zeros. Two runs are a k16
// step, in which lane 4 * g + t has values 2t, 2t + 1 of the first and of the second run for column
// g of each of 4 tiles: 16-bit [groups, steps, lane, tile, run, 2]. Column g of tile j is channel
// 8 * (g / 2) + 2 * j + g % 2, so that a lane ends with 8 neighbouring channels from 8 * t on.

}  // namespace biper
