// The stem on tensor cores for the few shapes that networks have, in float16 or bfloat16.
//
// Tile. A warp computes 32 channels of a strip of 16 columns of the convolution, row after row: a
// row is one m16 tile, and its columns are the tile's rows. Weights stay in registers. The block's
// patch of the image is in shared memory in the compute type, (row, column, channel). K runs along
// its rows, so a fragment is one 32-bit load at a constant offset without bank conflicts: columns
// are SX * C' / 2 words apart, lanes of a column 1, and lanes of equal banks read the same word.
//
// Pool, 3x3 at stride 2. A strip gives 7 pooled columns. Maxima down a column are taken in
// registers. Then 16 shuffles give lanes of even columns the left half of the strip and lanes of
// odd columns the right half, so that each has 8 neighbouring channels of one pooled pixel: one
// 16-byte store. No output of the convolution is written before that.
//
// Counts per image for 7x7 at stride 2, 3 to 64 channels, 224x224, pooled to 56x56:
// - bytes: 301 KB of float16 image, 401 KB and 25 KB out, so 0.17 us at 4.3 TB/s; 236 MFLOP take
//   0.30 us at 790 TFLOP/s, which is the limit. 35 % of it are 0.85 us: 197 K clocks of one of 132
//   multiprocessors at 1.75 GHz, each with 4 issue slots.
// - m16n8k16: 8 strips * (56 * 2 + 7) rows * 2 groups * 44 = 83.8 K (11 steps for 147 values, 1.20
//   as many; halo of the strips 1.14, of segments of 8 pooled rows 1.06). At the 62 % of the peak
//   rate that mma.sync is said to reach, 1.6 clocks each: 134 K clocks.
// - shared memory: 42 loads of 32 bits a lane for 44 products, one clock each, 80 K; shuffles 16 K,
//   patch 8 K, parameters 6 K: 110 K clocks, in parallel to those of the tensor cores.
// - issue: two rows of 32 channels are 517 instructions on sm_90; about 95 of these are for borders
//   and ragged channels and seldom run. There are 88 products, 84 loads, 32 maxima, 66 to exchange
//   columns, 56 for bias, clamp, bits and stores. An image has 896 times that, 112 single rows and
//   82 K instructions to read patches: 470 K slots, 118 K clocks.
// Tensor cores are the limit, the two others are close: about 60 % of each at the target of 35 %.
//
// Counts per image for 3x3 at stride 1, 3 to 64 channels, 32x32: 145 KB, 34 ns or 7.8 K clocks. A
// row of a strip and 32 channels is 250 instructions (about 50 seldom run) for 2 pixels of 8
// channels per lane; 128 of them and the patches are 31 K slots, 7.7 K clocks; 1.5 K products.

#pragma once

#include "stem_parts.cuh"

