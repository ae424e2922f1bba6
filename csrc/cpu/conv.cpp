// How a convolution is checked, laid out in memory and cut into units of work.
//
// Prepacked weights are 32-bit words, padded vectors of a group after each other:
//
//     header      [16] what they are for
//     tap counts  [taps][groups * group_vectors * lanes] set bits of each tap's weights
//     weights     [group][block][depth][part][vector of the block][part_words]
#include "conv.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <utility>

#include "cut.h"
#include "dispatch.h"
#include "thread_pool.h"

namespace biper {
namespace {

constexpr uint32_t kMagic = 0x62697066;  // "fpib": the layout's version, too
constexpr int64_t kHeaderWords = 16;
constexpr int64_t kMost = (int64_t{1} << 31) - 1;

// A strip of input and the weights of a block share the first-level cache, 32 KiB or more.
constexpr int64_t kStripBytes = 16 << 10;

constexpr int64_t kUnitsPerThread = 4;  // so that threads of unequal speed end together
constexpr int64_t kFewestRows = 4;      // a thinner strip copies too many rows twice
// Vector steps (a xor, a popcount, an add) of work, some 10 us, below which waking another thread
// costs more than it brings.
constexpr int64_t kStepsPerThread = 20000;

// In shorter windows, laying out pairs and taking their sums apart costs more than they save.
constexpr int64_t kFewestPairedWords = 6;

// Weights of so many bytes, as bits, are more than a core's own caches share with anything else.
constexpr int64_t kHeavyWeights = 512 << 10;

const ConvKernels& conv_kernels(const Kernels& kernels, const ConvGeometry& g) {
  const int64_t words = ceil_div(g.in_channels / g.groups, kWordBits);
  const double bytes = 4.0 * double(g.out_channels) * double(g.kernel_h * g.kernel_w * words);
  return bytes < double(kHeavyWeights) ? kernels.conv : kernels.heavy;
}

// Sizes of a convolution's weights for one instruction set.
struct Layout {
  int64_t group_channels, group_words, group_outputs, group_vectors, group_blocks;
  int64_t taps, fold, depth, tap_lanes, words;
};

Layout layout_of(const ConvGeometry& g, const Blocking& blocking) {
  Layout l;
  l.group_channels = g.in_channels / g.groups;
  l.group_words = ceil_div(l.group_channels, kWordBits);
  l.group_outputs = g.out_channels / g.groups;
  l.group_vectors = ceil_div(l.group_outputs, blocking.lanes);
  l.group_blocks = ceil_div(l.group_vectors, blocking.vectors);
  l.taps = g.kernel_h * g.kernel_w;
  // Taps are folded wherever a window could begin, which long strides skip. Pairs of pixels leave
  // out the empty half of a word by themselves.
  const bool folds = !blocking.pairs && g.stride_h <= 2 && g.stride_w <= 2;
  l.fold = folds ? std::clamp<int64_t>(kWordBits / l.group_channels, 1, l.taps) : 1;
  l.depth = ceil_div(l.taps, l.fold) * l.group_words;
  l.tap_lanes = g.groups * l.group_vectors * blocking.lanes;
  const int64_t vector_words = blocking.parts * blocking.part_words;
  l.words = kHeaderWords + checked_product("The tap counts", {l.taps, l.tap_lanes}) +
            checked_product("The weight", {g.groups * l.group_vectors, l.depth, vector_words});
  return l;
}

std::array<uint32_t, kHeaderWords> header_of(const ConvGeometry& g, const Kernels& kernels) {
  return {kMagic,
          static_cast<uint32_t>(kernels.id),
          static_cast<uint32_t>(g.in_channels),
          static_cast<uint32_t>(g.out_channels),
          static_cast<uint32_t>(g.groups),
          static_cast<uint32_t>(g.kernel_h),
          static_cast<uint32_t>(g.kernel_w)};
}

// Where an output channel is among the lanes of all vectors.
int64_t lane_of(const Layout& l, int64_t lanes, int64_t channel) {
  return channel / l.group_outputs * l.group_vectors * lanes + channel % l.group_outputs;
}

void fill_tap_counts(const Layout& l, const ConvGeometry& g, const uint32_t* weight, int64_t lanes,
                     int32_t* counts) {
  std::fill(counts, counts + l.taps * l.tap_lanes, 0);
  for (int64_t o = 0; o < g.out_channels; ++o) {
    const int64_t lane = lane_of(l, lanes, o);
    for (int64_t tap = 0; tap < l.taps; ++tap) {
      for (int64_t w = 0; w < l.group_words; ++w) {
        counts[tap * l.tap_lanes + lane] +=
            __builtin_popcount(weight[(o * l.taps + tap) * l.group_words + w]);
      }
    }
  }
}

// Returns canonical weights with several taps in a word.
std::vector<uint32_t> fold(const Layout& l, const std::vector<uint32_t>& weight) {
  if (l.fold == 1) return weight;
  std::vector<uint32_t> folded;
  for (size_t i = 0; i < weight.size(); ++i) {
    const int64_t place = static_cast<int64_t>(i) % l.taps % l.fold;
    if (place == 0) folded.push_back(0);
    folded.back() |= weight[i] << place * l.group_channels;
  }
  return folded;
}

void fill_weights(const Layout& l, const ConvGeometry& g, const ConvKernels& kernels,
                  const uint32_t* weight, uint32_t* to) {
  const Blocking& b = kernels.blocking;
  for (int64_t group = 0; group < g.groups; ++group) {
    for (int64_t first = 0; first < l.group_vectors; first += b.vectors) {
      const int64_t vectors = std::min(b.vectors, l.group_vectors - first);
      for (int64_t k = 0; k < l.depth; ++k) {
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t output = (first + v) * b.lanes;
          const int64_t rows = std::min(b.lanes, l.group_outputs - output);
          const uint32_t* from = weight + (group * l.group_outputs + output) * l.depth + k;
          kernels.pack_word(from, l.depth, rows, to + v * b.part_words, vectors * b.part_words);
        }
        to += vectors * b.parts * b.part_words;
      }
    }
  }
}

// Whether blocks of output channels start at whole words of bits, so that threads may share a
// pixel.
bool divisible(const ConvPlan& plan) {
  return plan.geometry.groups == 1 || plan.group_outputs % kWordBits == 0;
}

int64_t conv_rows(const ConvPlan& plan, int64_t out_rows) {
  if (!plan.pooled) return out_rows;
  return std::min(plan.conv_h, (out_rows - 1) * plan.pool.stride_h + plan.pool.kernel_h);
}

int64_t strip_rows(const ConvPlan& plan, int64_t out_rows) {
  const ConvGeometry& g = plan.geometry;
  return checked_product("A strip", {conv_rows(plan, out_rows) - 1, g.stride_h}) +
         (g.kernel_h - 1) * g.dilation_h + 1;
}

int64_t strip_words(const ConvPlan& plan, int64_t out_rows) {
  return checked_product("A strip", {strip_rows(plan, out_rows), plan.strip_w, plan.group_words});
}

// Cuts the work into units for up to `threads` threads; returns how many are worth waking.
int64_t cut(ConvPlan& plan, const Blocking& blocking, int64_t threads) {
  const int64_t blocks = plan.geometry.groups * plan.group_blocks;
  plan.strip_rows = plan.out_h;
  plan.chunk_blocks = blocks;
  while (plan.strip_rows > 1 && !plan.direct &&
         strip_words(plan, plan.strip_rows) * (plan.paired ? 8 : 4) > kStripBytes) {
    plan.strip_rows = ceil_div(plan.strip_rows, 2);
  }
  const double steps = double(plan.batch) * double(plan.conv_h) * double(plan.conv_w) *
                       double(plan.geometry.groups * plan.group_vectors * plan.depth) *
                       double(blocking.parts);
  threads = std::max<int64_t>(
      1, static_cast<int64_t>(std::min(double(threads), steps / kStepsPerThread)));
  int64_t strips = ceil_div(plan.out_h, plan.strip_rows);
  if (threads > 1) {
    const Cut wanted{plan.out_h, kFewestRows, divisible(plan) ? blocks : 1};
    const int64_t pieces = ceil_div(threads * kUnitsPerThread, plan.batch);
    // Heavy weights are read once rather than by each strip again: threads share out blocks.
    const int64_t weights = plan.geometry.out_channels * plan.depth * 4;
    const bool heavy = weights >= kHeavyWeights && divisible(plan) && blocks >= 2 * threads;
    if (!heavy) strips = std::max(strips, wanted.strips(pieces, ceil_div(threads, plan.batch)));
    const int64_t chunks = ceil_div(pieces, strips);
    if (divisible(plan)) plan.chunk_blocks = ceil_div(blocks, std::min(chunks, blocks));
  }
  plan.strips = strips;
  plan.strip_rows = ceil_div(plan.out_h, strips);
  plan.chunks = ceil_div(blocks, plan.chunk_blocks);
  plan.units = checked_product("The batch", {plan.batch, plan.strips, plan.chunks});
  return threads;
}

// Turns the pixels of all images into rows of one, where no window has more than one pixel: a tile
// then takes pixels of several images, and every weight that it loads counts for all of them.
void join_images(ConvPlan& plan) {
  const ConvGeometry& g = plan.geometry;
  const bool alone = g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 &&
                     !g.pad_top && !g.pad_bottom && !g.pad_left && !g.pad_right && !plan.pooled;
  if (!alone || plan.batch == 0) return;
  plan.height *= plan.batch;
  plan.batch = 1;
  if (plan.direct) {
    plan.height = checked_product("The map", {plan.height, plan.width});
    plan.width = 1;
  }
  plan.conv_h = plan.out_h = plan.height;
  plan.conv_w = plan.out_w = plan.strip_w = plan.width;
}

// Decides whether pixels are counted in pairs, and how pairs are laid out. A row of the input has
// those of each pixel with the one a stride behind it, and, where a row of outputs has a last one
// without a partner, those of its window with that of the first output of the next row.
void pair_pixels(ConvPlan& plan, const Blocking& blocking) {
  const ConvGeometry& g = plan.geometry;
  plan.paired = blocking.pairs && plan.depth >= kFewestPairedWords &&
                checked_product("The map", {plan.conv_h, plan.conv_w}) > 1;
  plan.pointwise = g.kernel_h == 1 && g.kernel_w == 1 && !plan.pooled;
  const int64_t extra = plan.conv_w % 2 ? (g.kernel_w - 1) * g.dilation_w + 1 : 0;
  plan.pair_w = plan.strip_w + extra;
}

void lay_out_scratch(ConvPlan& plan, const Blocking& blocking) {
  const ConvGeometry& g = plan.geometry;
  const int64_t block_lanes = blocking.lanes * blocking.vectors;
  const int64_t rows = conv_rows(plan, plan.strip_rows);
  int64_t end = 0;
  const auto place = [&end](std::initializer_list<int64_t> sizes) {
    const int64_t offset = end;
    end += ceil_div(checked_product("The scratch", sizes) * 4, 64) * 64;
    return offset;
  };
  ConvPlan::Scratch& s = plan.scratch;
  s.strip = place({plan.direct ? 0 : strip_words(plan, plan.strip_rows)});
  s.folded = place({plan.fold > 1 ? plan.depth : 0, strip_words(plan, plan.strip_rows)});
  s.offsets = place({plan.depth});
  const int64_t pixels = plan.pointwise ? ceil_div(rows * plan.conv_w, 2)
                                        : strip_rows(plan, plan.strip_rows) * plan.pair_w;
  s.pairs = place({plan.paired ? pixels : 0, plan.group_words, 4});
  s.pair_offsets = place({plan.paired ? plan.depth : 0});
  s.row_class = place({rows});
  s.column_class = place({plan.conv_w});
  s.rows = place({2, std::min(rows, 2 * g.kernel_h + 1)});
  s.columns = place({2, std::min(plan.conv_w, 2 * g.kernel_w + 1)});
  s.borders = place(
      {std::min(rows, 2 * g.kernel_h + 1), std::min(plan.conv_w, 2 * g.kernel_w + 1), block_lanes});
  const int64_t pool_rows = std::min(plan.pool.kernel_h, plan.conv_h);
  // The last pair may have one pixel.
  s.dots = plan.pooled ? place({pool_rows * plan.conv_w + 1, block_lanes})
                       : place({blocking.tile_pixels, block_lanes});
  s.pooled = place({plan.pooled ? plan.out_w : 0, block_lanes});
  s.bytes = end;
}

}  // namespace

