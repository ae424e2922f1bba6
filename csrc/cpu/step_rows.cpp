// "rows": a function of each row of `length` numbers of the map `x`, another row or a number.
//
// `function` is its name in kFunctions. "normalize" subtracts the mean where `centred`, divides by
// the root of the mean square and `epsilon`, then multiplies by `weight` and adds `bias`, each
// [length], which may be missing. "variance" and "deviation" divide by `divisor`.
#include <limits>

#include "dispatch.h"
#include "steps.h"

namespace biper {
namespace {

struct NamedFunction {
  const char* name;
  RowFunction function;
  bool to_rows;
  int64_t values_each;  // values of work that one costs
};

constexpr NamedFunction kFunctions[] = {
    {"log_softmax", RowFunction::kLogSoftmax, true, 24},
    {"normalize", RowFunction::kNormalize, true, 6},
    {"softmax", RowFunction::kSoftmax, true, 4},
    {"log_sum_exp", RowFunction::kLogSumExp, false, 24},
    {"maximum", RowFunction::kMaximum, false, 2},
    {"mean", RowFunction::kMean, false, 2},
    {"minimum", RowFunction::kMinimum, false, 2},
    {"norm1", RowFunction::kNorm1, false, 2},
    {"norm2", RowFunction::kNorm2, false, 2},
    {"sum", RowFunction::kSum, false, 2},
    {"variance", RowFunction::kVariance, false, 4},
    {"deviation", RowFunction::kDeviation, false, 4},
};

const NamedFunction& function_of(const std::string& name) {
  for (const NamedFunction& named : kFunctions) {
    if (name == named.name) return named;
  }
  fail("There is no function '" + name + "' of rows.");
}

class RowsStep : public Step {
 public:
  RowsStep(Program& program, const Arguments& a)
      : function_(function_of(a.text("function"))), x_(a.map("x")) {
    const int64_t values = program.floats(x_).values();
    const Span<const float> weight = a.optional_span<float>("weight");
    const Span<const float> bias = a.optional_span<float>("bias");
    call_.function = function_.function;
    call_.length = a.integer("length");
    require_range("length", call_.length, 1, values);
    if (values % call_.length != 0) fail("`length` does not divide the values of `x`.");
    require_optional("weight", weight, call_.length);
    require_optional("bias", bias, call_.length);
    weight_.assign(weight.data, weight.data + weight.size);
    bias_.assign(bias.data, bias.data + bias.size);
    call_.weight = weight_.empty() ? nullptr : weight_.data();
    call_.bias = bias_.empty() ? nullptr : bias_.data();
    call_.centred = a.flag("centred", true);
    call_.epsilon = a.real("epsilon", 0.0);
    call_.divisor = a.real("divisor", 1.0);
    rows_ = values / call_.length;
    out_ = program.add_map({1, rows_, function_.to_rows ? call_.length : 1, false});
    reads = {x_};
    writes = {out_};
    if (function_.to_rows) in_place = x_;
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    const auto bind = [this](RowsCall& c, void* const* maps) {
      c.x = static_cast<const float*>(maps[x_]);
      c.out = static_cast<float*>(maps[out_]);
    };
    const int64_t rows = checked_product("The map", {shape.batch, rows_});
    return prepared_call(
        biper::kernels(), call_, ranges_of(rows, call_.length * function_.values_each), 0, bind,
        [](const auto& step, int64_t unit, void*) {
          step.kernels.rows(step.call, step.ranges.first(unit), step.ranges.last(unit));
        });
  }

 private:
  const NamedFunction& function_;
  int64_t x_, rows_, out_;
  RowsCall call_{};
  std::vector<float> weight_, bias_;
};

}  // namespace

extern const StepKind kRowsStep;
const StepKind kRowsStep{"rows", &make_step<RowsStep>};

}  // namespace biper
