// What callers and ISA files share: plain structs and one table of kernels per instruction set.
//
// Layouts follow biper_engine/bits.py: channel c of a pixel is bit c % 32 of its word c / 32, maps
// are NHWC. Strides and sizes are in elements unless a name ends in _bytes. Nothing here includes
// the STL: an ISA file that instantiated a template of it could hand AVX-512 code to the linker as
// everybody's copy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace biper {

constexpr int64_t kWordBits = 32;

enum class FloatType : int32_t { kNone = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3 };

inline int64_t float_bytes(FloatType type) {
  return type == FloatType::kNone ? 0 : type == FloatType::kFloat32 ? 4 : 2;
}

struct Window {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};

// A binary convolution as Conv2dGeometry has it, apart from the image size.
struct ConvGeometry {
  int64_t in_channels, out_channels, groups;
  int64_t kernel_h, kernel_w, stride_h, stride_w;
  int64_t pad_top, pad_bottom, pad_left, pad_right;
  int64_t dilation_h, dilation_w;
};

// Parameters of biper_engine/ops/epilogue.py; every pointer but multiplier and bias may be null.
struct Epilogue {
  const float* multiplier;
  const float* bias;
  const float* window;
  const float* taps;
  const float* valid;
  const float* offset;
  const float* slope;
  const float* gain;
  const float* shift;
  const float* threshold;
  const uint32_t* sense;     // a bit per channel: the bit is v <= threshold; null: v >= threshold
  const int32_t* set_bits;   // [O] of the weights, where there are `taps`
  const int32_t* pool_sign;  // [O] -1 where the pool takes the minimum, else 1; null: all 1
  float clamp_min;           // -inf where there is none
  float clamp_max;           // +inf where there is none
};

// The parameters of the epilogue that are a float per channel, by their names in Python.
struct EpilogueVector {
  const char* name;
  const float* Epilogue::* values;
};
constexpr EpilogueVector kEpilogueVectors[] = {
    {"multiplier", &Epilogue::multiplier}, {"bias", &Epilogue::bias},
    {"window", &Epilogue::window},         {"taps", &Epilogue::taps},
    {"valid", &Epilogue::valid},           {"offset", &Epilogue::offset},
    {"slope", &Epilogue::slope},           {"gain", &Epilogue::gain},
    {"shift", &Epilogue::shift},           {"threshold", &Epilogue::threshold}};

// A run of output rows or columns whose windows see the same kernel positions [first, last).
struct Border {
  int32_t first, last;
};

// What one instruction set makes of the output channels of a group. A vector holds `lanes` of
// them, a block `vectors` vectors; the last block of a group may be shorter.
struct Blocking {
  int64_t lanes;        // output channels in a vector
  int64_t vectors;      // vectors in a full block; lanes * vectors is a multiple of 32
  int64_t parts;        // steps that one input word takes
  int64_t part_words;   // 32-bit words of a vector's weights in a step
  int64_t tile_pixels;  // output pixels in the largest tile
  bool pairs;           // whether tiles are of pairs of pixels; see pairs.h
};

struct ConvKernels;

// One convolution at one image size; filled by conv.cpp, read by every kernel.
struct ConvPlan {
  const ConvKernels* kernels;
  ConvGeometry geometry;
  Window pool;
  bool pooled;
  Epilogue epilogue;

  int64_t batch, height, width;  // of the input
  int64_t conv_h, conv_w;        // of the accumulators
  int64_t out_h, out_w;          // of what leaves: after the pool
  int64_t group_channels;        // input channels of a group
  int64_t group_words;           // words of a group in a strip: ceil(group_channels / 32)
  int64_t group_outputs;         // output channels of a group
  int64_t group_vectors;         // ceil(group_outputs / lanes)
  int64_t in_words, out_words;   // words of a pixel in the packed maps
  int64_t fold;                  // taps that share a word: several where channels are few, else 1
  int64_t depth;   // words of one output's receptive field: ceil(KH * KW / fold) * group_words
  bool direct;     // the input can be read in place, without a strip
  bool paired;     // pixels are counted two at a time
  bool pointwise;  // pairs are of all pixels in order: no window has a second pixel
  int64_t pair_w;  // pixels of a row of pairs, if they are not pointwise

