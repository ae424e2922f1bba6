// The epilogue of biper_engine/ops/epilogue.py: from accumulators to floats and bits.
#pragma once

#include "vectors.h"

namespace biper {

// The part of a convolution, binary or float, that one unit of work computes.
struct Unit {
  int64_t image, first_row, last_row;  // of the output
  int64_t conv_first, conv_last;       // rows of the convolution that they need
  int64_t first_block, last_block;
};

// Returns unit `index` of a plan whose outputs are `blocks` blocks.
template <class Plan>
BIPER_INLINE Unit unit_of(const Plan& plan, int64_t index, int64_t blocks) {
  Unit unit;
  const int64_t chunk = index % plan.chunks;
  const int64_t strip = index / plan.chunks % plan.strips;
  unit.image = index / plan.chunks / plan.strips;
  unit.first_row = plan.out_h * strip / plan.strips;
  unit.last_row = plan.out_h * (strip + 1) / plan.strips;
  unit.conv_first = unit.first_row;
  unit.conv_last = unit.last_row;
  if (plan.pooled) {
    const Window& pool = plan.pool;
    unit.conv_first = max64(unit.first_row * pool.stride_h - pool.pad_h, 0);
    unit.conv_last =
        min64((unit.last_row - 1) * pool.stride_h - pool.pad_h + pool.kernel_h, plan.conv_h);
  }
  unit.first_block = chunk * plan.chunk_blocks;
  unit.last_block = min64(unit.first_block + plan.chunk_blocks, blocks);
  return unit;
}

// Pixels that finish() takes at once.
constexpr int64_t kMostPixels = 8;

// Accumulators [pixels][stride] of consecutive output pixels and the first `channels` channels from
// `channel` on, 64 at most.
struct Tile {
  const int32_t* dots;
  int64_t stride;
  int64_t first_pixel, pixels;
  int64_t channel, channels;
  const int32_t* const* borders = nullptr;  // of each pixel, the integers of convolution.h
  const int32_t* window = nullptr;          // of each pixel, the sum of the +-1 that it sees
  const int32_t* valid = nullptr;           // and their number
};

// The gate's numbers for consecutive output pixels; null where there is no gate.
struct TileGates {
  const float* of_pixel[kMostPixels];
};

BIPER_INLINE TileGates gates_of(const ConvPlan& plan, int64_t first_pixel, int64_t pixels) {
  TileGates gates{};
  if (!plan.gate) return gates;
  int64_t image = first_pixel / plan.gate_pixels, pixel = first_pixel % plan.gate_pixels;
  for (int64_t p = 0; p < pixels; ++p) {
    gates.of_pixel[p] = plan.gate + image * plan.gate_channels;
    if (++pixel == plan.gate_pixels) pixel = 0, ++image;
  }
  return gates;
}

// Whether an epilogue has factors of sums other than the accumulator's.
BIPER_INLINE bool has_sums(const Epilogue& e) { return e.window || e.taps || e.valid; }

// Adds the products with these sums, of pixel `p`, to v: one vector of a tile.
template <class I, bool kFull>
BIPER_INLINE typename I::Float add_sums(const Epilogue& e, const Tile& tile, int64_t p,
                                        int64_t offset, int64_t count, typename I::Float v) {
  const int64_t channel = tile.channel + offset;
  if (e.window) {
    v = I::fma(load_channels<I, kFull>(e.window, channel, count),
               I::broadcast(static_cast<float>(tile.window[p])), v);
  }
  if (e.taps) {  // sum of weights over the valid taps = 2 * popc(w) - border
    int32_t sums[I::kFloats];
    for (int64_t l = 0; l < I::kFloats; ++l) {
      sums[l] = l < count ? 2 * e.set_bits[channel + l] - tile.borders[p][offset + l] : 0;
    }
    v = I::fma(load_channels<I, kFull>(e.taps, channel, count), I::to_float(sums), v);
  }
  if (e.valid) {
    v = I::fma(load_channels<I, kFull>(e.valid, channel, count),
               I::broadcast(static_cast<float>(tile.valid[p])), v);
  }
  return v;
}

// What is added to a product with a gate: where there is no offset, a zero that changes no product.
template <class I, bool kFull>
BIPER_INLINE typename I::Float behind_gate(const Epilogue& e, int64_t channel, int64_t count) {
  return e.offset ? load_channels<I, kFull>(e.offset, channel, count) : I::broadcast(-0.0f);
}

// The gate's factors of `count` channels, for the pixel that `gate` is for.
template <class I, bool kFull>
BIPER_INLINE typename I::Float factors_of(const ConvPlan& plan, const float* gate, int64_t channel,
                                          int64_t count) {
  if (plan.gate_channels == 1) return I::broadcast(*gate);
  return load_channels<I, kFull>(gate, channel, count);
}

// Where the residual has what is added to `channel` of an output pixel.
BIPER_INLINE int64_t residual_at(const ConvPlan& plan, int64_t pixel, int64_t channel) {
  // A division takes as long as the products of a pixel.
  const bool first = channel < plan.residual_channels;
  return pixel * plan.residual_channels + (first ? channel : channel % plan.residual_channels);
}

// Takes one vector of a tile, `count` <= kFloats channels from the tile's `offset` on, to the
// output; leaves its bits in `masks`, one for each pixel. Any epilogue.
template <class I, bool kFull>
BIPER_INLINE void finish_vector(const ConvPlan& plan, const Tile& tile, const TileGates& gates,
                                int64_t offset, int64_t count, uint64_t* masks) {
  using Float = typename I::Float;
  const Epilogue& e = plan.epilogue;
  const int64_t outputs = plan.geometry.out_channels;
  const int64_t channel = tile.channel + offset;
  const Float zero = I::broadcast(0.0f);
  const Float multiplier = load_channels<I, kFull>(e.multiplier, channel, count);
  const Float bias = load_channels<I, kFull>(e.bias, channel, count);
  const Float low = I::broadcast(e.clamp_min), high = I::broadcast(e.clamp_max);
  const Float offset_behind = behind_gate<I, kFull>(e, channel, count);
  const Float slope = e.slope ? load_channels<I, kFull>(e.slope, channel, count) : zero;
  const Float gain = e.gain ? load_channels<I, kFull>(e.gain, channel, count) : zero;
  const Float shift = e.shift ? load_channels<I, kFull>(e.shift, channel, count) : zero;
  const Float threshold = e.threshold ? load_channels<I, kFull>(e.threshold, channel, count) : zero;
  const uint32_t inverted = e.sense ? get_bits(e.sense, channel, count) : 0;
  for (int64_t p = 0; p < tile.pixels; ++p) {
    const int64_t index = (tile.first_pixel + p) * outputs + channel;
    Float v = I::fma(multiplier, I::to_float(tile.dots + p * tile.stride + offset), bias);
    if (has_sums(e)) v = add_sums<I, kFull>(e, tile, p, offset, count, v);
    if (plan.gate) {
      v = I::fma(v, factors_of<I, kFull>(plan, gates.of_pixel[p], channel, count), offset_behind);
    }
    if (plan.residual) {
      const int64_t added = residual_at(plan, tile.first_pixel + p, channel);
      v = I::add(v, load_stream<I, kFull>(plan.residual, plan.residual_type, added, count));
    }
    v = I::at_most_or(I::at_least_or(v, low), high);
    if (e.slope || e.gain) {
      v = I::where_negative(v, e.slope ? I::multiply(v, slope) : v,
                            e.gain ? I::multiply(v, gain) : v);
    }
    if (e.shift) v = I::add(v, shift);
    if (plan.out_float) store_stream<I, kFull>(plan.out_float, plan.out_type, index, count, v);
    masks[p] |= uint64_t{compare<I>(v, threshold, inverted) & low_bits(count)} << offset;
  }
}

// Most layers have a plain epilogue: float32 maps, a clamp or a slope and a shift, bits for v >=
// threshold. Where every channel of a tile counts, its constants for one vector are these. Without
// a slope it is 1, without a shift it is -0.0, which change no value.
template <class I>
struct PlainChannels {
  typename I::Float multiplier, bias, offset, low, high, slope, shift, threshold;
};

template <class I>
BIPER_INLINE PlainChannels<I> plain_channels(const Epilogue& e, int64_t channel) {
  const typename I::Float low = I::broadcast(e.clamp_min);
  return {I::load(e.multiplier + channel),
          I::load(e.bias + channel),
          behind_gate<I, true>(e, channel, I::kFloats),
          low,
          I::broadcast(e.clamp_max),
          e.slope ? I::load(e.slope + channel) : I::broadcast(1.0f),
          e.shift ? I::load(e.shift + channel) : I::broadcast(-0.0f),
          e.threshold ? I::load(e.threshold + channel) : low};
}

// Takes kFloats accumulators from `channel` on, as floats, to `out`; returns their bits. `gate` is
// null or for the pixel. kClamped: without slope and shift. The others have no clamp, or an endless
// one, which changes nothing.
template <class I, bool kClamped>
BIPER_INLINE uint32_t finish_plain(const ConvPlan& plan, const PlainChannels<I>& c,
                                   typename I::Float dot, const float* gate, int64_t channel,
                                   const float* residual, float* out) {
  typename I::Float v = I::fma(c.multiplier, dot, c.bias);
  if (gate) v = I::fma(v, factors_of<I, true>(plan, gate, channel, I::kFloats), c.offset);
  if (residual) v = I::add(v, I::load(residual));
  if constexpr (!kClamped) {
    v = I::add(I::where_negative(v, I::multiply(v, c.slope), v), c.shift);
  }
  v = I::at_most_or(I::at_least_or(v, c.low), c.high);
  if (out) I::store(out, v);
  return I::at_least(v, c.threshold);
}

BIPER_INLINE bool is_sloped(const Epilogue& e) { return e.slope || e.shift; }

// Whether there is neither slope nor shift nor gate.
BIPER_INLINE bool is_clamped(const ConvPlan& plan) {
  return !is_sloped(plan.epilogue) && !plan.gate;
}

BIPER_INLINE bool is_plain(const ConvPlan& plan) {
  const Epilogue& e = plan.epilogue;
  const bool clamped = e.clamp_min != -__builtin_inff() || e.clamp_max != __builtin_inff();
  return !plan.out_dots && !has_sums(e) && !e.gain && !e.sense && !(is_sloped(e) && clamped) &&
         (!plan.residual || plan.residual_type == FloatType::kFloat32) &&
         (!plan.out_float || plan.out_type == FloatType::kFloat32);
}

// Writes `count` <= 64 bits of a pixel from `channel` on.
BIPER_INLINE void put_mask(uint32_t* words, int64_t channel, uint64_t mask, int64_t count) {
  put_bits(words, channel, static_cast<uint32_t>(mask), min64(count, kWordBits));
  if (count > kWordBits) {
    put_bits(words, channel + kWordBits, static_cast<uint32_t>(mask >> kWordBits),
             count - kWordBits);
  }
}

BIPER_INLINE void put_masks(const ConvPlan& plan, const Tile& tile, const uint64_t* masks) {
  uint32_t* words = plan.out_bits + tile.first_pixel * plan.out_words;
  for (int64_t p = 0; p < tile.pixels; ++p, words += plan.out_words) {
    put_mask(words, tile.channel, masks[p], tile.channels);
  }
}

template <class I, bool kClamped>
static void finish_plain_tile(const ConvPlan& plan, const Tile& tile) {
  const float* const added = static_cast<const float*>(plan.residual);
  float* const out = static_cast<float*>(plan.out_float);
  const int64_t outputs = plan.geometry.out_channels;
  const TileGates gates = gates_of(plan, tile.first_pixel, tile.pixels);
  uint64_t masks[kMostPixels] = {};
  for (int64_t at = 0; at < tile.channels; at += I::kFloats) {
    const int64_t channel = tile.channel + at;
    const PlainChannels<I> constants = plain_channels<I>(plan.epilogue, channel);
    const int64_t index = tile.first_pixel * outputs + channel;
    const int64_t residual = residual_at(plan, tile.first_pixel, channel);
    for (int64_t p = 0; p < tile.pixels; ++p) {
      const typename I::Float dot = I::to_float(tile.dots + p * tile.stride + at);
      const uint64_t bits =
          finish_plain<I, kClamped>(plan, constants, dot, gates.of_pixel[p], channel,
                                    added ? added + residual + p * plan.residual_channels : nullptr,
                                    out ? out + index + p * outputs : nullptr);
      masks[p] |= bits << at;
    }
  }
  if (plan.out_bits) put_masks(plan, tile, masks);
}

template <class I>
static void finish_any_tile(const ConvPlan& plan, const Tile& tile) {
  uint64_t masks[kMostPixels] = {};
  const TileGates gates = gates_of(plan, tile.first_pixel, tile.pixels);
  int64_t at = 0;
  for (; at + I::kFloats <= tile.channels; at += I::kFloats) {
    finish_vector<I, true>(plan, tile, gates, at, I::kFloats, masks);
  }
  if (at < tile.channels) finish_vector<I, false>(plan, tile, gates, at, tile.channels - at, masks);
  if (plan.out_bits) put_masks(plan, tile, masks);
}

// Copies raw accumulators out.
static inline void copy_dots(const ConvPlan& plan, const Tile& tile) {
  const int64_t outputs = plan.geometry.out_channels;
  for (int64_t p = 0; p < tile.pixels; ++p) {
    __builtin_memcpy(plan.out_dots + (tile.first_pixel + p) * outputs + tile.channel,
                     tile.dots + p * tile.stride,
                     static_cast<size_t>(tile.channels) * sizeof(int32_t));
  }
}

// Takes a tile from its accumulators to the outputs.
template <class I>
BIPER_INLINE void finish(const ConvPlan& plan, const Tile& tile) {
  static_assert(I::kLanes * I::kVectors <= 64, "the bits of a block fit a mask");
  if (plan.out_dots) return copy_dots(plan, tile);
  if (is_plain(plan) && tile.channels % I::kFloats == 0) {
    return is_clamped(plan) ? finish_plain_tile<I, true>(plan, tile)
                            : finish_plain_tile<I, false>(plan, tile);
  }
  finish_any_tile<I>(plan, tile);
}

}  // namespace biper
