// "binarize": `biper::binarize` of `x`. `threshold` and `sense` may be missing.
#include "dispatch.h"
#include "steps.h"

namespace biper {
namespace {

class BinarizeStep : public Step {
 public:
  BinarizeStep(Program& program, const Arguments& a) : x_(a.map("x")), in_(program.floats(x_)) {
    const Span<const float> threshold = a.optional_span<float>("threshold");
    const Span<const uint8_t> sense = a.optional_span<uint8_t>("sense");
    require_optional("threshold", threshold, in_.channels);
    require_optional("sense", sense, in_.channels);
    threshold_.assign(threshold.data, threshold.data + threshold.size);
    if (sense.data != nullptr) sense_ = pack_flags(sense);
    out_ = program.add_map({in_.height, in_.width, in_.channels, true});
    reads = {x_};
    writes = {out_};
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    BinarizeCall call{};
    call.type = FloatType::kFloat32;
    call.channels = in_.channels;
    call.threshold = threshold_.empty() ? nullptr : threshold_.data();
    call.sense = sense_.empty() ? nullptr : sense_.data();
    const int64_t pixels = checked_product("The map", {shape.batch, in_.height, in_.width});
    const auto bind = [this](BinarizeCall& c, void* const* maps) {
      c.x = maps[x_];
      c.bits = static_cast<uint32_t*>(maps[out_]);
    };
    return prepared_call(biper::kernels(), call, ranges_of(pixels, in_.channels), 0, bind,
                         [](const auto& step, int64_t unit, void*) {
                           step.kernels.binarize(step.call, step.ranges.first(unit),
                                                 step.ranges.last(unit));
                         });
  }

 private:
  int64_t x_;
  MapShape in_;
  int64_t out_;
  std::vector<float> threshold_;
  std::vector<uint32_t> sense_;
};

}  // namespace

extern const StepKind kBinarizeStep;
const StepKind kBinarizeStep{"binarize", &make_step<BinarizeStep>};

}  // namespace biper