int64_t prepacked_words(const ConvGeometry& geometry) {
  require_geometry(geometry);
  return layout_of(geometry, conv_kernels(kernels(), geometry).blocking).words;
}

void require_weight(const ConvGeometry& g, Span<const uint32_t> weight) {
  require_geometry(g);
  const int64_t group_words = ceil_div(g.in_channels / g.groups, kWordBits);
  const int64_t words =
      checked_product("The weight", {g.out_channels, g.kernel_h, g.kernel_w, group_words});
  require_memory("weight", weight.data, weight.size, words, 4);
}

void prepack(const ConvGeometry& g, Span<const uint32_t> weight, Span<uint32_t> prepacked) {
  require_weight(g, weight);
  const Kernels& isa = kernels();
  const ConvKernels& own = conv_kernels(isa, g);
  const Layout l = layout_of(g, own.blocking);
  require_memory("prepacked", prepacked.data, prepacked.size, l.words, 4);
  std::vector<uint32_t> used(weight.data, weight.data + weight.size);
  const int64_t last_bits = l.group_channels - (l.group_words - 1) * kWordBits;
  const uint32_t last = last_bits == kWordBits ? ~0u : (1u << last_bits) - 1;
  for (int64_t w = l.group_words - 1; w < weight.size; w += l.group_words) {
    used[static_cast<size_t>(w)] &= last;
  }
  const auto header = header_of(g, isa);
  std::copy(header.begin(), header.end(), prepacked.data);
  uint32_t* counts = prepacked.data + kHeaderWords;
  fill_tap_counts(l, g, used.data(), own.blocking.lanes, reinterpret_cast<int32_t*>(counts));
  fill_weights(l, g, own, fold(l, used).data(), counts + l.taps * l.tap_lanes);
}

