// Binary convolution on tensor cores: an implicit GEMM of rows (output pixels), columns (output
// channels) and pairs of words (taps and input channels), the epilogue fused.
//
// With a, w in {0, 1} for -1 and +1, padding 0, V the taps of a pixel inside the image and C the
// input channels, an accumulator is (tensor cores from sm_90 on know AND only)
//
//     dot = 4 * popc(a & w) - 2 * popc(a) + |V| * C - 2 * popc(w over V)
//
// The first sum is the matrix product, the second the same product with one more column that is all
// ones, and the rest depends on the column and on V alone. V is a rectangle of taps, so its term
// comes from a two-dimensional prefix sum over the taps; a block makes a table of the few
// rectangles that an image has.
//
// A block takes ROWS consecutive output pixels, across rows of the map and images, and COLUMNS
// channels. Its input patch lies in shared memory once, with zeros where the padding is, so that no
// instruction of the product looks at borders; a table has the patch offset of every pair of words.
// Weights come in fragments, in stages of a few steps, two stages in flight. Channels come in
// chunks that fit, each with a patch of its own.
//
// Order of the pairs: chunk, tap, pair within the chunk; lane t of a quad takes pair 4 * step + t
// in every step. Columns of a block of 32 are permuted so that a thread ends up with 8 neighbouring
// channels: column g of the j-th group of 8 is channel 8 * (g / 2) + 2 * j + g % 2.
//
// Per step of 256 bits a warp of 32 x 64 reads 3 KB of shared memory (24 clocks at 128 B) for 18
// products. The epilogue's 12 or more instructions for each output are what counts.

#pragma once

#include "divisor.cuh"
#include "epilogue.cuh"

