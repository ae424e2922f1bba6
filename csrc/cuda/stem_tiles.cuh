// The stem for every other shape: in float32 with fused multiply-adds, or on tensor cores.
//
// Tile. A block computes 32 channels of a rectangle of output pixels. Their patch of the image is
// copied to shared memory once, in the compute type. Then all pixels of the convolution under the
// rectangle are computed in float32, 128 at a time. They go to shared memory if there is a pool, or
// directly to the output. Four neighbouring lanes have 8 channels each of one pixel. With
// multiply-adds, a lane has 8 channels of 4 pixels: 32 of them for 4 loads of pixels, free of bank
// conflicts at stride 2, and 2 loads of 16 bytes of weights, which lanes share. On tensor cores, a
// warp has two m16 tiles; weights come from cached global memory, 32 bytes per lane and step.

#pragma once

#include "stem_parts.cuh"

namespace biper::stems {

constexpr int kPassPixels = 128;
constexpr int kConvPitch = kGroup + 4;  // floats of a pixel: 8 lanes of 16 bytes in all banks

struct TileParams {
  StemArgs args;
  bool pooled;
  int tile_h, tile_w;            // output pixels
  int conv_tile_h, conv_tile_w;  // pixels of the convolution under them
  int patch_h, pitch;            // pitch: words of a patch row
  int patch_columns;             // pixels that start in a patch row
  int values;                    // values of a pixel: C' of stem.h, or c without tensor cores
  int column_words;              // words between windows of neighbouring columns
  int runs, steps;               // with tensor cores: runs of a kernel row; steps in total
  Divisor tile_width, conv_tile_width, patch_width, tiles_x, tiles_y;
  int weight_floats;  // without tensor cores: weights of the group in shared memory
};

struct TileMemory {
  float* scales;    // [8]
  float* channels;  // [kChannelArrays, 32]
  float* weights;   // [kernel_h, kernel_w * c, 32]
  uint32_t* patch;  // [patch_h, pitch]
  float* conv;      // [conv_tile_h * conv_tile_w, kConvPitch]
};

__device__ __forceinline__ TileMemory tile_memory(const TileParams& p) {
  TileMemory memory;
  memory.scales = reinterpret_cast<float*>(dynamic_shared());
  memory.channels = memory.scales + kScaleFloats;
  memory.weights = memory.channels + kChannelArrays * kGroup;
  memory.conv = memory.weights + p.weight_floats;
  const int conv_floats = p.pooled ? p.conv_tile_h * p.conv_tile_w * kConvPitch : 0;
  memory.patch = reinterpret_cast<uint32_t*>(memory.conv + conv_floats);
  return memory;
}

// The outputs of a block.
struct Tile {
  int64_t image;
  int out_row, out_column;
  int conv_row, conv_column;  // the first pixel of the convolution under it
};

__device__ __forceinline__ Tile tile_of_block(const TileParams& p) {
  const uint32_t row_tile = p.tiles_x.quotient(blockIdx.x);
  Tile tile;
  tile.image = p.tiles_y.quotient(row_tile);
  tile.out_row = p.tiles_y.remainder(row_tile) * p.tile_h;
  tile.out_column = p.tiles_x.remainder(blockIdx.x) * p.tile_w;
  tile.conv_row = tile.out_row * p.args.pool_stride_h - p.args.pool_padding_h;
  tile.conv_column = tile.out_column * p.args.pool_stride_w - p.args.pool_padding_w;
  return tile;
}

template <int IMAGE, int COMPUTE, bool TENSOR>
__device__ __forceinline__ void load_tile_patch(const TileParams& p, const Patch& patch,
                                                uint32_t* words) {
  for (uint32_t i = threadIdx.x; i < uint32_t(p.patch_h * p.patch_columns); i += kThreads) {
    const int row = p.patch_width.quotient(i), column = p.patch_width.remainder(i);
    float pixel[4];
    read_pixel<IMAGE, 1>(p.args, patch, row, column, pixel);
    if (p.args.scale) normalise_pixel(p.args, patch, row, column, pixel);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int at = column * p.values + c;
      const typename Stream<COMPUTE>::Value rounded = Stream<COMPUTE>::store(pixel[c]);
      if constexpr (TENSOR) {
        using Value = typename Stream<COMPUTE>::Value;
        Value* values = reinterpret_cast<Value*>(words) + row * p.pitch * 2;
        if (c < p.values && at < p.pitch * 2) values[at] = rounded;
      } else {
        float* values = reinterpret_cast<float*>(words) + row * p.pitch;
        if (c < p.values) values[at] = Stream<COMPUTE>::load(rounded);
      }
    }
  }
}

