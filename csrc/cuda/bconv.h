// Binary convolutions on CUDA: the parameters of a call, and its two paths.
//
// No CUDA headers are included. Memory is on the device; sizes are in elements.

#pragma once

#include <cstdint>

#include "types.h"

namespace biper {

// One axis-aligned 2-D operation: a convolution or a pool.
struct Window {
  int kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
};

struct ConvShape {
  int batch, height, width;
  int in_channels, out_channels, groups;
  Window conv;
  int conv_h, conv_w;  // size of the accumulators, before the pool
  Window pool;         // 1x1 without a pool
  int out_h, out_w;
};

// Parameters of the steps in biper_engine/ops/epilogue.py. Vectors have a value for each output
// channel; nullptr skips the step.
struct ConvEpilogue {
  const float* multiplier;
  const float* bias;
  const float* slope;
  const float* shift;
  const float* threshold;
  const bool* sense;           // nullptr: false everywhere
  const bool* pool_min;        // nullptr: the pool takes the maximum everywhere
  float clamp_min, clamp_max;  // infinite if there is no limit
  // If only bits are stored and they depend only on the accumulator: the bit is set for those in
  // [first, first + span], and the float steps are skipped. nullptr otherwise.
  const int32_t* first;
  const uint32_t* span;
};

struct ConvOutputs {
  const void* residual;  // [N, OH, OW, O] of residual_type, or nullptr
  int residual_type;
  void* floats;  // [N, OH, OW, O] of float_type, or nullptr
  int float_type;
  uint32_t* bits;  // [N, OH, OW, ceil(O / 32)], or nullptr
  int32_t* dots;   // [N, OH, OW, O]; if given, nothing else is stored
};

// Weights in the layouts of biper_engine/ops/cuda.py; nullptr if a layout was not made.
struct ConvWeights {
  const uint32_t* fragments;  // for bconv_mma.cuh
  const int32_t* sums;        // [KH + 1, KW + 1, O rounded up to 32], for bconv_mma.cuh
  const uint32_t* words;      // [KH * KW, words of a group, O], for bconv_popcount.cuh
};

enum ConvPath : int { kAnyPath = 0, kBinaryTensorCores = 1, kByteTensorCores = 2, kPopcount = 3 };

struct ConvArgs {
  ConvShape shape;
  ConvEpilogue epilogue;
  ConvOutputs outputs;
  ConvWeights weights;
  const uint32_t* bits;
  int path;        // a ConvPath; kAnyPath chooses it by the device's capability
  int processors;  // number for which tiles are chosen; 0: the device's own
};

// Words of channels in one pass over the taps; the order of the fragments depends on it.
int fragment_words(int in_channels, int taps);

// Run a convolution on the current device. Returns nullptr, or what went wrong.
const char* bconv2d(const ConvArgs& args, void* stream);

// How a call would run.
struct ConvWay {
  int path;           // a ConvPath, or -1 if the requested one cannot run the call
  int rows, columns;  // size of a block's tile, on tensor cores
  int width;          // output columns of a tile's rows
  int chunks;         // number of chunks of the channels
  bool ragged;        // whether channels are not in aligned groups of eight
  int shared_bytes;   // shared memory of a block
};

const char* bconv2d_way(const ConvArgs& args, ConvWay* way);

}  // namespace biper