namespace biper {

constexpr int kBlock = 32;           // channels of one block of fragments
constexpr int kFragmentWords = 256;  // of 32 channels in one step: 2 pairs of groups, 32 lanes, 4

constexpr int kMaxClasses = 96;  // rectangles of valid taps that an image may have

// A quotient and what is left.
struct Quotient {
  int value, rest;
};

__device__ __forceinline__ Quotient divide(int number, const Divisor& by) {
  const int quotient = static_cast<int>(by.quotient(static_cast<uint32_t>(number)));
  return {quotient, number - quotient * static_cast<int>(by.divisor)};
}

// What the kernel takes: the call, and how the launcher cut it.
struct BconvMmaParams {
  ConvShape shape;
  ConvEpilogue epilogue;
  ConvOutputs outputs;
  const uint32_t* bits;
  const uint32_t* fragments;
  const int32_t* sums;
  int in_words;                        // of a pixel
  uint32_t last_mask;                  // channels of its last word
  int chunk_words;                     // of a pixel in one patch, even
  int chunks;                          //
  int steps;                           // of 256 bits in a chunk
  int stage_steps;                     // of a chunk whose weights are in shared memory at once
  int stage_buffers;                   // 1, or 2 where there are several stages
  int pixel_words;                     // of a pixel in shared memory, padded against bank conflicts
  int copy_words;                      // 1, 2 or 4: of one asynchronous copy
  int patch_width;                     // input columns
  int patch_words;                     // of one patch
  int patches;                         // 1, or 2 where there are several chunks
  int units;                           // pool windows (output pixels) of a column of tiles
  Divisor tile_width;                  // output columns (pool windows) of a block's rows
  Divisor out_h;                       // of shape.out_h
  Divisor window_w;                    // of shape.pool.kernel_w
  Divisor dilation_h;                  // of shape.conv.dilation_h
  Divisor dilation_w;                  // of shape.conv.dilation_w
  Divisor copies;                      // of a pixel in a chunk
  Divisor image_rows;                  // patch rows of an image that is in the tile from its top on
  int window_shift;                    // log2 of the pixels in a pool window: 0 or 2
  int rows_cut;                        // taps cut off at the lower border, at most
  int columns_start;                   // taps before the left border, at most
  int columns_cut;                     // taps cut off at the right border, at most
  int classes;                         // rectangles of valid taps
  uint8_t rectangles[kMaxClasses][4];  // top, bottom, left, right; empty where there is none
};

// What of a tile's rows the threads need again and again, [ROWS] each, in shared memory.
struct TileRows {
  int* patch;    // word of the pixel's first tap in a patch
  int* classes;  // its rectangle of valid taps
  int* output;   // pixel of the output, -1 for none
};

// What leaves the kernel. With kRagged the call says it, and channels need not come in whole lanes.
enum Leaving : int { kFloat32Stream, kFloat16Stream, kBfloat16Stream, kLimits, kDots, kRagged };

// 256 bits of 16 rows and 8 columns, on bits or, where a device has none, bytes. Any order of the
// bits will do as long as both operands agree, so that bytes are taken out of the same registers:
// every eighth bit of a word makes four of them.
template <bool BYTES>
__device__ __forceinline__ void product(int (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  if (!BYTES) {
    bmma_and_popc(d, a, b);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    constexpr uint32_t kOnes = 0x01010101u;
    const uint32_t bytes_a[4] = {(a[0] >> i) & kOnes, (a[1] >> i) & kOnes, (a[2] >> i) & kOnes,
                                 (a[3] >> i) & kOnes};
    const uint32_t bytes_b[2] = {(b[0] >> i) & kOnes, (b[1] >> i) & kOnes};
    imma_u8(d, bytes_a, bytes_b);
  }
}

// The first valid tap of a window along one axis, and the taps cut off at its end.
struct Taps {
  int first, cut;
};

__device__ __forceinline__ Taps valid_taps(int start, int size, int kernel,
                                           const Divisor& dilation) {
  const int step = static_cast<int>(dilation.divisor) - 1;
  int first = start < 0 ? divide(-start + step, dilation).value : 0;
  first = first < kernel ? first : kernel;
  int end = size > start ? divide(size - start + step, dilation).value : 0;
  end = end < kernel ? end : kernel;
  end = end > first ? end : first;
  return {first, kernel - end};
}

// Where a unit is.
struct Unit {
  int image, row, column;  // of the output, the column from the tile's first on
};

__device__ __forceinline__ Unit locate(const BconvMmaParams& p, int unit) {
  const Quotient row = divide(unit, p.tile_width);
  const Quotient image = divide(row.value, p.out_h);
  return {image.value, image.rest, row.rest};
}

// Where a tile begins and ends, and the pixels of its images in the patch.
struct Tile {
  int first_unit;
  Unit first, last;
  int first_column;   // input column of the patch's first
  int rows_of_first;  // patch rows of the first image, were it in the tile to its bottom
};

// Input rows that some rows of units see.
__device__ __forceinline__ int patch_rows(const ConvShape& s, int unit_rows) {
  return (unit_rows * s.pool.kernel_h - 1) * s.conv.stride_h +
         (s.conv.kernel_h - 1) * s.conv.dilation_h + 1;
}

template <int ROWS>
__device__ __forceinline__ Tile locate_tile(const BconvMmaParams& p) {
  const ConvShape& s = p.shape;
  Tile tile;
  const int units = ROWS >> p.window_shift;
  tile.first_unit = static_cast<int>(blockIdx.x) * units;
  const int end = tile.first_unit + units < p.units ? tile.first_unit + units : p.units;
  tile.first = locate(p, tile.first_unit);
  tile.last = locate(p, end - 1);
  tile.first_column =
      static_cast<int>(blockIdx.z * p.tile_width.divisor) * s.pool.kernel_w * s.conv.stride_w -
      s.conv.pad_left;
  tile.rows_of_first = patch_rows(s, s.out_h - tile.first.row);
  return tile;
}

// Fill in one row of the tile.
__device__ __forceinline__ void describe_row(const BconvMmaParams& p, const Tile& tile,
                                             const TileRows& rows, int at) {
  const ConvShape& s = p.shape;
  const int unit = tile.first_unit + (at >> p.window_shift);
  const Unit place = locate(p, unit);
  const Quotient in_window = divide(at & ((1 << p.window_shift) - 1), p.window_w);
  const int column = static_cast<int>(blockIdx.z * p.tile_width.divisor) + place.column;
  rows.patch[at] = rows.classes[at] = 0;
  rows.output[at] = -1;
  if (unit >= p.units || column >= s.out_w) return;
  const int conv_row = place.row * s.pool.kernel_h + in_window.value;
  const int conv_column = column * s.pool.kernel_w + in_window.rest;
  int patch_row = conv_row * s.conv.stride_h;
  if (place.image == tile.first.image) {
    patch_row -= tile.first.row * s.pool.kernel_h * s.conv.stride_h;
  } else {
    patch_row += tile.rows_of_first +
                 (place.image - tile.first.image - 1) * static_cast<int>(p.image_rows.divisor);
  }
  const int patch_column = (place.column * s.pool.kernel_w + in_window.rest) * s.conv.stride_w;
  rows.patch[at] = (patch_row * p.patch_width + patch_column) * p.pixel_words;
  const Taps vertical = valid_taps(conv_row * s.conv.stride_h - s.conv.pad_top, s.height,
                                   s.conv.kernel_h, p.dilation_h);
  const Taps horizontal = valid_taps(conv_column * s.conv.stride_w - s.conv.pad_left, s.width,
                                     s.conv.kernel_w, p.dilation_w);
  rows.classes[at] = ((vertical.first * (p.rows_cut + 1) + vertical.cut) * (p.columns_start + 1) +
                      horizontal.first) *
                         (p.columns_cut + 1) +
                     horizontal.cut;
  if (in_window.value == 0 && in_window.rest == 0) {
    rows.output[at] = (place.image * s.out_h + place.row) * s.out_w + column;
  }
}

// Start copying the patch of a chunk, zeros for what is outside of the image or the channels.
template <int WORDS, int THREADS>
__device__ __forceinline__ void copy_patch(const BconvMmaParams& p, const Tile& tile, int chunk,
                                           uint32_t* patch) {
  const ConvShape& s = p.shape;
  const int later_images = tile.last.image - tile.first.image;
  const int total = later_images == 0
                        ? patch_rows(s, tile.last.row - tile.first.row + 1)
                        : tile.rows_of_first +
                              (later_images - 1) * static_cast<int>(p.image_rows.divisor) +
                              patch_rows(s, tile.last.row + 1);
  const int lane = threadIdx.x % 32;
  const int first_word = chunk * p.chunk_words;
  const int row_copies = p.patch_width * static_cast<int>(p.copies.divisor);
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < total; row += THREADS / 32) {
    int image = tile.first.image;
    int y = row + tile.first.row * s.pool.kernel_h * s.conv.stride_h - s.conv.pad_top;
    if (row >= tile.rows_of_first) {
      const Quotient beyond = divide(row - tile.rows_of_first, p.image_rows);
      image += 1 + beyond.value;
      y = beyond.rest - s.conv.pad_top;
    }
    const bool row_valid = y >= 0 && y < s.height;
    const int64_t image_row = static_cast<int64_t>(image) * s.height + y;
    const uint32_t* const from = p.bits + image_row * s.width * p.in_words + first_word;
    uint32_t* const to = patch + row * p.patch_width * p.pixel_words;
#pragma unroll 1
    for (int i = lane; i < row_copies; i += 32) {
      const Quotient column = divide(i, p.copies);
      const int word = column.rest * WORDS;
      const int x = tile.first_column + column.value;
      const bool valid = row_valid && x >= 0 && x < s.width && first_word + word < p.in_words;
      cp_async<4 * WORDS>(to + column.value * p.pixel_words + word,
                          valid ? from + static_cast<int64_t>(x) * p.in_words + word : p.bits,
                          valid);
    }
  }
}

// Start copying the weights of a stage.
template <int COLUMNS, int THREADS>
__device__ __forceinline__ void copy_weights(const BconvMmaParams& p, int first_step, int steps,
                                             int first_block, int blocks, uint32_t* to) {
  constexpr int kCopies = kFragmentWords / 4;  // of 16 bytes in a step of 32 channels
  const int total_steps = p.chunks * p.steps;
#pragma unroll 1
  for (int i = threadIdx.x; i < steps * (COLUMNS / kBlock) * kCopies; i += THREADS) {
    const int copy = i % kCopies;
    const int block = i / kCopies % (COLUMNS / kBlock);
    const int step = i / kCopies / (COLUMNS / kBlock);
    const bool valid = first_block + block < blocks;
    const int64_t from =
        (static_cast<int64_t>(valid ? first_block + block : 0) * total_steps + first_step + step) *
            kFragmentWords +
        4 * copy;
    cp_async<16>(to + 4 * i, p.fragments + from, valid);
  }
}

// The words of the patch that a lane takes in a step: the pair's offset from the pixel's first tap,
// and which word of the chunk it begins with. Pairs behind the last tap have no word.
__device__ __forceinline__ int2 pair_offset(const BconvMmaParams& p, int pair) {
  const int pairs = p.chunk_words / 2;
  const int tap = pair / pairs;
  const ConvShape& s = p.shape;
  if (tap >= s.conv.kernel_h * s.conv.kernel_w) return make_int2(0, p.in_words);
  const int word = 2 * (pair % pairs);
  const int y = tap / s.conv.kernel_w * s.conv.dilation_h;
  const int x = tap % s.conv.kernel_w * s.conv.dilation_w;
  return make_int2((y * p.patch_width + x) * p.pixel_words + word, word);
}

// The channels in a word of a pixel: the rest may have any bits.
__device__ __forceinline__ uint32_t channel_mask(const BconvMmaParams& p, int word) {
  if (word < p.in_words - 1) return 0xffffffffu;
  return word == p.in_words - 1 ? p.last_mask : 0u;
}

// |V| * C - 2 * popc(w over V) for one rectangle of taps and one channel.
__device__ __forceinline__ int border_term(const BconvMmaParams& p, int index, int channel,
                                           int blocks) {
  const int top = p.rectangles[index][0], bottom = p.rectangles[index][1];
  const int left = p.rectangles[index][2], right = p.rectangles[index][3];
  if (bottom <= top || right <= left || channel >= blocks * kBlock) return 0;
  const int row = p.shape.conv.kernel_w + 1;
  const int stride = blocks * kBlock;
  const int32_t* const sums = p.sums + channel;
  const int weights = sums[(bottom * row + right) * stride] - sums[(top * row + right) * stride] -
                      sums[(bottom * row + left) * stride] + sums[(top * row + left) * stride];
  return (bottom - top) * (right - left) * p.shape.in_channels - 2 * weights;
}

// Copy the parameters of the block's channels; neutral ones beyond the last channel.
template <int COLUMNS, int THREADS>
__device__ __forceinline__ void copy_scales(const BconvMmaParams& p, int first,
                                            const SharedScales& to) {
  const ConvEpilogue& e = p.epilogue;
#pragma unroll 1
  for (int i = threadIdx.x; i < COLUMNS; i += THREADS) {
    const int channel = first + i;
    const bool there = channel < p.shape.out_channels;
    to.pool_min[i] = there && e.pool_min != nullptr && e.pool_min[channel];
    if (e.multiplier == nullptr) continue;
    to.multiplier[i] = there ? e.multiplier[channel] : 0.0f;
    to.bias[i] = there ? e.bias[channel] : 0.0f;
    to.slope[i] = there && e.slope != nullptr ? e.slope[channel] : 0.0f;
    to.shift[i] = there && e.shift != nullptr ? e.shift[channel] : 0.0f;
    if (e.threshold == nullptr) continue;
    const Comparison made =
        there ? comparison(e.threshold[channel], e.sense != nullptr && e.sense[channel])
              : Comparison{1.0f, 0.0f};
    to.factor[i] = made.factor;
    to.addend[i] = made.addend;
  }
}

// The maximum over a pool window of 4 pixels, or its minimum, in all four lanes that hold them.
__device__ __forceinline__ int pool(int value, bool minimum) {
#pragma unroll
  for (int distance = 4; distance <= 8; distance *= 2) {
    const int other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = minimum ? min(value, other) : max(value, other);
  }
  return value;
}

// The float steps for eight channels. Returns their bits, 0 where none leave.
template <Leaving LEAVING>
__device__ __forceinline__ uint32_t finish(const BconvMmaParams& p, const SharedScales& scales,
                                           int channel, int64_t index, Lane lane,
                                           const int (&dots)[kLane]) {
  constexpr int kType = LEAVING == kFloat16Stream    ? kFloat16
                        : LEAVING == kBfloat16Stream ? kBfloat16
                                                     : kFloat32;
  const ConvOutputs& out = p.outputs;
  float v[kLane], residual[kLane] = {};
  if (out.residual != nullptr) {
    if (LEAVING == kRagged) {
      load_any(out.residual_type, out.residual, index, lane, residual);
    } else {
      load_lane<kType, true>(out.residual, index, lane, residual);
    }
  }
  float multiplier[kLane], bias[kLane];
  load_vector(scales.multiplier + channel, multiplier);
  load_vector(scales.bias + channel, bias);
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    v[i] = __fmaf_rn(multiplier[i], static_cast<float>(dots[i]), bias[i]);
  }
  if (out.residual != nullptr) {
#pragma unroll
    for (int i = 0; i < kLane; ++i) v[i] = __fadd_rn(v[i], residual[i]);
  }
  activate(p.epilogue, scales, channel, v);
  if (out.floats != nullptr) {
    if (LEAVING == kRagged) {
      store_any(out.float_type, out.floats, index, lane, v);
    } else {
      store_lane<kType, true>(out.floats, index, lane, v);
    }
  }
  return out.bits == nullptr ? 0u : compare(p.epilogue, scales, channel, v);
}

