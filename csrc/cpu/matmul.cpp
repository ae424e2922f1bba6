// How products of matrices are checked, laid out in memory and cut into units of work.
#include "matmul.h"

#include <algorithm>

#include "cut.h"
#include "dispatch.h"
#include "thread_pool.h"

namespace biper {
namespace {

constexpr int64_t kMost = (int64_t{1} << 31) - 1;
constexpr int64_t kMostDepth = int64_t{1} << 24;  // sums stay exact in float32
constexpr int64_t kUnitsPerThread = 4;            // so that threads of unequal speed end together
constexpr int64_t kFewestPixels = 16;             // of a strip: each re-lays b again
// Vector steps of work, some 10 us, below which waking another thread costs more than it brings.
constexpr int64_t kStepsPerThread = 20000;

// Makes scratch of 64-byte aligned parts.
class Layout {
 public:
  int64_t place(std::initializer_list<int64_t> sizes) {
    const int64_t offset = end_;
    end_ += ceil_div(checked_product("The scratch", sizes) * 4, 64) * 64;
    return offset;
  }
  int64_t bytes() const { return end_; }

 private:
  int64_t end_ = 0;
};

int64_t useful_threads(int64_t threads, double steps) {
  require_range("threads", threads, 1, kMost);
  return std::max<int64_t>(
      1, static_cast<int64_t>(std::min(double(threads), steps / double(kStepsPerThread))));
}

void require_shape(const MatmulShape& s) {
  for (const int64_t size : {s.rows, s.a_pixels, s.b_pixels}) {
    require_range("size of a map", size, 0, kMost);
  }
  require_range("channels", s.channels, 1, kMost);
  require_range("groups", s.groups, 1, kMost);
  if (s.channels % s.groups != 0) fail("`groups` must divide `channels`.");
  require_range("channels of a group", s.channels / s.groups, 1, kMostDepth - 1);
  require_range("low_a", s.low_a, -1, 0);
  require_range("low_b", s.low_b, -1, 0);
}

template <class Plan>
void run_units(const Plan& plan, int64_t threads,
               void (*unit)(const Plan& plan, int64_t unit, void* scratch)) {
  struct Context {
    const Plan* plan;
    void (*unit)(const Plan& plan, int64_t unit, void* scratch);
  } const context{&plan, unit};
  const auto run = [](const void* memory, int64_t index, void* scratch) {
    const Context* c = static_cast<const Context*>(memory);
    c->unit(*c->plan, index, scratch);
  };
  if (plan.units == 0) return;
  run_job({run, &context, plan.units, static_cast<size_t>(plan.scratch.bytes)}, threads);
}

std::vector<float> padded(Span<const float> values, int64_t size) {
  std::vector<float> made(static_cast<size_t>(size), 0.0f);
  if (values.data != nullptr) std::copy(values.data, values.data + values.size, made.begin());
  return made;
}

}  // namespace

MatmulPlan matmul_plan(const Kernels& kernels, const MatmulShape& shape, const MatmulScale& scale,
                       int64_t batch, int64_t threads) {
  require_range("batch", batch, 0, kMost);
  require_shape(shape);
  const Blocking& blocking = kernels.conv.blocking;
  MatmulPlan plan{};
  plan.matrices = checked_product("The batch", {batch, shape.rows});
  plan.a_pixels = shape.a_pixels;
  plan.b_pixels = shape.b_pixels;
  plan.channels = shape.channels;
  plan.groups = shape.groups;
  plan.low_a = shape.low_a;
  plan.low_b = shape.low_b;
  plan.multiplier = scale.multiplier;
  plan.row_multiplier = scale.row_multiplier;
  plan.column_multiplier = scale.column_multiplier;
  plan.bias = scale.bias;
  plan.pixel_words = ceil_div(shape.channels, kWordBits);
  plan.depth = shape.channels / shape.groups;
  plan.words = ceil_div(plan.depth, kWordBits);
  plan.vectors = ceil_div(shape.b_pixels, blocking.lanes);
  const int64_t products = checked_product("The batch", {plan.matrices, plan.groups});
  const double steps =
      double(products) * double(plan.a_pixels) * double(plan.vectors * plan.words * blocking.parts);
  const int64_t wanted = useful_threads(threads, steps) * (threads > 1 ? kUnitsPerThread : 1);
  const int64_t pieces = ceil_div(wanted, std::max<int64_t>(products, 1));
  plan.strip = std::clamp(ceil_div(plan.a_pixels, pieces), kFewestPixels,
                          std::max(kFewestPixels, plan.a_pixels));
  plan.strips = ceil_div(plan.a_pixels, plan.strip);
  plan.units = plan.b_pixels == 0 ? 0 : checked_product("The batch", {products, plan.strips});
  checked_product("The result", {products, plan.a_pixels, plan.b_pixels});
  Layout layout;
  const int64_t lanes = plan.vectors * blocking.lanes;
  MatmulPlan::Scratch& s = plan.scratch;
  s.a = layout.place({plan.strip, plan.words});
  s.b = layout.place({plan.b_pixels, plan.words});
  s.weights = layout.place({plan.vectors, plan.words, blocking.parts * blocking.part_words});
  s.borders = layout.place({lanes});
  s.columns = layout.place({lanes});
  s.rows = layout.place({plan.strip});
  s.offsets = layout.place({plan.words});
  // Tiles of fewer vectors have more pixels, but no more sums.
  s.dots = layout.place({blocking.tile_pixels, blocking.vectors, blocking.lanes});
  s.bytes = layout.bytes();
  return plan;
}

void matmul(int64_t batch, const MatmulShape& shape, const MatmulScale& scale,
            Span<const uint32_t> a, Span<const uint32_t> b, const FloatSpan& out,
            Span<int32_t> sums, int64_t threads) {
  const Kernels& isa = kernels();
  MatmulPlan plan = matmul_plan(isa, shape, scale, batch, threads);
  const auto map = [&](const char* name, Span<const uint32_t> bits, int64_t pixels) {
    require_memory(name, bits.data, bits.size,
                   checked_product("The map", {plan.matrices, pixels, plan.pixel_words}), 4);
  };
  map("a", a, plan.a_pixels);
  map("b", b, plan.b_pixels);
  const int64_t values =
      checked_product("The result", {plan.matrices, plan.groups, plan.a_pixels, plan.b_pixels});
  if (values == 0) return;
  if (sums.data != nullptr || sums.size != 0) {
    require_memory("sums", sums.data, sums.size, values, 4);
  } else {
    if (out.type == FloatType::kNone) fail("Nothing of this product leaves.");
    require_memory("out", out.data, out.size, values, float_bytes(out.type));
  }
  plan.a = a.data;
  plan.b = b.data;
  plan.out = out.data;
  plan.out_type = out.type;
  plan.out_sums = sums.data;
  run_units(plan, threads, isa.matmul_unit);
}

SignLinear::SignLinear(int64_t inputs, int64_t outputs, Span<const uint32_t> weight,
                       Span<const float> multiplier, Span<const float> bias,
                       Span<const float> offset)
    : kernels_(&biper::kernels()), inputs_(inputs), outputs_(outputs) {
  require_range("inputs", inputs, 1, kMost);
  require_range("outputs", outputs, 0, kMost);
  const int64_t given = ceil_div(inputs, kWordBits), words = ceil_div(inputs, kSignWordInputs);
  const int64_t lanes = kernels_->sign_lanes, blocks = ceil_div(outputs, lanes);
  require_memory("weight", weight.data, weight.size,
                 checked_product("The weight", {outputs, given}), 4);
  require_memory("multiplier", multiplier.data, multiplier.size, outputs, 4);
  if (bias.data != nullptr || bias.size != 0)
    require_memory("bias", bias.data, bias.size, outputs, 4);
  const bool shifted = offset.data != nullptr || offset.size != 0;
  if (shifted) require_memory("offset", offset.data, offset.size, outputs, 4);
  multiplier_ = padded(multiplier, blocks * lanes);
  bias_ = padded(bias, blocks * lanes);
  if (shifted) offset_ = padded(offset, blocks * lanes);
  weights_.assign(static_cast<size_t>(checked_product("The weight", {blocks, lanes, words})), 0);
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t w = 0; w < words; ++w) {
      const int64_t chain = w / kChainWords, in_chain = w % kChainWords;
      const int64_t chain_words = std::min(kChainWords, words - chain * kChainWords);
      const int64_t row = chain * kChainWords * blocks + o / lanes * chain_words + in_chain;
      const int64_t first = w * kSignWordInputs, count = std::min(kSignWordInputs, inputs - first);
      const uint32_t* from = weight.data + o * given + first / kWordBits;
      uint64_t bits = from[0];
      if (first % kWordBits + count > kWordBits) bits |= uint64_t{from[1]} << kWordBits;
      weights_[static_cast<size_t>(row * lanes + o % lanes)] =
          static_cast<uint32_t>(bits >> first % kWordBits & ((uint64_t{1} << count) - 1));
    }
  }
}