namespace biper::stems {

// POOL: 3x3 at stride 2 with any padding, or no pool. VALUES: C' of stem.h.
template <int KERNEL, int STRIDE, int VALUES, bool POOL, int MIN_BLOCKS>
struct Strips {
  static constexpr int kKernel = KERNEL, kStride = STRIDE, kValues = VALUES;
  static constexpr bool kPool = POOL;
  static constexpr int kMinBlocks = MIN_BLOCKS;
  static constexpr int kStrips = 2;               // strips of a block
  static constexpr int kColumns = POOL ? 7 : 16;  // output columns of a strip
  static constexpr int kStep = POOL ? 14 : 16;    // columns between strips
  static constexpr int kColumnWords = STRIDE * VALUES / 2;
  static constexpr int kRuns = (KERNEL * VALUES + 7) / 8;  // runs of a kernel row
  static constexpr int kAllRuns = KERNEL * kRuns;
  static constexpr int kSteps = (kAllRuns + 1) / 2;
  static constexpr int kConvColumns = (kStrips - 1) * kStep + 16;
  static constexpr int kPatchColumns = (kConvColumns - 1) * STRIDE + KERNEL;
  // Words of a patch row, including the last run of the last column: whole items of the loader.
  static constexpr int kNeeded = (kConvColumns - 1) * kColumnWords + kRuns * 4;
  static constexpr int kItemPixels = VALUES % 2 ? 2 : 1;
  static constexpr int kItemWords = kItemPixels * VALUES / 2;
  static constexpr int kItems = (kNeeded + kItemWords - 1) / kItemWords;
  static constexpr int kPitch = kItems * kItemWords;
  static_assert(STRIDE * VALUES % 2 == 0, "windows start on words");
};

struct StripParams {
  StemArgs args;
  int segment_rows;  // output rows of a tile
  int block_groups;  // groups of 32 channels of a block, 1 or 2
  int patch_rows;
  uint32_t tiles;
  Divisor tiles_x, tiles_y;
};

__device__ __forceinline__ int conv_rows(bool pool, int rows) { return pool ? 2 * rows + 1 : rows; }

// A thread reads one item of every `rows_at_once`-th row.
template <class S, int IMAGE, int COMPUTE>
__device__ __forceinline__ void load_patch(const StripParams& p, const Patch& patch,
                                           uint32_t* words) {
  using Value = typename Stream<IMAGE>::Value;
  constexpr int kValues = S::kItemPixels * S::kValues;
  static_assert(S::kItems <= 64, "a block of two warps reads whole rows");
  const StemArgs& a = p.args;
  const int rows_at_once = blockDim.x / S::kItems;
  const int first_row = threadIdx.x / S::kItems, item = threadIdx.x % S::kItems;
  if (first_row >= rows_at_once) return;

  bool inside[S::kItemPixels];
  int offsets[kValues];
#pragma unroll
  for (int i = 0; i < S::kItemPixels; ++i) {
    const int x = patch.left + item * S::kItemPixels + i;
    inside[i] = uint32_t(x) < uint32_t(a.w);
#pragma unroll
    for (int c = 0; c < S::kValues; ++c) {
      offsets[i * S::kValues + c] =
          x * static_cast<int>(a.stride_w) + c * static_cast<int>(a.stride_c);
    }
  }
  const bool fourth = S::kValues < 4 || a.c == 4;  // there is no padding channel
  const Value* row_start =
      static_cast<const Value*>(a.x) + patch.image + (patch.top + first_row) * a.stride_h;
  uint32_t* to = words + first_row * S::kPitch + item * S::kItemWords;
#pragma unroll 2
  for (int row = first_row; row < p.patch_rows; row += rows_at_once) {
    const bool row_inside = uint32_t(patch.top + row) < uint32_t(a.h);
    float values[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const bool there = inside[i / S::kValues] && (i % S::kValues < 3 || fourth);
      values[i] = row_inside && there ? Stream<IMAGE>::load(row_start[offsets[i]]) : 0.0f;
    }
    if (a.scale) {
      float scale[4], offset[4];
      load_values<kFloat32, 4>(patch.scale, 0, scale);
      load_values<kFloat32, 4>(patch.scale, 4, offset);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const int c = i % S::kValues;
        const bool there = row_inside && inside[i / S::kValues];
        values[i] = there ? __fmaf_rn(values[i], scale[c], offset[c]) : 0.0f;
      }
    }
    if constexpr (S::kItemWords == 2) {
      store_values<COMPUTE, 4>(to, 0, values);
    } else {
#pragma unroll
      for (int w = 0; w < S::kItemWords; ++w) to[w] = pack_word<COMPUTE>(values + 2 * w);
    }
    row_start += rows_at_once * a.stride_h;
    to += rows_at_once * S::kPitch;
  }
}

template <class S>
struct Weights {
  uint32_t words[S::kSteps][8];
};

template <class S>
__device__ __forceinline__ void load_weights(const StemArgs& a, int group, Weights<S>& weights) {
  const uint4* from = static_cast<const uint4*>(a.weight) +
                      (static_cast<int64_t>(group) * S::kSteps * 32 + threadIdx.x % 32) * 2;
#pragma unroll
  for (int step = 0; step < S::kSteps; ++step) {
    const uint4 low = from[step * 64], high = from[step * 64 + 1];
    uint32_t (&to)[8] = weights.words[step];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  }
}