  // A unit of work: strip_rows output rows x chunk_blocks blocks of one image.
  int64_t strip_rows, strips;
  int64_t chunk_blocks, chunks;  // blocks are counted over all groups
  int64_t group_blocks;          // blocks in a group
  int64_t units;

  // Scratch of a thread: offsets in bytes from a 64-byte aligned base.
  struct Scratch {
    int64_t strip;          // uint32 [input rows of a unit][strip_w][group_words]
    int64_t folded;         // uint32 [depth][input rows of a unit][strip_w], if taps share words
    int64_t offsets;        // int32 [depth]
    int64_t pairs;          // uint16 [input rows of a unit][pair_w][group_words][8], or pointwise
    int64_t pair_offsets;   // int32 [depth]
    int64_t row_class;      // int32 [accumulator rows of a unit]
    int64_t column_class;   // int32 [conv_w]
    int64_t rows, columns;  // Border [2 * kernel + 1] each
    int64_t borders;        // int32 [row classes][column classes][lanes of a block]
    int64_t dots;           // int32 [rows of a pool window][conv_w][lanes of a block], or one tile
    int64_t pooled;         // int32 [out_w][lanes of a block]
    int64_t bytes;
  } scratch;
  int64_t strip_w;  // pixels in a strip's row: the padded width, as far as windows reach

  const uint32_t* bits;       // [N, H, W, in_words]
  const int32_t* tap_counts;  // [taps][tap_lanes] set bits of the weights
  int64_t tap_lanes;          // groups * group_vectors * lanes
  const uint32_t* weights;    // the ISA's own layout
  const void* residual;       // [N, out_h, out_w, O] or null
  FloatType residual_type;
  // Channels of the residual: O, or fewer, which are added to several runs of as many. Then they
  // are whole words, and there is one group.
  int64_t residual_channels;
  const float* gate;      // [images of the gate, gate_channels] or null
  int64_t gate_channels;  // O, or 1: a number for all channels
  int64_t gate_pixels;    // output pixels that an image of the gate is for
  void* out_float;        // [N, out_h, out_w, O] or null
  FloatType out_type;
  uint32_t* out_bits;  // [N, out_h, out_w, out_words] or null
  int32_t* out_dots;   // [N, conv_h, conv_w, O] or null: raw accumulators, no epilogue
};

struct BinarizeCall {
  const void* x;  // [pixels, channels]
  FloatType type;
  int64_t channels;
  const float* threshold;  // [channels] or null: 0
  const uint32_t* sense;   // [words], a bit per channel, or null: all 0
  uint32_t* bits;          // [pixels, words]
};

struct SignsCall {
  const float* x;  // [pixels, channels]
  int64_t channels;
  uint32_t* bits;  // [pixels, words]
};

struct UnbinarizeCall {
  const uint32_t* bits;  // [pixels, words]
  int64_t channels;
  void* x;  // [pixels, channels]
  FloatType type;
};

struct PoolCall {
  const uint32_t* bits;  // [N, H, W, words]
  int64_t height, width, channels, words;
  Window window;
  int64_t out_h, out_w;
  const uint32_t* take_and;  // [words], a bit per channel, or null: all 0
  uint32_t* out;             // [N, out_h, out_w, words]
};