SignLinearPlan SignLinear::plan_for(int64_t rows, int64_t threads) const {
  require_range("rows", rows, 0, kMost);
  SignLinearPlan plan{};
  plan.rows = rows;
  plan.inputs = inputs_;
  plan.outputs = outputs_;
  plan.words = ceil_div(inputs_, kSignWordInputs);
  plan.chains = ceil_div(plan.words, kChainWords);
  plan.lanes = kernels_->sign_lanes;
  plan.blocks = ceil_div(outputs_, plan.lanes);
  plan.group_rows = kernels_->sign_rows;
  plan.groups = ceil_div(rows, plan.group_rows);
  const double steps = double(rows) * double(inputs_) / kTableInputs *
                       double(plan.blocks * plan.lanes) / double(kernels_->float_vector);
  const int64_t useful = useful_threads(threads, steps);
  // Every chunk makes the tables of its rows again.
  const int64_t wanted = useful > 1 ? 2 * useful : 1;
  const int64_t chunks = ceil_div(wanted, std::max<int64_t>(plan.groups, 1));
  plan.chunk_blocks = std::max<int64_t>(1, ceil_div(plan.blocks, chunks));
  plan.chunks = ceil_div(plan.blocks, plan.chunk_blocks);
  plan.units = checked_product("The batch", {plan.groups, plan.chunks});
  Layout layout;
  plan.scratch.tables =
      layout.place({plan.group_rows, kChainWords * kWordTables, kernels_->table_floats});
  plan.scratch.totals = layout.place({plan.group_rows, plan.chunk_blocks, plan.lanes});
  plan.scratch.bytes = layout.bytes();
  plan.weights = weights_.data();
  plan.multiplier = multiplier_.data();
  plan.bias = bias_.data();
  plan.offset = offset_.empty() ? nullptr : offset_.data();
  return plan;
}

void SignLinear::run(int64_t rows, Span<const float> x, Span<float> out, int64_t threads) const {
  SignLinearPlan plan = plan_for(rows, threads);
  require_memory("x", x.data, x.size, checked_product("The input", {rows, inputs_}), 4);
  require_memory("out", out.data, out.size, checked_product("The output", {rows, outputs_}), 4);
  plan.x = x.data;
  plan.out = out.data;
  run_units(plan, threads, kernels_->sign_linear_unit);
}

}  // namespace biper
