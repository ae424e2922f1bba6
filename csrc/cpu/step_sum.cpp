// "sum": clamp(a + b) of two float maps of one shape, or clamp(a) where `b` is missing.
#include <limits>

#include "dispatch.h"
#include "steps.h"

namespace biper {
namespace {

class SumStep : public Step {
 public:
  SumStep(Program& program, const Arguments& a) : a_(a.map("a")), b_(a.optional_map("b")) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    low_ = a.number("clamp_min", -kInfinity);
    high_ = a.number("clamp_max", kInfinity);
    const MapShape shape = program.floats(a_);
    if (b_ != kNoMap) {
      require_shape("b", program.floats(b_), shape.height, shape.width, shape.channels);
    }
    values_ = shape.values();
    out_ = program.add_map(shape);
    reads = wanted_maps({a_, b_});
    writes = {out_};
    in_place = a_;
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    const int64_t values = checked_product("The map", {shape.batch, values_});
    const auto bind = [this](SumCall& c, void* const* maps) {
      c.a = static_cast<const float*>(maps[a_]);
      c.b = static_cast<const float*>(map_or_null(maps, b_));
      c.out = static_cast<float*>(maps[out_]);
    };
    return prepared_call(biper::kernels(), SumCall{nullptr, nullptr, low_, high_, nullptr},
                         ranges_of(values, 1), 0, bind, [](const auto& step, int64_t unit, void*) {
                           step.kernels.sum(step.call, step.ranges.first(unit),
                                            step.ranges.last(unit));
                         });
  }

 private:
  int64_t a_, b_, values_, out_;
  float low_, high_;
};

}  // namespace

extern const StepKind kSumStep;
const StepKind kSumStep{"sum", &make_step<SumStep>};

}  // namespace biper