template <int ROW_TILES, int COLUMN_TILES, int ROW_WARPS, bool BYTES, Leaving LEAVING>
__global__ void __launch_bounds__(32 * ROW_WARPS) bconv_mma(BconvMmaParams p) {
  constexpr int kRows = 16 * ROW_TILES * ROW_WARPS;
  constexpr int kColumns = 8 * COLUMN_TILES;
  constexpr int kThreads = 32 * ROW_WARPS;
  constexpr int kBlocks = kColumns / kBlock;  // of 32 channels
  constexpr bool kWhole = LEAVING != kRagged;
#ifdef __CUDA_ARCH__
  constexpr bool kHasProduct = __CUDA_ARCH__ >= 800 && (BYTES || __CUDA_ARCH__ < 1000);
  if (!kHasProduct) {  // never started there; nothing of the rest is compiled
    __trap();
    return;
  }
#endif
  static_assert(COLUMN_TILES % 4 == 0, "a thread finishes 8 channels of 32");
  const ConvShape& s = p.shape;

  // Shared memory: patches, stages of weights, the table of pairs, parameters, rows, border terms.
  uint32_t* const patches = reinterpret_cast<uint32_t*>(dynamic_shared());
  uint32_t* const weights = patches + p.patches * p.patch_words;
  const int stage_words = p.stage_steps * kBlocks * kFragmentWords;
  int2* const pairs = reinterpret_cast<int2*>(weights + p.stage_buffers * stage_words);
  float* const vectors = reinterpret_cast<float*>(pairs + 4 * p.steps);
  const SharedScales scales = {vectors,
                               vectors + kColumns,
                               vectors + 2 * kColumns,
                               vectors + 3 * kColumns,
                               vectors + 4 * kColumns,
                               vectors + 5 * kColumns,
                               reinterpret_cast<int*>(vectors + 6 * kColumns)};
  int* const first_dots = reinterpret_cast<int*>(vectors + kSharedVectors * kColumns);
  int* const spans = first_dots + kColumns;
  int* const row_values = first_dots + 2 * kColumns;
  const TileRows rows = {row_values, row_values + kRows, row_values + 2 * kRows};
  int* const border_terms = row_values + 3 * kRows;

  const int first_channel = static_cast<int>(blockIdx.y) * kColumns;
  const int blocks = (s.out_channels + kBlock - 1) / kBlock;
  const Tile tile = locate_tile<kRows>(p);
  const int stages_of_chunk = (p.steps + p.stage_steps - 1) / p.stage_steps;

  const auto copy_chunk = [&](int chunk) {
    uint32_t* to = patches + chunk % p.patches * p.patch_words;
    if (p.copy_words == 4) {
      copy_patch<4, kThreads>(p, tile, chunk, to);
    } else if (p.copy_words == 2) {
      copy_patch<2, kThreads>(p, tile, chunk, to);
    } else {
      copy_patch<1, kThreads>(p, tile, chunk, to);
    }
  };
  const auto copy_stage = [&](int chunk, int stage) {
    const int first = stage * p.stage_steps;
    const int steps = p.steps - first < p.stage_steps ? p.steps - first : p.stage_steps;
    const int buffer = (chunk * stages_of_chunk + stage) % p.stage_buffers;
    copy_weights<kColumns, kThreads>(p, chunk * p.steps + first, steps,
                                     static_cast<int>(blockIdx.y) * kBlocks, blocks,
                                     weights + buffer * stage_words);
  };

  copy_chunk(0);
  copy_stage(0, 0);
  cp_async_commit();

#pragma unroll 1
  for (int i = threadIdx.x; i < 4 * p.steps; i += kThreads) pairs[i] = pair_offset(p, i);
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows; i += kThreads) describe_row(p, tile, rows, i);
  copy_scales<kColumns, kThreads>(p, first_channel, scales);
  const bool limits = LEAVING == kLimits || (LEAVING == kRagged && p.epilogue.first != nullptr);
  if (limits) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kColumns; i += kThreads) {
      const bool there = first_channel + i < s.out_channels;
      first_dots[i] = there ? p.epilogue.first[first_channel + i] : 0;
      spans[i] = there ? static_cast<int>(p.epilogue.span[first_channel + i]) : 0;
    }
  }