// Compute one row of the strip: sums[tile] of columns g and g + 8. `row` is the lane's patch word.
template <class S, int COMPUTE>
__device__ __forceinline__ void convolve_row(const uint32_t* row, const Weights<S>& weights,
                                             float (&sums)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int step = 0; step < S::kSteps; ++step) {
    uint32_t a[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int run = 2 * step + half;
      const int at = run / S::kRuns * S::kPitch + run % S::kRuns * 4;
      a[2 * half] = run < S::kAllRuns ? row[at] : 0;
      a[2 * half + 1] = run < S::kAllRuns ? row[at + 8 * S::kColumnWords] : 0;
    }
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      const uint32_t b[2] = {weights.words[step][2 * tile], weights.words[step][2 * tile + 1]};
      multiply<COMPUTE>(sums[tile], a, b);
    }
  }
}

// The maximum of three neighbouring columns at every second column. left and right are the values
// of columns g and g + 8. The result belongs to window g / 2, or to 4 + g / 2 in lanes of odd
// columns; the last of these has no window.
__device__ __forceinline__ void pool_columns(const float (&left)[8], const float (&right)[8],
                                             float (&pooled)[8]) {
  const int lane = threadIdx.x % 32, column = lane / 4;
  const bool odd = column % 2;
  // The column after a pair is the first of the next pair; after column 7 that is column 8, which
  // the lanes of column 1 have received.
  const int next = column == 6 ? lane % 4 + 4 : lane + 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float kept = odd ? right[i] : left[i];
    const float received = __shfl_xor_sync(kAllLanes, odd ? left[i] : right[i], 4);
    const float behind = __shfl_sync(kAllLanes, odd ? received : kept, next & 31);
    pooled[i] = fmaxf(fmaxf(kept, received), behind);
  }
}

template <class S, int COMPUTE>
struct Warp {
  const StripParams& p;
  const LaneChannels& lane;
  const Weights<S>& weights;
  const uint32_t* patch;  // the lane's word in the first row
  int64_t image;
  int out_row, out_column;    // the first outputs of this strip
  int conv_row, conv_column;  // the first that it computes

  // Rows and columns outside of the convolution's output never win.
  __device__ __forceinline__ void pooled_row(int row, float (&sums)[4][4]) const {
    const StemArgs& a = p.args;
    if (uint32_t(conv_row + row) >= uint32_t(a.conv_h)) {
#pragma unroll
      for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = minus_infinity();
      return;
    }
    convolve_row<S, COMPUTE>(patch + row * S::kStride * S::kPitch, weights, sums);
    if (conv_column >= 0 && conv_column + 16 <= a.conv_w) return;
    const int column = conv_column + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const bool there = uint32_t(column + i % 4 / 2 * 8) < uint32_t(a.conv_w);
      if (!there) sums[i / 4][i % 4] = minus_infinity();
    }
  }

  __device__ __forceinline__ Destination<COMPUTE> destination(int column) const {
    const StemArgs& a = p.args;
    return {a, lane, (image * a.out_h + out_row) * a.out_w + out_column + column};
  }

  __device__ __forceinline__ void pooled_rows(int rows) const {
    const int column = threadIdx.x % 32 / 4;
    const int window = column % 2 ? 4 + column / 2 : column / 2;
    const bool valid = window < S::kColumns && out_column + window < p.args.out_w;
    Destination<COMPUTE> to = destination(window);
    float best[4][4], sums[4][4];
    pooled_row(0, best);
    for (int row = 0; row < rows; ++row) {
      pooled_row(2 * row + 1, sums);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        best[i / 4][i % 4] = fmaxf(best[i / 4][i % 4], sums[i / 4][i % 4]);
      }
      pooled_row(2 * row + 2, sums);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        best[i / 4][i % 4] = fmaxf(best[i / 4][i % 4], sums[i / 4][i % 4]);
      }
      float left[8], right[8], pooled[8];
      lane_values(best, 0, left);
      lane_values(best, 1, right);
      pool_columns(left, right, pooled);
      ChannelValues channels;
      load_channel_values(lane, channels);
      emit<COMPUTE>(p.args, lane, channels, to, valid, pooled);
      to.advance(p.args, p.args.out_w);