// A float convolution at one image size, BatchNorm folded, with what may follow it in a network:
// max pool, clamp, the float map, its bits. Filled by float_conv.cpp.
//
// Every output is a chain of fused multiply-adds from its bias on, over (ky, kx, c) in that order,
// padding as zeros; every 256 a new chain begins at 0, whose sum is added. That order is what makes
// the same bytes on every instruction set, for every number of threads and in every batch. (The
// tiles of winograd.h have an order of their own, to the same end.)
struct FloatConvPlan {
  int64_t in_channels, out_channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  Window pool;
  bool pooled;
  float clamp_min, clamp_max;  // infinite where there is none
  const float* threshold;      // [O] or null: 0
  const uint32_t* sense;       // a bit per channel, or null: all 0

  int64_t batch, height, width;
  int64_t conv_h, conv_w, out_h, out_w;
  bool planar;               // x is [N, C, H, W], else [N, H, W, C]
  bool winograd;             // tiles by winograd.h, through the ring; depth counts products then
  int64_t tiles, tile_step;  // along a row there, and as many as whole vectors have
  bool direct;               // windows lie in the input itself
  int64_t depth;             // KH * KW * C, or what takes its place
  int64_t strip_w;           // pixels of a strip's row
  int64_t out_words;

  int64_t strip_rows, strips, chunk_blocks, chunks, blocks, units;
  struct Scratch {
    int64_t strip;   // float [input rows of a unit][C][strip_w], or [rows][strip_w][C], or the
                     // ring of WinogradRows
    int64_t planes;  // of WinogradRows, and so is:
    int64_t row;
    int64_t offsets;  // int32 [depth] from a window's first value to each of its values
    int64_t ring;     // float [rows of a pool window][conv_w][lanes of a block], or the same for
                      // each vector of all blocks, in whole tiles
    int64_t maxima;   // float [conv_w][lanes of a vector]
    int64_t bytes;
  } scratch;

  const float* weights;  // [block][depth][lanes of the block], padded with zeros
  const float* bias;     // [blocks * lanes], padded with zeros
  const float* x;
  float* out_float;    // [N, out_h, out_w, O] or null
  uint32_t* out_bits;  // [N, out_h, out_w, out_words] or null
};

// In products of rows with signs: inputs of a table, tables of a word of signs, and words of a
// chain of additions. A chain takes CHAIN_INPUTS of biper_engine/ops/matrix.py.
constexpr int64_t kTableInputs = 5;
constexpr int64_t kWordTables = 6;
constexpr int64_t kChainWords = 8;
constexpr int64_t kSignWordInputs = kTableInputs * kWordTables;

// Products of two packed maps, filled by matmul.cpp: for each of `matrices` rows of pixels and each
// group of channels, out[w][v] = sum over the group of a[w] * b[v]. An element is 1 where its bit
// is 1, `low` where it is 0. The steps after the sum are those of biper_engine/ops/matrix.py.
struct MatmulPlan {
  int64_t matrices, a_pixels, b_pixels;
  int64_t channels, groups, low_a, low_b;
  float multiplier, row_multiplier, column_multiplier, bias;

  int64_t pixel_words;           // of a pixel, all groups
  int64_t depth, words;          // elements of a group, and its words when they are aligned
  int64_t vectors;               // of pixels of b
  int64_t strip, strips, units;  // pixels of a in a unit; strips of a matrix
  struct Scratch {
    int64_t a, b;     // uint32 [pixels][words] of a group, aligned, unused bits cleared
    int64_t weights;  // b in the ISA's own layout
    int64_t borders;  // int32 [vectors][lanes]
    int64_t columns;  // float [vectors][lanes]
    int64_t rows;     // int32 [pixels of a] set bits
    int64_t offsets;  // int32 [words]
    int64_t dots;     // int32 [tile pixels][lanes of a block]
    int64_t bytes;
  } scratch;

  const uint32_t *a, *b;  // [matrices, pixels, pixel_words]
  void* out;              // [matrices, groups, a_pixels, b_pixels], or null
  FloatType out_type;
  int32_t* out_sums;  // the same shape, or null
};

