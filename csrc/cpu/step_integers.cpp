// Steps that read integers: a packed map of one word for each integer, int32, or of two, int64.
//
// "embedding" writes, for each integer of `x`, the row of `weight` [rows, channels] with its
// number. "integers" writes the integers of `x` as floats.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "dispatch.h"
#include "steps.h"

namespace biper {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

// A map of integers.
struct Integers {
  Integers(const Program& program, int64_t map) : map(map) {
    const MapShape& shape = program.bits(map);
    words = shape.channels / kWordBits;
    if (shape.channels % kWordBits != 0 || words < 1 || words > 2) {
      fail("`x` has pixels of " + std::to_string(shape.channels) + " bits, wanted 32 or 64.");
    }
    count = checked_product("`x`", {shape.height, shape.width});
  }

  int64_t at(const uint32_t* x, int64_t i) const {
    if (words == 1) return static_cast<int32_t>(x[i]);
    int64_t value;
    std::memcpy(&value, x + 2 * i, sizeof value);
    return value;
  }

  int64_t map, words, count;  // words of an integer, integers of an image
};

class PreparedEmbedding : public PreparedStep {
 public:
  PreparedEmbedding(const Integers& x, const std::vector<float>& weight, int64_t rows,
                    int64_t channels, int64_t out, int64_t batch)
      : x_(x),
        weight_(weight),
        rows_(rows),
        channels_(channels),
        out_(out),
        ranges_(ranges_of(checked_product("The map", {batch, x.count}), channels)) {
    job.context = this;
    job.units = ranges_.units();
    job.run = [](const void* context, int64_t unit, void*) {
      static_cast<const PreparedEmbedding*>(context)->run(unit);
    };
  }

  void bind(void* const* maps) override {
    from_ = static_cast<const uint32_t*>(maps[x_.map]);
    to_ = static_cast<float*>(maps[out_]);
    is_outside_ = false;
  }

  void check() const override {
    if (!is_outside_) return;
    throw std::out_of_range("An index into an embedding of " + std::to_string(rows_) + " rows is " +
                            std::to_string(outside_) + ".");
  }

 private:
  void run(int64_t unit) const {
    for (int64_t i = ranges_.first(unit); i < ranges_.last(unit); ++i) {
      const int64_t row = x_.at(from_, i);
      float* const to = to_ + i * channels_;
      if (row >= 0 && row < rows_) {
        std::memcpy(to, weight_.data() + row * channels_,
                    static_cast<size_t>(channels_) * sizeof(float));
        continue;
      }
      std::fill(to, to + channels_, 0.0f);
      outside_ = row;
      is_outside_ = true;
    }
  }

  const Integers& x_;
  const std::vector<float>& weight_;
  int64_t rows_, channels_, out_;
  Ranges ranges_;
  const uint32_t* from_ = nullptr;
  float* to_ = nullptr;
  mutable std::atomic<int64_t> outside_{0};
  mutable std::atomic<bool> is_outside_{false};
};

class EmbeddingStep : public Step {
 public:
  EmbeddingStep(Program& program, const Arguments& a)
      : x_(program, a.map("x")), rows_(a.integer("rows")) {
    const Span<const float> weight = a.span<float>("weight");
    require_range("rows", rows_, 1, kMost);
    channels_ = weight.size / rows_;
    require_range("channels", channels_, 1, kMost);
    require_memory("weight", weight.data, weight.size,
                   checked_product("`weight`", {rows_, channels_}), 4);
    weight_.assign(weight.data, weight.data + weight.size);
    out_ = program.add_map({x_.count, 1, channels_, false});
    reads = {x_.map};
    writes = {out_};
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    return std::make_unique<PreparedEmbedding>(x_, weight_, rows_, channels_, out_, shape.batch);
  }

 private:
  Integers x_;
  int64_t rows_, channels_, out_;
  std::vector<float> weight_;
};

struct IntegersCall {
  const uint32_t* x;
  float* out;
  const Integers* integers;
};

class IntegersStep : public Step {
 public:
  IntegersStep(Program& program, const Arguments& a) : x_(program, a.map("x")) {
    out_ = program.add_map({x_.count, 1, 1, false});
    reads = {x_.map};
    writes = {out_};
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    const auto bind = [this](IntegersCall& c, void* const* maps) {
      c.x = static_cast<const uint32_t*>(maps[x_.map]);
      c.out = static_cast<float*>(maps[out_]);
    };
    const auto run = [](const auto& step, int64_t unit, void*) {
      const Integers& x = *step.call.integers;
      for (int64_t i = step.ranges.first(unit); i < step.ranges.last(unit); ++i) {
        step.call.out[i] = static_cast<float>(x.at(step.call.x, i));
      }
    };
    const int64_t count = checked_product("The map", {shape.batch, x_.count});
    return prepared_call(biper::kernels(), IntegersCall{nullptr, nullptr, &x_}, ranges_of(count, 1),
                         0, bind, run);
  }

 private:
  Integers x_;
  int64_t out_;
};

}  // namespace

extern const StepKind kEmbeddingStep, kIntegersStep;
const StepKind kEmbeddingStep{"embedding", &make_step<EmbeddingStep>};
const StepKind kIntegersStep{"integers", &make_step<IntegersStep>};

}  // namespace biper