#pragma unroll 2
  for (int i = threadIdx.x; i < p.classes * kColumns; i += kThreads) {
    border_terms[i] = border_term(p, i / kColumns, first_channel + i % kColumns, blocks);
  }

  const int lane = threadIdx.x % 32;
  const int group = lane / 4;    // row and column of the fragments
  const int quarter = lane % 4;  // pair of words
  const int row_base = static_cast<int>(threadIdx.x) / 32 * 16 * ROW_TILES;

  int sums[ROW_TILES][COLUMN_TILES][4] = {};
  int ones[ROW_TILES][4] = {};
  int patch_at[ROW_TILES][2] = {};

#pragma unroll 1
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
#pragma unroll 1
    for (int stage = 0; stage < stages_of_chunk; ++stage) {
      cp_async_wait<0>();
      __syncthreads();  // the stage is there, and all threads are done with the one before it
      if (stage + 1 < stages_of_chunk) {
        copy_stage(chunk, stage + 1);
      } else if (chunk + 1 < p.chunks) {
        copy_stage(chunk + 1, 0);
      }
      if (stage == 0 && chunk + 1 < p.chunks) copy_chunk(chunk + 1);
      cp_async_commit();
      if (chunk == 0 && stage == 0) {
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i) {
          patch_at[i][0] = rows.patch[row_base + 16 * i + group];
          patch_at[i][1] = rows.patch[row_base + 16 * i + group + 8];
        }
      }

      const uint32_t* const patch = patches + chunk % p.patches * p.patch_words;
      const uint32_t* const stage_weights =
          weights + (chunk * stages_of_chunk + stage) % p.stage_buffers * stage_words;
      const int first_step = stage * p.stage_steps;
      const int end_step =
          first_step + p.stage_steps < p.steps ? first_step + p.stage_steps : p.steps;
