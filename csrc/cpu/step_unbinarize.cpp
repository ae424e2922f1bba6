// "unbinarize": the packed map `bits` as a float map of +1 and -1.
#include "dispatch.h"
#include "steps.h"

namespace biper {
namespace {

class UnbinarizeStep : public Step {
 public:
  UnbinarizeStep(Program& program, const Arguments& a)
      : bits_(a.map("bits")), in_(program.bits(bits_)) {
    out_ = program.add_map({in_.height, in_.width, in_.channels, false});
    reads = {bits_};
    writes = {out_};
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    const UnbinarizeCall call{nullptr, in_.channels, nullptr, FloatType::kFloat32};
    const int64_t pixels = checked_product("The map", {shape.batch, in_.height, in_.width});
    const auto bind = [this](UnbinarizeCall& c, void* const* maps) {
      c.bits = static_cast<const uint32_t*>(maps[bits_]);
      c.x = maps[out_];
    };
    return prepared_call(biper::kernels(), call, ranges_of(pixels, in_.channels), 0, bind,
                         [](const auto& step, int64_t unit, void*) {
                           step.kernels.unbinarize(step.call, step.ranges.first(unit),
                                                   step.ranges.last(unit));
                         });
  }

 private:
  int64_t bits_;
  MapShape in_;
  int64_t out_;
};

}  // namespace

extern const StepKind kUnbinarizeStep;
const StepKind kUnbinarizeStep{"unbinarize", &make_step<UnbinarizeStep>};

}  // namespace biper
