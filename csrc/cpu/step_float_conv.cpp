// "float_conv": a float convolution without groups, then max pool, clamp, its map and its bits.
//
// Reads `x`; writes the float map where `want_float`, then its bits where `want_bits`, which
// `threshold` and `sense` make as `biper::binarize` does. `weight` is [O, KH, KW, C]; the step
// copies it, `bias`, `threshold` and `sense`.
#include <algorithm>
#include <limits>

#include "float_conv.h"
#include "steps.h"

namespace biper {
namespace {

FloatConv float_conv(const Arguments& a) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const FloatEpilogue epilogue{
      a.window("pool"), a.number("clamp_min", -kInfinity), a.number("clamp_max", kInfinity),
      a.optional_span<float>("threshold"), a.optional_span<uint8_t>("sense")};
  return FloatConv(a.geometry("geometry"), a.span<float>("weight"), a.optional_span<float>("bias"),
                   epilogue);
}

class FloatConvStep : public Step {
 public:
  FloatConvStep(Program& program, const Arguments& a)
      : conv_(float_conv(a)), x_(a.map("x")), in_(program.floats(x_)) {
    const bool want_float = a.flag("want_float"), want_bits = a.flag("want_bits");
    require_shape("x", in_, in_.height, in_.width, conv_.geometry().in_channels);
    const FloatConvPlan plan = conv_.plan_for(1, in_.height, in_.width, false, true, 1);
    if (!want_float && !want_bits) fail("Nothing of this convolution leaves.");
    const auto add_map = [&](bool packed) {
      return program.add_map({plan.out_h, plan.out_w, conv_.geometry().out_channels, packed});
    };
    if (want_float) out_float_ = add_map(false);
    if (want_bits) out_bits_ = add_map(true);
    reads = {x_};
    writes = wanted_maps({out_float_, out_bits_});
  }

  bool takes_planar() const override { return true; }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    int64_t batch = shape.batch, height = in_.height, width = in_.width;
    const bool planar = shape.planar[static_cast<size_t>(x_)];
    if (is_pointwise() && !planar) {  // all pixels are alike: one image of them
      height = checked_product("The map", {batch, height, width});
      batch = width = 1;
    }
    FloatConvPlan plan = conv_.plan_for(batch, std::max<int64_t>(height, 1), width, planar,
                                        out_bits_ != kNoMap, shape.threads);
    const auto bind = [this](FloatConvPlan& p, void* const* maps) {
      p.x = static_cast<const float*>(maps[x_]);
      p.out_float = static_cast<float*>(map_or_null(maps, out_float_));
      p.out_bits = static_cast<uint32_t*>(map_or_null(maps, out_bits_));
    };
    return prepared_call(conv_.kernels(), plan, {plan.units, 1}, plan.scratch.bytes, bind,
                         [](const auto& step, int64_t unit, void* scratch) {
                           step.kernels.float_conv_unit(step.call, unit, scratch);
                         });
  }

 private:
  bool is_pointwise() const {
    const ConvGeometry& g = conv_.geometry();
    return g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 &&
           g.pad_top + g.pad_bottom + g.pad_left + g.pad_right == 0 && !conv_.pooled();
  }

  FloatConv conv_;
  int64_t x_;
  MapShape in_;
  int64_t out_float_ = kNoMap, out_bits_ = kNoMap;
};

}  // namespace

extern const StepKind kFloatConvStep;
const StepKind kFloatConvStep{"float_conv", &make_step<FloatConvStep>};

}  // namespace biper