#pragma unroll 1
      for (int step = first_step; step < end_step; ++step) {
        const int2 pair = pairs[4 * step + quarter];
        uint32_t a[ROW_TILES][4];
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i) {
          const uint2 upper = *reinterpret_cast<const uint2*>(patch + patch_at[i][0] + pair.x);
          const uint2 lower = *reinterpret_cast<const uint2*>(patch + patch_at[i][1] + pair.x);
          a[i][0] = upper.x;
          a[i][1] = lower.x;
          a[i][2] = upper.y;
          a[i][3] = lower.y;
        }
        const int word = chunk * p.chunk_words + pair.y;
        const uint32_t all_ones[2] = {channel_mask(p, word), channel_mask(p, word + 1)};
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i) product<BYTES>(ones[i], a[i], all_ones);
        const uint4* const fragments =
            reinterpret_cast<const uint4*>(stage_weights +
                                           (step - first_step) * kBlocks * kFragmentWords) +
            lane;
#pragma unroll
        for (int j = 0; j < COLUMN_TILES / 2; ++j) {
          const uint4 four = fragments[32 * j];
          const uint32_t b0[2] = {four.x, four.y};
          const uint32_t b1[2] = {four.z, four.w};
#pragma unroll
          for (int i = 0; i < ROW_TILES; ++i) {
            product<BYTES>(sums[i][2 * j], a[i], b0);
            product<BYTES>(sums[i][2 * j + 1], a[i], b1);
          }
        }
      }
    }
  }

  // Epilogue: a thread has 8 neighbouring channels of every 32 in two rows of every 16.
  const int out_words = (s.out_channels + 31) / 32;
