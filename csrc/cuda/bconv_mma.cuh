// Binary convolution on tensor cores: an implicit GEMM of rows (output pixels), columns (output
// channels) and pairs of words (taps and input channels), with the epilogue fused.
//
// With a, w in {0, 1} for -1 and +1, padding 0, V the taps of a pixel inside the image and C the
// input channels, an accumulator is (tensor cores from sm_90 on have only AND)
//
//     dot = 4 * popc(a & w) - 2 * popc(a) + |V| * C - 2 * popc(w over V)
//
// The first sum is the matrix product. The second is the same product with one more column that is
// all ones. The rest depends only on the column and on V. V is a rectangle of taps, so its term
// comes from a two-dimensional prefix sum over the taps; a block makes a table of the few
// rectangles that an image has.
//
// A block computes ROWS consecutive output pixels, across rows of the map and images, and COLUMNS
// channels. Its input patch is in shared memory once, with zeros at the padding, so the product
// needs no border checks; a table has the patch offset of every pair of words. Weights are loaded
// as fragments, in stages of a few steps, with two stages in flight. Channels are split into chunks
// that fit, each with its own patch.
//
// Order of the pairs: chunk, tap, pair within the chunk; lane t of a quad takes pair 4 * step + t
// in every step. Columns of a block of 32 are permuted so that a thread ends up with 8 neighbouring
// channels: column g of the j-th group of 8 is channel 8 * (g / 2) + 2 * j + g % 2.
//
// Per step of 256 bits, a warp of 32 x 64 reads 3 KB of shared memory (24 clocks at 128 B) for 18
// products. The 12 or more instructions of the epilogue for each output dominate the time.

#pragma once

#include "bconv_tile.cuh"

namespace biper {

// The product over 256 bits of 16 rows and 8 columns, with 1-bit instructions or, if the device has
// none, with bytes. Any order of the bits works if both operands agree. The bytes are therefore
// taken from the same registers: every eighth bit of a word makes four of them.
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

// The maximum over a pool window of 4 pixels, or its minimum, in all four lanes that hold them.
__device__ __forceinline__ int pool(int value, bool minimum) {
#pragma unroll
  for (int distance = 4; distance <= 8; distance *= 2) {
    const int other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = minimum ? min(value, other) : max(value, other);
  }
  return value;
}

// The float steps for eight channels. Returns their bits, or 0 if no bits are stored.
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

// Warps per multiprocessor for which there must be registers: no instance spills with 128 each, or
// with 255 if bytes are made of bits.
template <bool BYTES>
constexpr int kResidentWarps = BYTES ? 8 : 16;

template <int ROW_TILES, int COLUMN_TILES, int ROW_WARPS, bool BYTES, Leaving LEAVING>
__global__ void __launch_bounds__(32 * ROW_WARPS, kResidentWarps<BYTES> / ROW_WARPS)
    bconv_mma(BconvMmaParams p) {
  constexpr int kRows = 16 * ROW_TILES * ROW_WARPS;
  constexpr int kColumns = 8 * COLUMN_TILES;
  constexpr int kThreads = 32 * ROW_WARPS;
  constexpr int kBlocks = kColumns / kBlock;  // blocks of 32 channels
#ifdef __CUDA_ARCH__
  constexpr bool kHasProduct = __CUDA_ARCH__ >= 800 && (BYTES || __CUDA_ARCH__ < 1000);
  if (!kHasProduct) {  // never launched there; the rest is not compiled
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
      __syncthreads();  // the stage has arrived, and all threads are done with the previous one
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
        if (LEAVING == kRagged && p.outputs.dots != nullptr) {
          store_dots(p.outputs.dots, index, own, dots);
        } else if (limits) {
          byte = within(first_dots + channel, spans + channel, dots);
        } else {
          byte = finish<LEAVING>(p, scales, channel, index, own, dots);
        }
        if (p.outputs.bits == nullptr) continue;
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