// Store the sums of pixel `index` of the tile's convolution for the pool, or finish the outputs.
template <int COMPUTE>
__device__ __forceinline__ void finish(const TileParams& p, const Tile& tile,
                                       const TileMemory& memory, const LaneChannels& channels,
                                       int index, float (&values)[8]) {
  const StemArgs& a = p.args;
  const bool inside = index < p.conv_tile_h * p.conv_tile_w;
  if (p.pooled) {
    if (inside) {
      float* to = memory.conv + index * kConvPitch + threadIdx.x % 4 * 8;
      store_values<kFloat32, 8>(to, 0, values);
    }
    return;
  }
  const int y = tile.out_row + p.conv_tile_width.quotient(index);
  const int x = tile.out_column + p.conv_tile_width.remainder(index);
  const int64_t pixel = (tile.image * a.out_h + y) * a.out_w + x;
  ChannelValues parameters;
  load_channel_values(channels, parameters);
  emit<COMPUTE>(a, channels, parameters, Destination<COMPUTE>(a, channels, pixel),
                inside && y < a.out_h && x < a.out_w, values);
}

// The first word of a conv pixel's window in the patch. Pixels beyond the tile use its last pixel.
__device__ __forceinline__ int window_start(const TileParams& p, int index) {
  const int last = p.conv_tile_h * p.conv_tile_w - 1;
  const int pixel = index < last ? index : last;
  const int row = p.conv_tile_width.quotient(pixel), column = p.conv_tile_width.remainder(pixel);
  return row * p.args.stride_y * p.pitch + column * p.column_words;
}

