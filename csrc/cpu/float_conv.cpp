// How a float convolution is checked, laid out in memory and cut into units of work.
#include "float_conv.h"

#include <algorithm>

#include "cut.h"
#include "dispatch.h"
#include "winograd.h"

namespace biper {
namespace {

constexpr int64_t kMost = (int64_t{1} << 31) - 1;
// A strip of input shares the second-level cache, 256 KiB or more, with the weights of a block.
constexpr int64_t kStripBytes = 192 << 10;
constexpr int64_t kUnitsPerThread = 4;  // so that threads of unequal speed end together
// Where a pool follows, neighbouring strips both compute the rows between them: few, tall strips.
constexpr int64_t kPooledUnitsPerThread = 2;
constexpr int64_t kTiledUnitsPerThread = 1;  // and both evaluate rows that no tile of theirs needs
constexpr int64_t kFewestRows = 2;
constexpr int64_t kTileVector = 16;  // a multiple of every instruction set's floats in a vector
// More would make chains of products longer than kChain of float_kernels.h allows.
constexpr int64_t kMostChannels = 8;
// Multiply-adds, some 10 us, below which waking another thread costs more than it brings.
constexpr double kStepsPerThread = 200000;

int64_t strip_values(const FloatConvPlan& plan, int64_t out_rows) {
  int64_t rows = out_rows;
  if (plan.pooled) {
    rows = std::min(plan.conv_h, (out_rows - 1) * plan.pool.stride_h + plan.pool.kernel_h);
  }
  rows = checked_product("A strip", {rows - 1, plan.stride_h}) +
         (plan.kernel_h - 1) * plan.dilation_h + 1;
  return checked_product("A strip", {rows, plan.strip_w, plan.in_channels});
}

// Weights [O][depth] in blocks of whole vectors: [block][depth][lanes of the block].
std::vector<float> interleaved_weights(const ConvGeometry& g, const Kernels& kernels,
                                       const float* weight) {
  const int64_t lanes = kernels.float_lanes, vector = kernels.float_vector;
  const int64_t blocks = ceil_div(g.out_channels, lanes);
  const int64_t depth = g.kernel_h * g.kernel_w * g.in_channels;
  std::vector<float> made(
      static_cast<size_t>(checked_product("The weight", {blocks, lanes, depth})), 0.0f);
  for (int64_t o = 0; o < g.out_channels; ++o) {
    const int64_t block = o / lanes;
    const int64_t wide = std::min(lanes, ceil_div(g.out_channels - block * lanes, vector) * vector);
    float* to = made.data() + block * lanes * depth + o % lanes;
    for (int64_t k = 0; k < depth; ++k) to[k * wide] = weight[o * depth + k];
  }
  return made;
}

// Weights at even and odd places evaluated at the points of winograd.h, in double and rounded once:
// rows are points, columns places. First along a row, then along a column.
constexpr double kWeightsAlongRow[kProducts][7] = {
    {-2, 0, 0, 0, 0, 0, 0},
    {-2.0 / 3, 0, -2.0 / 3, 0, -2.0 / 3, 0, -2.0 / 3},
    {-2.0 / 9, 0, 2.0 / 9, 0, -2.0 / 9, 0, 2.0 / 9},
    {16.0 / 9, 0, 8.0 / 9, 0, 4.0 / 9, 0, 2.0 / 9},
    {16.0 / 15, 0, -8.0 / 15, 0, 4.0 / 15, 0, -2.0 / 15},
    {2.0 / 45, 0, 4.0 / 45, 0, 8.0 / 45, 0, 16.0 / 45},
    {0, 0, 0, 0, 0, 0, 1},
    {0, 4, 0, 0, 0, 0, 0},
    {0, 2.0 / 3, 0, 2.0 / 3, 0, 2.0 / 3, 0},
    {0, 2.0 / 3, 0, -2.0 / 3, 0, 2.0 / 3, 0},
    {0, -8.0 / 3, 0, -4.0 / 3, 0, -2.0 / 3, 0},
    {0, -8.0 / 3, 0, 4.0 / 3, 0, -2.0 / 3, 0},
    {0, 0, 0, 0, 0, 1, 0}};
constexpr double kWeightsAlongColumn[kPlanes][7] = {{1.0 / 9, 0, 1.0 / 6, 0, 1.0 / 4, 0, 3.0 / 8},
                                                    {0, 1.0 / 6, 0, 1.0 / 4, 0, 3.0 / 8, 0},
                                                    {1.0 / 9, 0, -1.0 / 6, 0, 1.0 / 4, 0, -3.0 / 8},
                                                    {0, -1.0 / 6, 0, 1.0 / 4, 0, -3.0 / 8, 0},
                                                    {-1, 0, -1.0 / 2, 0, -1.0 / 4, 0, -1.0 / 8},
                                                    {0, -1.0 / 2, 0, -1.0 / 4, 0, -1.0 / 8, 0},
                                                    {-1, 0, 1.0 / 2, 0, -1.0 / 4, 0, 1.0 / 8},
                                                    {0, 1.0 / 2, 0, -1.0 / 4, 0, 1.0 / 8, 0},
                                                    {16.0 / 9, 0, 0, 0, 0, 0, 0},
                                                    {0, 0, 0, 0, 0, 0, 1},
                                                    {0, 0, 0, 0, 0, 1, 0}};

// [vector of outputs][kPlanes][C][kProducts][outputs of the vector].
std::vector<float> evaluated_weights(const ConvGeometry& g, const Kernels& kernels,
                                     const float* weight) {
  const int64_t vector = kernels.float_vector, c = g.in_channels;
  const int64_t padded = ceil_div(g.out_channels, kernels.float_lanes) * kernels.float_lanes;
  const int64_t depth = checked_product("The weight", {kPlanes, c, kProducts});
  std::vector<float> made(static_cast<size_t>(checked_product("The weight", {padded, depth})),
                          0.0f);
  for (int64_t o = 0; o < g.out_channels; ++o) {
    const float* from = weight + o * 49 * c;
    float* to = made.data() + o / vector * depth * vector + o % vector;
    for (const auto& column : kWeightsAlongColumn) {
      for (int64_t channel = 0; channel < c; ++channel) {
        for (const auto& row : kWeightsAlongRow) {
          double sum = 0;
          for (int64_t i = 0; i < 49; ++i)
            sum += column[i / 7] * row[i % 7] * from[i * c + channel];
          *to = static_cast<float>(sum);
          to += vector;
        }
      }
    }
  }
  return made;
}

void cut(FloatConvPlan& plan, int64_t lanes, bool wants_bits, int64_t threads) {
  plan.strip_rows = plan.out_h;
  plan.chunk_blocks = plan.blocks;
  while (plan.strip_rows > 1 && !plan.direct && !plan.winograd &&
         strip_values(plan, plan.strip_rows) * 4 > kStripBytes) {
    plan.strip_rows = ceil_div(plan.strip_rows, 2);
  }
  const double steps = double(plan.batch) * double(plan.conv_h) * double(plan.conv_w) *
                       double(plan.depth) * double(plan.out_channels);
  int64_t strips = ceil_div(plan.out_h, plan.strip_rows);
  const double useful = std::max(1.0, std::min(double(threads), steps / kStepsPerThread));
  if (useful > 1.0) {
    const int64_t per_thread = plan.winograd ? kTiledUnitsPerThread
                               : plan.pooled ? kPooledUnitsPerThread
                                             : kUnitsPerThread;
    const int64_t threads_used = static_cast<int64_t>(useful);
    const int64_t batch = std::max<int64_t>(plan.batch, 1);
    const int64_t pieces = ceil_div(threads_used * per_thread, batch);
    // Threads share no word of bits.
    const int64_t together = wants_bits ? std::max<int64_t>(1, kWordBits / lanes) : 1;
    const int64_t groups = ceil_div(plan.blocks, together);
    const Cut wanted{plan.out_h, kFewestRows, groups};
    strips = std::max(strips, wanted.strips(pieces, ceil_div(threads_used, batch)));
    const int64_t chunks = ceil_div(pieces, strips);
    plan.chunk_blocks = ceil_div(groups, std::min(chunks, groups)) * together;
  }
  plan.strips = strips;
  plan.strip_rows = ceil_div(plan.out_h, strips);
  plan.chunks = ceil_div(plan.blocks, plan.chunk_blocks);
  plan.units = checked_product("The batch", {plan.batch, plan.strips, plan.chunks});
}

void lay_out_scratch(FloatConvPlan& plan, const Kernels& kernels) {
  int64_t end = 0;
  const auto place = [&end](std::initializer_list<int64_t> sizes) {
    const int64_t offset = end;
    end += ceil_div(checked_product("The scratch", sizes) * 4, 64) * 64;
    return offset;
  };
  const int64_t row = plan.in_channels * kProducts * plan.tile_step;
  if (plan.winograd) {
    plan.scratch.strip = place({kTileInputRows, row});
    plan.scratch.planes = place({kPlanes, row});
    plan.scratch.row = place({2, kStep, split_length(plan)});
  } else {
    plan.scratch.strip = place({plan.direct ? 0 : strip_values(plan, plan.strip_rows)});
    plan.scratch.offsets = place({plan.depth});
  }
  const int64_t blocks = plan.winograd ? plan.chunk_blocks : 1;
  const int64_t pixels = plan.winograd ? plan.tiles * kTile : plan.conv_w;
  plan.scratch.ring =
      place({plan.pooled ? ring_rows(plan) : 0, pixels, kernels.float_lanes, blocks});
  plan.scratch.maxima = place({plan.pooled ? plan.conv_w : 0, kernels.float_vector});
  plan.scratch.bytes = end;
}

}  // namespace

FloatConv::FloatConv(const ConvGeometry& g, Span<const float> weight, Span<const float> bias,
                     const FloatEpilogue& epilogue)
    : kernels_(&biper::kernels()),
      geometry_(g),
      pool_(epilogue.pool),
      clamp_min_(epilogue.clamp_min),
      clamp_max_(epilogue.clamp_max) {
  require_geometry(g);
  require_window(pool_);
  if (g.groups != 1) fail("`groups` of a float convolution must be 1.");
  pooled_ =
      pool_.kernel_h != 1 || pool_.kernel_w != 1 || pool_.stride_h != 1 || pool_.stride_w != 1;
  const int64_t outputs = g.out_channels, depth = g.kernel_h * g.kernel_w * g.in_channels;
  require_memory("weight", weight.data, weight.size,
                 checked_product("The weight", {outputs, depth}), 4);
  if (bias.data != nullptr || bias.size != 0) {
    require_memory("bias", bias.data, bias.size, outputs, 4);
  }
  const int64_t lanes = kernels_->float_lanes;
  const int64_t blocks = ceil_div(outputs, lanes);
  bias_.assign(static_cast<size_t>(blocks * lanes), 0.0f);
  if (bias.data != nullptr) std::copy(bias.data, bias.data + outputs, bias_.begin());
  winograd_ = g.kernel_h == 7 && g.kernel_w == 7 && g.stride_h == kStride &&
              g.stride_w == kStride && g.dilation_h == 1 && g.dilation_w == 1 &&
              g.in_channels <= kMostChannels;
  weights_ = winograd_ ? evaluated_weights(g, *kernels_, weight.data)
                       : interleaved_weights(g, *kernels_, weight.data);
  if (epilogue.threshold.data != nullptr || epilogue.threshold.size != 0) {
    require_memory("threshold", epilogue.threshold.data, epilogue.threshold.size, outputs, 4);
    threshold_.assign(epilogue.threshold.data, epilogue.threshold.data + outputs);
  }
  if (epilogue.sense.data != nullptr || epilogue.sense.size != 0) {
    require_memory("sense", epilogue.sense.data, epilogue.sense.size, outputs, 1);
    sense_ = pack_flags(epilogue.sense);
  }
}

FloatConvPlan FloatConv::plan_for(int64_t batch, int64_t height, int64_t width, bool planar,
                                  bool wants_bits, int64_t threads) const {
  require_range("batch", batch, 0, kMost);
  require_range("height", height, 1, kMost);
  require_range("width", width, 1, kMost);
  require_range("threads", threads, 1, kMost);
  const ConvGeometry& g = geometry_;
  FloatConvPlan plan{};
  plan.in_channels = g.in_channels;
  plan.out_channels = g.out_channels;
  plan.kernel_h = g.kernel_h;
  plan.kernel_w = g.kernel_w;
  plan.stride_h = g.stride_h;
  plan.stride_w = g.stride_w;
  plan.pad_top = g.pad_top;
  plan.pad_left = g.pad_left;
  plan.dilation_h = g.dilation_h;
  plan.dilation_w = g.dilation_w;
  plan.pool = pool_;
  plan.pooled = pooled_;
  plan.clamp_min = clamp_min_;
  plan.clamp_max = clamp_max_;
  plan.threshold = threshold_.empty() ? nullptr : threshold_.data();
  plan.sense = sense_.empty() ? nullptr : sense_.data();
  plan.batch = batch;
  plan.height = height;
  plan.width = width;
  set_sizes(plan, g);
  plan.pooled = pooled_ || winograd_;  // such rows pass through the ring
  plan.tiles = ceil_div(plan.conv_w, kTile);
  plan.tile_step = ceil_div(plan.tiles, kTileVector) * kTileVector;
  plan.planar = planar && g.in_channels > 1;
  plan.winograd = winograd_;
  plan.direct =
      !winograd_ && !plan.planar && !g.pad_top && !g.pad_bottom && !g.pad_left && !g.pad_right;
  plan.depth = (winograd_ ? kPlanes * kProducts : g.kernel_h * g.kernel_w) * g.in_channels;
  plan.strip_w = (plan.conv_w - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w + 1;
  plan.out_words = ceil_div(g.out_channels, kWordBits);
  plan.blocks = ceil_div(g.out_channels, kernels_->float_lanes);
  plan.weights = weights_.data();
  plan.bias = bias_.data();
  const int64_t reach = checked_product(
      "The receptive field",
      {(g.kernel_h - 1) * g.dilation_h + 1, plan.direct ? width : plan.strip_w, g.in_channels});
  if (reach > kMost) fail("The receptive field spans 2^31 values of a strip, or more.");
  cut(plan, kernels_->float_lanes, wants_bits, threads);
  lay_out_scratch(plan, *kernels_);
  return plan;
}

}  // namespace biper
