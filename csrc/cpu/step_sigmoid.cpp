// "sigmoid": 1 / (1 + exp(-x)) of every value of the float map `x`.
#include "dispatch.h"
#include "steps.h"

namespace biper {
namespace {

// Values of work that one costs.
constexpr int64_t kValuesEach = 16;

class SigmoidStep : public Step {
 public:
  SigmoidStep(Program& program, const Arguments& a) : x_(a.map("x")) {
    const MapShape shape = program.floats(x_);
    values_ = shape.values();
    out_ = program.add_map(shape);
    reads = {x_};
    writes = {out_};
    in_place = x_;
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    const int64_t values = checked_product("The map", {shape.batch, values_});
    const auto bind = [this](FunctionCall& c, void* const* maps) {
      c.x = static_cast<const float*>(maps[x_]);
      c.out = static_cast<float*>(maps[out_]);
    };
    return prepared_call(biper::kernels(), FunctionCall{}, ranges_of(values, kValuesEach), 0, bind,
                         [](const auto& step, int64_t unit, void*) {
                           step.kernels.sigmoid(step.call, step.ranges.first(unit),
                                                step.ranges.last(unit));
                         });
  }

 private:
  int64_t x_, values_, out_;
};

}  // namespace

extern const StepKind kSigmoidStep;
const StepKind kSigmoidStep{"sigmoid", &make_step<SigmoidStep>};

}  // namespace biper