// Rows of floats times a matrix of signs, filled by matmul.cpp; the order of sums is that of
// biper_engine/ops/matrix.py.
struct SignLinearPlan {
  int64_t rows, inputs, outputs;
  int64_t words, chains;       // of the inputs: 30 signs each, and 8 words each
  int64_t blocks, lanes;       // of outputs, and outputs of a block
  int64_t group_rows, groups;  // rows that are multiplied together
  int64_t chunk_blocks, chunks, units;
  struct Scratch {
    int64_t tables;  // float [rows of a group][a chain's tables]
    int64_t totals;  // float [rows of a group][outputs of a chunk]
    int64_t bytes;
  } scratch;

  const uint32_t* weights;  // [chain][block][word of the chain][lanes], unused bits 0
  const float* multiplier;  // [blocks * lanes], padded with zeros, and so are:
  const float* bias;
  const float* offset;  // or null: 0
  const float* x;       // [rows, inputs]
  float* out;           // [rows, outputs]
};

// An average or a maximum over windows, NHWC; averages may land between channels of zeros.
struct FloatPoolCall {
  const float* x;
  int64_t height, width, channels;
  Window window;
  int64_t out_h, out_w;
  int64_t out_channels, first_channel;
  bool count_padding;
  int64_t divisor;  // 0: the number of values in a window
  bool adaptive;    // windows share the map evenly, each at least in part; `window` is not used
  float* out;
};

// out[i] = clamp(a[i] + b[i]), b null for 0.
struct SumCall {
  const float *a, *b;
  float clamp_min, clamp_max;
  float* out;
};

// A function of up to three numbers, each step of it a float operation that is rounded once, or
// computed in double and rounded once.
enum class Function : int32_t {
  // of a
  kAbs,
  kCeil,
  kErf,
  kExp,
  kFloor,
  kGelu,
  kGeluTanh,
  kHardSigmoid,
  kHardSwish,
  kLog,
  kLog1p,
  kLogSigmoid,
  kMish,
  kNegative,
  kReciprocal,
  kRound,
  kRsqrt,
  kSigmoid,
  kSign,
  kSilu,
  kSqrt,
  kSquare,
  kTanh,
  kTrunc,
  // of a and b
  kAdd,
  kDivide,
  kElu,
  kEqual,
  kGreater,
  kGreaterEqual,
  kMaximum,
  kMinimum,
  kMultiply,
  kNotEqual,
  kPrelu,
  kSoftplus,
  kSubtract,
  // of a, b and c
  kAddProduct,
  kClamp,
  kWhere,
};

constexpr int kMostDims = 10;  // of an elementwise call, the batch included
constexpr int kMostOperands = 3;

// out[i] = function(a[i], b[i], c[i]) over all places of some dimensions, outermost first. The
// places of `out` lie in this order without gaps, those of an operand at its strides; out may be an
// operand at the same places.
struct ElementwiseCall {
  Function function;
  int32_t operands, dims;
  int64_t sizes[kMostDims];
  int64_t strides[kMostOperands][kMostDims];
  const float* x[kMostOperands];
  float* out;
};

enum class RowFunction : int32_t {
  // rows to rows
  kLogSoftmax,
  kNormalize,
  kSoftmax,
  // rows to numbers
  kLogSumExp,
  kMaximum,
  kMean,
  kMinimum,
  kNorm1,
  kNorm2,
  kSum,
  kVariance,
  kDeviation,
};

// A function of each row [length] of x: another row, or a number. Sums are in double, in one order.
struct RowsCall {
  RowFunction function;
  int64_t length;
  const float *weight, *bias;  // [length] or null, of kNormalize alone
  bool centred;                // whether kNormalize subtracts the mean
  double epsilon;              // added to a variance
  double divisor;              // of a variance
  const float* x;
  float* out;  // [rows, length] or [rows]; may be x where it has rows
};