#pragma unroll
  for (int i = 0; i < ROW_TILES; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row_base + 16 * i + group + 8 * half;
      const int pixel = rows.output[at];
      const int* const terms = border_terms + rows.classes[at] * kColumns;
      const int row_term = -2 * ones[i][2 * half];
      const int64_t row_index = static_cast<int64_t>(pixel < 0 ? 0 : pixel) * s.out_channels;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const int channel = block * kBlock + kLane * quarter;
        const int remaining = pixel < 0 ? 0 : s.out_channels - first_channel - channel;
        const Lane own = {remaining < 0       ? 0
                          : remaining < kLane ? remaining
                                              : kLane,
                          remaining >= kLane};
        const int64_t index = row_index + first_channel + channel;
        int dots[kLane];
        load_integers(terms + channel, dots);
#pragma unroll
        for (int j = 0; j < kLane; ++j) {
          dots[j] += 4 * sums[i][4 * block + j / 2][2 * half + j % 2] + row_term;
        }
        if (p.window_shift != 0) {
#pragma unroll
          for (int j = 0; j < kLane; ++j) {
            dots[j] = pool(dots[j], scales.pool_min[channel + j] != 0);
          }
        }
        uint32_t byte = 0;
        if (LEAVING == kDots || (LEAVING == kRagged && p.outputs.dots != nullptr)) {
          store_dots<kWhole>(p.outputs.dots, index, own, dots);
        } else if (limits) {
          byte = within(first_dots + channel, spans + channel, dots);
        } else {
          byte = finish<LEAVING>(p, scales, channel, index, own, dots);
        }
        if (LEAVING == kDots || p.outputs.bits == nullptr) continue;
        uint32_t word = (byte & ((1u << own.count) - 1u)) << (8 * quarter);
        word |= __shfl_xor_sync(0xffffffffu, word, 1);
        word |= __shfl_xor_sync(0xffffffffu, word, 2);
        const int word_at = (first_channel + block * kBlock) / 32;
        if (quarter == 0 && pixel >= 0 && word_at < out_words) {
          p.outputs.bits[static_cast<int64_t>(pixel) * out_words + word_at] = word;
        }
      }
    }
  }
}

}  // namespace biper