Conv::Conv(const ConvGeometry& geometry, Span<const uint32_t> prepacked)
    : kernels_(&biper::kernels()), geometry_(geometry), prepacked_(prepacked.data) {
  require_geometry(geometry);
  own_ = &conv_kernels(*kernels_, geometry);
  const Layout l = layout_of(geometry, own_->blocking);
  require_memory("prepacked", prepacked.data, prepacked.size, l.words, 4);
  const auto header = header_of(geometry, *kernels_);
  if (!std::equal(header.begin(), header.end(), prepacked.data)) {
    fail(
        "`prepacked` was made for another convolution or instruction set; make it again with "
        "`prepack` (instruction set in use: " +
        std::string(kernels_->name) + ").");
  }
}

Conv::Conv(const ConvGeometry& geometry, Span<const uint32_t> prepacked, const Window& pool,
           const EpilogueSpans& e)
    : Conv(geometry, prepacked) {
  require_window(pool);
  pool_ = pool;
  pooled_ = pool.kernel_h != 1 || pool.kernel_w != 1 || pool.stride_h != 1 || pool.stride_w != 1;
  const int64_t outputs = geometry.out_channels;
  const auto check = [outputs](const char* name, const void* data, int64_t size, int64_t bytes) {
    if (data != nullptr || size != 0) require_memory(name, data, size, outputs, bytes);
  };
  for (size_t i = 0; i < std::size(kEpilogueVectors); ++i) {
    check(kEpilogueVectors[i].name, e.vectors[i].data, e.vectors[i].size, 4);
  }
  check("sense", e.sense.data, e.sense.size, 1);
  check("pool_min", e.pool_min.data, e.pool_min.size, 1);
  if (e.sense.data != nullptr) {
    sense_ = pack_flags(e.sense);
    const bool any = std::any_of(sense_.begin(), sense_.end(), [](uint32_t w) { return w != 0; });
    if (!any) sense_.clear();
  }
  if (e.pool_min.data != nullptr) {
    for (int64_t o = 0; o < outputs; ++o) pool_sign_.push_back(e.pool_min.data[o] ? -1 : 1);
  }
  vectors_.reserve(std::size(e.vectors) * static_cast<size_t>(outputs));  // addresses stay
  for (size_t i = 0; i < std::size(kEpilogueVectors); ++i) {
    const Span<const float> vector = e.vectors[i];
    if (vector.data == nullptr) continue;
    epilogue_.*kEpilogueVectors[i].values = vectors_.data() + vectors_.size();
    vectors_.insert(vectors_.end(), vector.data, vector.data + outputs);
  }
  if (epilogue_.taps != nullptr) count_set_bits();
  const bool sums = epilogue_.window || epilogue_.taps || epilogue_.valid;
  if (pooled_ && sums) fail("`window`, `taps` and `valid` exclude a pool.");
  if (epilogue_.multiplier == nullptr) fail("`multiplier` is missing.");
  if (epilogue_.bias == nullptr) fail("`bias` is missing.");
  epilogue_.clamp_min = e.clamp_min;
  epilogue_.clamp_max = e.clamp_max;
  has_epilogue_ = true;
}