// out[m] = a[m] @ b[m] for matrices a [rows, depth], b [depth, columns], each without gaps. Every
// output is a chain of fused multiply-adds from 0 on, over the depth; every 256 a new one begins.
struct MatmulCall {
  int64_t rows, columns, depth;
  const float *a, *b;
  float* out;
};

// A convolution whose channels are groups of their own, NHWC. Every output is a chain of fused
// multiply-adds from its bias on, over (ky, kx) in that order, without those at the padding.
struct DepthwiseCall {
  int64_t height, width, channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int64_t out_h, out_w;
  const float* weights;  // [KH, KW, C]
  const float* bias;     // [C]
  const float* x;
  float* out;
};

// How the gradient of sign(x) is cut to a window around 0; the order of nn's surrogates.
enum class Surrogate : int32_t { kBireal, kClip, kIdentity };

// The gradient of sign(x * scale), with scale = 1 / sqrt(variance + epsilon) over `length` values
// of a sample, also through the variance; see sign_gradient.h.
struct SignGradientCall {
  Surrogate surrogate;
  int64_t length;
  double epsilon;
  const float *x, *gradient;  // [samples, length], the latter of the sign
  float* out;                 // [samples, length]
};

// A binary convolution, and the layout of its weights.
struct ConvKernels {
  Blocking blocking;

  // Re-lays one input word of a vector's weights: canonical[l * stride] is that of lane l < rows,
  // the other lanes become 0. Part i goes to packed + i * part_stride.
  void (*pack_word)(const uint32_t* canonical, int64_t stride, int64_t rows, uint32_t* packed,
                    int64_t part_stride);
  void (*conv_unit)(const ConvPlan& plan, int64_t unit, void* scratch);
};

// The kernels of one instruction set. Ranges are half open; disjoint ranges may run at once.
struct Kernels {
  const char* name;
  int32_t id;  // stored in prepacked weights, so that they meet their kernels
  ConvKernels conv;
  ConvKernels heavy;  // for weights that caches don't hold
  void (*binarize)(const BinarizeCall& call, int64_t first_pixel, int64_t last_pixel);
  bool (*pack_signs)(const SignsCall& call, int64_t first_pixel, int64_t last_pixel);
  void (*unbinarize)(const UnbinarizeCall& call, int64_t first_pixel, int64_t last_pixel);
  void (*maxpool_row)(const PoolCall& call, int64_t row);  // row of all images: n * out_h + y

  int64_t float_lanes;   // output channels of a whole block of a float convolution
  int64_t float_vector;  // of one of its vectors
  void (*float_conv_unit)(const FloatConvPlan& plan, int64_t unit, void* scratch);
  void (*average_row)(const FloatPoolCall& call, int64_t row);  // row of all images
  void (*maximum_row)(const FloatPoolCall& call, int64_t row);
  void (*sum)(const SumCall& call, int64_t first, int64_t last);
  void (*elementwise)(const ElementwiseCall& call, int64_t first, int64_t last);
  void (*rows)(const RowsCall& call, int64_t first_row, int64_t last_row);
  void (*matmul_rows)(const MatmulCall& call, int64_t first_row, int64_t last_row);
  void (*depthwise_row)(const DepthwiseCall& call, int64_t row);  // row of all images
  void (*sign_gradient)(const SignGradientCall& call, int64_t first_sample, int64_t last_sample);

  void (*matmul_unit)(const MatmulPlan& plan, int64_t unit, void* scratch);

  int64_t sign_lanes;    // outputs of a block of a product with signs
  int64_t sign_rows;     // most rows that it multiplies together
  int64_t table_floats;  // of five inputs
  void (*sign_linear_unit)(const SignLinearPlan& plan, int64_t unit, void* scratch);

  // The inner loop on registers alone, `rounds` times; each round does `macs_per_round`.
  void (*peak)(int64_t rounds);
  int64_t macs_per_round;
};

}  // namespace biper
