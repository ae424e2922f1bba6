// "bmatmul": a product of two packed maps, scaled; "weight_linear": a linear layer with binary
// weights on every pixel of a float map.
//
// "bmatmul" reads `a` and `b`, with `channels` in `groups`; an element is 1 where its bit is 1, and
// `low_a` or `low_b` where it is 0. It writes a map of height rows * groups, of the width of `a`,
// whose channels are the pixels of `b`. The numbers are those of biper_engine/ops/matrix.py.
//
// "weight_linear" reads `x` and copies `weight` [O, words], `multiplier`, `bias` and `offset`, of
// which the last two may be missing.
#include "dispatch.h"
#include "matmul.h"
#include "steps.h"

namespace biper {
namespace {

class BitMatmulStep : public Step {
 public:
  BitMatmulStep(Program& program, const Arguments& a) : a_(a.map("a")), b_(a.map("b")) {
    const MapShape left = program.bits(a_), right = program.bits(b_);
    shape_ = {left.height,         left.width,         right.width,       left.channels,
              a.integer("groups"), a.integer("low_a"), a.integer("low_b")};
    scale_ = {a.number("multiplier", 1), a.number("row_multiplier", 0),
              a.number("column_multiplier", 0), a.number("bias", 0)};
    require_shape("b", right, left.height, right.width, left.channels);
    matmul_plan(biper::kernels(), shape_, scale_, 1, 1);  // checks the sizes
    out_ = program.add_map({left.height * shape_.groups, left.width, right.width, false});
    reads = {a_, b_};
    writes = {out_};
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    const Kernels& isa = biper::kernels();
    MatmulPlan plan = matmul_plan(isa, shape_, scale_, shape.batch, shape.threads);
    plan.out_type = FloatType::kFloat32;
    const auto bind = [this](MatmulPlan& p, void* const* maps) {
      p.a = static_cast<const uint32_t*>(maps[a_]);
      p.b = static_cast<const uint32_t*>(maps[b_]);
      p.out = maps[out_];
    };
    return prepared_call(isa, plan, {plan.units, 1}, plan.scratch.bytes, bind,
                         [](const auto& step, int64_t unit, void* scratch) {
                           step.kernels.matmul_unit(step.call, unit, scratch);
                         });
  }

 private:
  int64_t a_, b_, out_;
  MatmulShape shape_;
  MatmulScale scale_;
};

class WeightLinearStep : public Step {
 public:
  WeightLinearStep(Program& program, const Arguments& a)
      : x_(a.map("x")), in_(program.floats(x_)), linear_(linear(in_.channels, a)) {
    out_ = program.add_map({in_.height, in_.width, linear_.outputs(), false});
    reads = {x_};
    writes = {out_};
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    const int64_t rows = checked_product("The map", {shape.batch, in_.height, in_.width});
    const SignLinearPlan plan = linear_.plan_for(rows, shape.threads);
    const auto bind = [this](SignLinearPlan& p, void* const* maps) {
      p.x = static_cast<const float*>(maps[x_]);
      p.out = static_cast<float*>(maps[out_]);
    };
    return prepared_call(linear_.kernels(), plan, {plan.units, 1}, plan.scratch.bytes, bind,
                         [](const auto& step, int64_t unit, void* scratch) {
                           step.kernels.sign_linear_unit(step.call, unit, scratch);
                         });
  }

 private:
  static SignLinear linear(int64_t inputs, const Arguments& a) {
    const Span<const float> multiplier = a.span<float>("multiplier");
    return SignLinear(inputs, multiplier.size, a.span<uint32_t>("weight"), multiplier,
                      a.optional_span<float>("bias"), a.optional_span<float>("offset"));
  }

  int64_t x_;
  MapShape in_;
  SignLinear linear_;
  int64_t out_;
};

}  // namespace

extern const StepKind kBitMatmulStep, kWeightLinearStep;
const StepKind kBitMatmulStep{"bmatmul", &make_step<BitMatmulStep>};
const StepKind kWeightLinearStep{"weight_linear", &make_step<WeightLinearStep>};

}  // namespace biper