template <int COMPUTE>
__device__ __forceinline__ void multiply_add_tile(const TileParams& p, const Tile& tile,
                                                  const TileMemory& memory,
                                                  const LaneChannels& channels) {
  constexpr int kPixels = 4;
  const float* patch = reinterpret_cast<const float*>(memory.patch);
  const int row_values = p.args.kernel_w * p.values;
  for (int first = 0; first < p.conv_tile_h * p.conv_tile_w; first += kPassPixels) {
    const float* pixel[kPixels];
    float sums[kPixels][8];
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      pixel[i] = patch + window_start(p, first + i * 32 + threadIdx.x / 4);
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[i][j] = 0.0f;
    }
    const float* weights = memory.weights + threadIdx.x % 4 * 8;
    for (int row = 0; row < p.args.kernel_h; ++row) {
#pragma unroll 3
      for (int k = 0; k < row_values; ++k) {
        float weight[8];
        load_values<kFloat32, 8>(weights, 0, weight);
        weights += kGroup;
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          const float value = pixel[i][row * p.pitch + k];
#pragma unroll
          for (int j = 0; j < 8; ++j) sums[i][j] = fmaf(value, weight[j], sums[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      finish<COMPUTE>(p, tile, memory, channels, first + i * 32 + threadIdx.x / 4, sums[i]);
    }
  }
}

template <int COMPUTE>
__device__ __forceinline__ void matrix_tile(const TileParams& p, const Tile& tile,
                                            const TileMemory& memory,
                                            const LaneChannels& channels) {
  constexpr int kTiles = 2;  // tiles of 16 pixels
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int all_runs = p.args.kernel_h * p.runs;
  const uint4* all_weights = static_cast<const uint4*>(p.args.weight) +
                             (static_cast<int64_t>(blockIdx.y) * p.steps * 32 + lane) * 2;
  for (int first = 0; first < p.conv_tile_h * p.conv_tile_w; first += kPassPixels) {
    const int pixel = first + warp * (16 * kTiles) + lane / 4;
    const uint32_t* rows[kTiles][2];
    float sums[kTiles][4][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows[m][half] = memory.patch + window_start(p, pixel + m * 16 + half * 8) + lane % 4;
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) sums[m][i / 4][i % 4] = 0.0f;
    }
    const uint4* weights = all_weights;
    int run = 0, run_in_row = 0, at = 0;
#pragma unroll 2
    for (int step = 0; step < p.steps; ++step, weights += 64) {
      const uint4 low = weights[0], high = weights[1];
      const uint32_t b[4][2] = {{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
      uint32_t fragments[kTiles][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool there = run < all_runs;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          fragments[m][2 * half] = there ? rows[m][0][at] : 0;
          fragments[m][2 * half + 1] = there ? rows[m][1][at] : 0;
        }
        ++run, ++run_in_row, at += 4;
        if (run_in_row == p.runs) run_in_row = 0, at += p.pitch - 4 * p.runs;
      }
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply<COMPUTE>(sums[m][j], fragments[m], b[j]);
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float values[8];
        lane_values(sums[m], half, values);
        finish<COMPUTE>(p, tile, memory, channels, pixel + m * 16 + half * 8, values);
      }
    }
  }
}

template <int COMPUTE>
__device__ __forceinline__ void pool_tile(const TileParams& p, const Tile& tile,
                                          const TileMemory& memory, const LaneChannels& channels) {
  const StemArgs& a = p.args;
  const int count = p.tile_h * p.tile_w;
  for (int first = 0; first < count; first += kThreads / 4) {
    const int index = first + threadIdx.x / 4;
    const int row = p.tile_width.quotient(index), column = p.tile_width.remainder(index);
    const int y = tile.out_row + row, x = tile.out_column + column;
    const bool valid = index < count && y < a.out_h && x < a.out_w;
    float best[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) best[i] = minus_infinity();
    for (int i = 0; valid && i < a.pool_kernel_h; ++i) {
      const int conv_y = row * a.pool_stride_h + i;
      if (uint32_t(tile.conv_row + conv_y) >= uint32_t(a.conv_h)) continue;
      for (int j = 0; j < a.pool_kernel_w; ++j) {
        const int conv_x = column * a.pool_stride_w + j;
        if (uint32_t(tile.conv_column + conv_x) >= uint32_t(a.conv_w)) continue;
        const float* from = memory.conv + (conv_y * p.conv_tile_w + conv_x) * kConvPitch;
        float values[8];
        load_values<kFloat32, 8>(from, threadIdx.x % 4 * 8, values);
#pragma unroll
        for (int c = 0; c < 8; ++c) best[c] = fmaxf(best[c], values[c]);
      }
    }
    const int64_t pixel = (tile.image * a.out_h + y) * a.out_w + x;
    ChannelValues parameters;
    load_channel_values(channels, parameters);
    emit<COMPUTE>(a, channels, parameters, Destination<COMPUTE>(a, channels, pixel), valid, best);
  }
}

// Blocks: tiles of images; groups of 32 channels. Dynamic shared memory: see TileMemory.
template <int COMPUTE, bool TENSOR>
__global__ void __launch_bounds__(kThreads, 3) tile_kernel(const TileParams p) {
  const StemArgs& a = p.args;
  const Tile tile = tile_of_block(p);
  const TileMemory memory = tile_memory(p);
  const LaneChannels channels = lane_channels(a, 0, 1, blockIdx.y, memory.channels);
  load_scales(a, memory.scales);
  load_channels(a, blockIdx.y, 1, memory.channels);
  __syncthreads();
  if constexpr (!TENSOR) {
    const float* weights =
        static_cast<const float*>(a.weight) + static_cast<int64_t>(blockIdx.y) * p.weight_floats;
    for (int i = threadIdx.x * 4; i < p.weight_floats; i += kThreads * 4) {
      cp_async<16>(memory.weights + i, weights + i, true);
    }
    cp_async_commit();
  }
  const Patch patch{tile.image * a.stride_n, tile.conv_row * a.stride_y - a.padding_top,
                    tile.conv_column * a.stride_x - a.padding_left, memory.scales};
  with_image_type(a.type, [&](auto type) {
    load_tile_patch<decltype(type)::kType, COMPUTE, TENSOR>(p, patch, memory.patch);
  });
  if constexpr (!TENSOR) cp_async_wait<0>();
  __syncthreads();
  if constexpr (TENSOR) {
    matrix_tile<COMPUTE>(p, tile, memory, channels);
  } else {
    multiply_add_tile<COMPUTE>(p, tile, memory, channels);
  }
  if (!p.pooled) return;
  __syncthreads();
  pool_tile<COMPUTE>(p, tile, memory, channels);
}

}  // namespace biper::stems
