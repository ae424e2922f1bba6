// A block's part of a binary convolution on tensor cores: the position of its tile, its copies to
// shared memory, and its tables there. bconv_mma.cuh says what they are for.

#pragma once

#include "divisor.cuh"
#include "epilogue.cuh"

namespace biper {

constexpr int kBlock = 32;           // channels of one block of fragments
constexpr int kFragmentWords = 256;  // words of 32 channels in a step: 2 pairs of groups x 32 x 4

constexpr int kMaxClasses = 96;  // rectangles of valid taps that an image may have

// A quotient and a remainder.
struct Quotient {
  int value, rest;
};

__device__ __forceinline__ Quotient divide(int number, const Divisor& by) {
  const int quotient = static_cast<int>(by.quotient(static_cast<uint32_t>(number)));
  return {quotient, number - quotient * static_cast<int>(by.divisor)};
}

// Parameters of the kernel: the call, and how the launcher divided it.
struct BconvMmaParams {
  ConvShape shape;
  ConvEpilogue epilogue;
  ConvOutputs outputs;
  const uint32_t* bits;
  const uint32_t* fragments;
  const int32_t* sums;
  int in_words;                        // words of a pixel
  uint32_t last_mask;                  // channels of its last word
  int chunk_words;                     // words of a pixel in one patch, even
  int chunks;                          // chunks of a pixel
  int steps;                           // steps of 256 bits in a chunk
  int stage_steps;                     // steps whose weights are in shared memory at once
  int stage_buffers;                   // 1, or 2 if there are several stages
  int pixel_words;                     // words of a pixel in shared memory, without bank conflicts
  int copy_words;                      // words of one asynchronous copy: 1, 2 or 4
  int patch_width;                     // input columns
  int patch_words;                     // words of one patch
  int patches;                         // 1, or 2 if there are several chunks
  int units;                           // pool windows (output pixels) of a column of tiles
  Divisor tile_width;                  // output columns (pool windows) of a block's rows
  Divisor out_h;                       // shape.out_h
  Divisor window_w;                    // shape.pool.kernel_w
  Divisor dilation_h;                  // shape.conv.dilation_h
  Divisor dilation_w;                  // shape.conv.dilation_w
  Divisor copies;                      // copies of a pixel in a chunk
  Divisor image_rows;                  // patch rows of an image whose top is in the tile
  int window_shift;                    // log2 of the pixels in a pool window: 0 or 2
  int rows_cut;                        // most taps cut off at the lower border
  int columns_start;                   // most taps before the left border
  int columns_cut;                     // most taps cut off at the right border
  int classes;                         // number of rectangles of valid taps
  uint8_t rectangles[kMaxClasses][4];  // top, bottom, left, right; empty if there is none
};

// Data of a tile's rows that threads need repeatedly, [ROWS] each, in shared memory.
struct TileRows {
  int* patch;    // word of the pixel's first tap in a patch
  int* classes;  // its rectangle of valid taps
  int* output;   // output pixel, or -1 for none
};

// The outputs of the kernel. With kRagged, they are known at run time, and lanes may be partial.
enum Leaving : int { kFloat32Stream, kFloat16Stream, kBfloat16Stream, kLimits, kRagged };

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

// The position of a unit.
struct Unit {
  int image, row, column;  // in the output; the column is relative to the tile's first
};

__device__ __forceinline__ Unit locate(const BconvMmaParams& p, int unit) {
  const Quotient row = divide(unit, p.tile_width);
  const Quotient image = divide(row.value, p.out_h);
  return {image.value, image.rest, row.rest};
}

// The start and the end of a tile, and the pixels of its images in the patch.
struct Tile {
  int first_unit;
  Unit first, last;
  int first_column;   // input column of the patch's first column
  int rows_of_first;  // patch rows of the first image if the tile reached its bottom
};

// The number of input rows for `unit_rows` rows of units.
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

// Start copying the patch of a chunk, with zeros outside of the image and of the channels.
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
  constexpr int kCopies = kFragmentWords / 4;  // copies of 16 bytes in a step of 32 channels
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

// The words of the patch that a lane uses in a step: the pair's offset from the pixel's first tap,
// and its first word in the chunk. Pairs after the last tap have no word.
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

// A mask of the channels in a word of a pixel; the other bits may have any value.
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

// Copy the parameters of the block's channels, with neutral ones beyond the last channel.
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

}  // namespace biper