#pragma unroll
      for (int i = 0; i < 16; ++i) best[i / 4][i % 4] = sums[i / 4][i % 4];
    }
  }

  __device__ __forceinline__ void plain_rows(int rows) const {
    const int column = threadIdx.x % 32 / 4;
    const bool valid = out_column + column < p.args.out_w;
    const bool right_valid = out_column + column + 8 < p.args.out_w;
    Destination<COMPUTE> to = destination(column), right_to = destination(column + 8);
    ChannelValues channels;
    load_channel_values(lane, channels);
    for (int row = 0; row < rows; ++row) {
      float sums[4][4], values[8];
      convolve_row<S, COMPUTE>(patch + row * S::kStride * S::kPitch, weights, sums);
      lane_values(sums, 0, values);
      emit<COMPUTE>(p.args, lane, channels, to, valid, values);
      lane_values(sums, 1, values);
      emit<COMPUTE>(p.args, lane, channels, right_to, right_valid, values);
      to.advance(p.args, p.args.out_w);
      right_to.advance(p.args, p.args.out_w);
    }
  }
};

// Warps of a block: block_groups groups of channels, each with kStrips strips. Blocks: tiles, in
// steps of the grid; block_groups groups of channels.
// Dynamic shared memory: scales, the arrays of load_channels, the patch.
template <class S, int COMPUTE>
__global__ void __launch_bounds__(kThreads, S::kMinBlocks) strip_kernel(const StripParams p) {
  const StemArgs& a = p.args;
  float* scales = reinterpret_cast<float*>(dynamic_shared());
  float* channel_arrays = scales + kScaleFloats;
  uint32_t* words =
      reinterpret_cast<uint32_t*>(channel_arrays + kChannelArrays * p.block_groups * kGroup);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int strip = warp % S::kStrips, local_group = warp / S::kStrips;
  const int group = blockIdx.y * p.block_groups + local_group;
  const bool used = group * kGroup < a.o;

  load_scales(a, scales);
  load_channels(a, blockIdx.y * p.block_groups, p.block_groups, channel_arrays);
  const LaneChannels channels =
      lane_channels(a, local_group, p.block_groups, group, channel_arrays);
  Weights<S> weights;
  load_weights<S>(a, used ? group : 0, weights);

  for (uint32_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const uint32_t row_tile = p.tiles_x.quotient(tile);
    const uint32_t image = p.tiles_y.quotient(row_tile);
    const int out_row = p.tiles_y.remainder(row_tile) * p.segment_rows;
    const int out_column = p.tiles_x.remainder(tile) * (S::kStrips * S::kColumns);
    const int conv_row = S::kPool ? 2 * out_row - a.pool_padding_h : out_row;
    const int conv_column = S::kPool ? 2 * out_column - a.pool_padding_w : out_column;
    const Patch patch{image * a.stride_n, conv_row * S::kStride - a.padding_top,
                      conv_column * S::kStride - a.padding_left, scales};
    __syncthreads();  // parameters are loaded, and the previous tile is done with the patch
    with_image_type(
        a.type, [&](auto type) { load_patch<S, decltype(type)::kType, COMPUTE>(p, patch, words); });
    __syncthreads();
    const int strip_column = out_column + strip * S::kColumns;
    if (!used || strip_column >= a.out_w) continue;
    const Warp<S, COMPUTE> work{p,
                                channels,
                                weights,
                                words + (strip * S::kStep + lane / 4) * S::kColumnWords + lane % 4,
                                image,
                                out_row,
                                strip_column,
                                conv_row,
                                conv_column + strip * S::kStep};
    const int rows = a.out_h - out_row < p.segment_rows ? a.out_h - out_row : p.segment_rows;
    if constexpr (S::kPool) {
      work.pooled_rows(rows);
    } else {
      work.plain_rows(rows);
    }
  }
}

}  // namespace biper::stems