void Conv::count_set_bits() {
  const Layout l = layout_of(geometry_, own_->blocking);
  const int64_t lanes = own_->blocking.lanes;
  const int32_t* counts = reinterpret_cast<const int32_t*>(prepacked_ + kHeaderWords);
  for (int64_t o = 0; o < geometry_.out_channels; ++o) {
    int32_t bits = 0;
    for (int64_t tap = 0; tap < l.taps; ++tap) {
      bits += counts[tap * l.tap_lanes + lane_of(l, lanes, o)];
    }
    set_bits_.push_back(bits);
  }
}

ConvPlan Conv::plan_for(int64_t batch, int64_t height, int64_t width, bool raw) const {
  require_range("batch", batch, 0, kMost);
  require_range("height", height, 1, kMost);
  require_range("width", width, 1, kMost);
  const ConvGeometry& g = geometry_;
  const Layout l = layout_of(g, own_->blocking);
  ConvPlan plan{};
  plan.kernels = own_;
  plan.geometry = g;
  plan.pool = pool_;
  plan.epilogue = epilogue_;
  plan.epilogue.set_bits = set_bits_.empty() ? nullptr : set_bits_.data();
  plan.epilogue.sense = sense_.empty() ? nullptr : sense_.data();
  plan.epilogue.pool_sign = pool_sign_.empty() ? nullptr : pool_sign_.data();
  plan.batch = batch;
  plan.height = height;
  plan.width = width;
  plan.pooled = pooled_ && !raw;
  set_sizes(plan, g);
  plan.group_channels = l.group_channels;
  plan.group_words = l.group_words;
  plan.group_outputs = l.group_outputs;
  plan.group_vectors = l.group_vectors;
  plan.group_blocks = l.group_blocks;
  plan.residual_channels = g.out_channels;
  plan.in_words = ceil_div(g.in_channels, kWordBits);
  plan.out_words = ceil_div(g.out_channels, kWordBits);
  plan.fold = l.fold;
  plan.depth = l.depth;
  plan.tap_lanes = l.tap_lanes;
  plan.tap_counts = reinterpret_cast<const int32_t*>(prepacked_ + kHeaderWords);
  plan.weights = prepacked_ + kHeaderWords + l.taps * l.tap_lanes;
  const bool padded = g.pad_top || g.pad_bottom || g.pad_left || g.pad_right;
  plan.direct = g.groups == 1 && g.in_channels % kWordBits == 0 && !padded;
  plan.strip_w = (plan.conv_w - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w + 1;
  return plan;
}

int64_t Conv::prepare(ConvPlan& plan, int64_t threads) const {
  require_range("threads", threads, 1, kMost);
  join_images(plan);
  pair_pixels(plan, own_->blocking);
  threads = cut(plan, own_->blocking, threads);
  const int64_t reach =
      plan.fold > 1
          ? checked_product("The receptive field", {plan.depth, strip_words(plan, plan.strip_rows)})
          : checked_product(
                "The receptive field",
                {(plan.geometry.kernel_h - 1) * plan.geometry.dilation_h + 1,
                 std::max(plan.direct ? plan.width : plan.strip_w, plan.paired ? plan.pair_w : 0),
                 plan.group_words});
  if (reach > kMost) {
    fail("The receptive field spans " + std::to_string(reach) +
         " words of a strip, but fewer than 2^31 are wanted.");
  }
  lay_out_scratch(plan, own_->blocking);
  return threads;
}

void Conv::start(ConvPlan& plan, int64_t threads) const {
  require_range("threads", threads, 1, kMost);
  if (plan.batch == 0) return;
  threads = prepare(plan, threads);
  const auto run_unit = [](const void* memory, int64_t unit, void* scratch) {
    const ConvPlan* p = static_cast<const ConvPlan*>(memory);
    p->kernels->conv_unit(*p, unit, scratch);
  };
  run_job({run_unit, &plan, plan.units, static_cast<size_t>(plan.scratch.bytes)}, threads);
}

void Conv::take_bits(ConvPlan& plan, Span<const uint32_t> bits) const {
  require_memory("bits", bits.data, bits.size,
                 checked_product("The input", {plan.batch, plan.height, plan.width, plan.in_words}),
                 4);
  plan.bits = bits.data;
}

void Conv::accumulate(int64_t batch, int64_t height, int64_t width, Span<const uint32_t> bits,
                      Span<int32_t> dots, int64_t threads) const {
  ConvPlan plan = plan_for(batch, height, width, true);
  take_bits(plan, bits);
  const int64_t outputs = geometry_.out_channels;
  require_memory("dots", dots.data, dots.size,
                 checked_product("The output", {batch, plan.conv_h, plan.conv_w, outputs}), 4);
  plan.out_dots = dots.data;
  start(plan, threads);
}

void Conv::set_gate(ConvPlan& plan, const Images& images) const {
  if (images.gate.data == nullptr && images.gate.size == 0) {
    if (epilogue_.offset != nullptr)
      fail("`offset` is added after a gate, but there is no `gate`.");
    return;
  }
  const int64_t rows = images.gate_images, channels = images.gate_channels;
  if (channels != 1 && channels != geometry_.out_channels) {
    fail("`gate` has " + std::to_string(channels) + " channels, but 1 or " +
         std::to_string(geometry_.out_channels) + " are wanted.");
  }
  if (rows != 1 && rows != images.batch) {
    fail("`gate` has " + std::to_string(rows) + " images, but 1 or " +
         std::to_string(images.batch) + " are wanted.");
  }
  require_memory("gate", images.gate.data, images.gate.size, rows * channels, 4);
  plan.gate = images.gate.data;
  plan.gate_channels = channels;
  const int64_t each = rows == images.batch ? 1 : images.batch;
  plan.gate_pixels = checked_product("The output", {each, plan.out_h, plan.out_w});
}

void Conv::run(const Images& images, int64_t threads) const {
  if (!has_epilogue_) fail("This convolution was made without an epilogue.");
  ConvPlan plan = plan_for(images.batch, images.height, images.width, false);
  take_bits(plan, images.bits);
  const int64_t pixels = checked_product("The output", {images.batch, plan.out_h, plan.out_w});
  const int64_t values = checked_product("The output", {pixels, geometry_.out_channels});
  const auto stream = [values](const char* name, const FloatSpan& span) {
    if (span.type == FloatType::kNone) return;
    require_memory(name, span.data, span.size, values, float_bytes(span.type));
  };
  stream("residual", images.residual);
  stream("out_float", images.out_float);
  const bool wants_bits = images.out_bits.data != nullptr || images.out_bits.size != 0;
  if (wants_bits) {
    if (epilogue_.threshold == nullptr) fail("Bits leave, but there is no `threshold`.");
    require_memory("out_bits", images.out_bits.data, images.out_bits.size,
                   checked_product("The output", {pixels, plan.out_words}), 4);
  }
  set_gate(plan, images);
  plan.residual = images.residual.type == FloatType::kNone ? nullptr : images.residual.data;
  plan.residual_type = images.residual.type;
  plan.out_float = images.out_float.type == FloatType::kNone ? nullptr : images.out_float.data;
  plan.out_type = images.out_float.type;
  plan.out_bits = wants_bits ? images.out_bits.data : nullptr;
  start(plan, threads);
}

}  // namespace biper
