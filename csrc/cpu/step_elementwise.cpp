// "elementwise": a function of the numbers at each place of up to three operands.
//
// `function` is its name in kFunctions. `sizes` are those of one image, outermost first in the
// memory of the map that is written. For each operand, `maps` has its map, or -1 for numbers of
// `constants`, `offsets` its first place there, and `strides` its strides along all sizes: those of
// the first operand, then those of the second, and so on.
#include <algorithm>
#include <array>
#include <numeric>

#include "dispatch.h"
#include "steps.h"
#include "strides.h"

namespace biper {
namespace {

struct NamedFunction {
  const char* name;
  Function function;
  int32_t operands;
  int64_t values_each;  // values of work that one costs
};

constexpr NamedFunction kFunctions[] = {
    {"abs", Function::kAbs, 1, 1},
    {"ceil", Function::kCeil, 1, 1},
    {"erf", Function::kErf, 1, 24},
    {"exp", Function::kExp, 1, 12},
    {"floor", Function::kFloor, 1, 1},
    {"gelu", Function::kGelu, 1, 24},
    {"gelu_tanh", Function::kGeluTanh, 1, 16},
    {"hard_sigmoid", Function::kHardSigmoid, 1, 2},
    {"hard_swish", Function::kHardSwish, 1, 2},
    {"log", Function::kLog, 1, 16},
    {"log1p", Function::kLog1p, 1, 24},
    {"log_sigmoid", Function::kLogSigmoid, 1, 32},
    {"mish", Function::kMish, 1, 20},
    {"negative", Function::kNegative, 1, 1},
    {"reciprocal", Function::kReciprocal, 1, 2},
    {"round", Function::kRound, 1, 1},
    {"rsqrt", Function::kRsqrt, 1, 8},
    {"sigmoid", Function::kSigmoid, 1, 16},
    {"sign", Function::kSign, 1, 1},
    {"silu", Function::kSilu, 1, 16},
    {"sqrt", Function::kSqrt, 1, 8},
    {"square", Function::kSquare, 1, 1},
    {"tanh", Function::kTanh, 1, 16},
    {"trunc", Function::kTrunc, 1, 1},
    {"add", Function::kAdd, 2, 1},
    {"divide", Function::kDivide, 2, 2},
    {"elu", Function::kElu, 2, 12},
    {"equal", Function::kEqual, 2, 1},
    {"greater", Function::kGreater, 2, 1},
    {"greater_equal", Function::kGreaterEqual, 2, 1},
    {"maximum", Function::kMaximum, 2, 1},
    {"minimum", Function::kMinimum, 2, 1},
    {"multiply", Function::kMultiply, 2, 1},
    {"not_equal", Function::kNotEqual, 2, 1},
    {"prelu", Function::kPrelu, 2, 1},
    {"softplus", Function::kSoftplus, 2, 32},
    {"subtract", Function::kSubtract, 2, 1},
    {"add_product", Function::kAddProduct, 3, 1},
    {"clamp", Function::kClamp, 3, 1},
    {"where", Function::kWhere, 3, 1},
};

const NamedFunction& function_of(const std::string& name) {
  for (const NamedFunction& named : kFunctions) {
    if (name == named.name) return named;
  }
  fail("There is no function '" + name + "'.");
}

class ElementwiseStep : public Step {
 public:
  ElementwiseStep(Program& program, const Arguments& a)
      : function_(function_of(a.text("function"))),
        maps_(a.integers("maps", static_cast<size_t>(function_.operands))) {
    const std::vector<int64_t> sizes = a.integers("sizes");
    const std::vector<int64_t> strides = a.integers("strides", sizes.size() * maps_.size());
    const Span<const float> constants = a.optional_span<float>("constants");
    offsets_ = a.integers("offsets", maps_.size());
    require_range("number of sizes", static_cast<int64_t>(sizes.size()), 1, kMostDims - 1);
    require_optional("constants", constants, constants.size);
    constants_.assign(constants.data, constants.data + constants.size);
    places_.sizes = sizes;
    for (size_t o = 0; o < maps_.size(); ++o) {
      const auto from = strides.begin() + static_cast<std::ptrdiff_t>(o * sizes.size());
      places_.strides.emplace_back(from, from + static_cast<std::ptrdiff_t>(sizes.size()));
      const int64_t values =
          maps_[o] == kNoMap ? constants.size : program.floats(maps_[o]).values();
      require_places("an operand", sizes, places_.strides[o], offsets_[o], values);
      images_.push_back(maps_[o] == kNoMap ? 0 : values);
      if (maps_[o] != kNoMap) reads.push_back(maps_[o]);
    }
    values_ = 1;
    for (const int64_t size : sizes) values_ = checked_product("The map", {values_, size});
    out_ = program.add_map({1, 1, values_, false});
    writes = {out_};
    in_place = operand_in_place();
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    Dimensions places = places_;
    places.sizes.insert(places.sizes.begin(), shape.batch);
    for (size_t o = 0; o < maps_.size(); ++o) {
      places.strides[o].insert(places.strides[o].begin(), images_[o]);
    }
    places.join();
    ElementwiseCall call{};
    call.function = function_.function;
    call.operands = function_.operands;
    call.dims = static_cast<int32_t>(places.sizes.size());
    std::copy(places.sizes.begin(), places.sizes.end(), call.sizes);
    for (size_t o = 0; o < maps_.size(); ++o) {
      std::copy(places.strides[o].begin(), places.strides[o].end(), call.strides[o]);
    }
    const auto bind = [this](ElementwiseCall& c, void* const* maps) {
      for (size_t o = 0; o < maps_.size(); ++o) {
        const float* from =
            maps_[o] == kNoMap ? constants_.data() : static_cast<const float*>(maps[maps_[o]]);
        c.x[o] = from + offsets_[o];
      }
      c.out = static_cast<float*>(maps[out_]);
    };
    const int64_t values = checked_product("The map", {shape.batch, values_});
    return prepared_call(biper::kernels(), call, ranges_of(values, function_.values_each), 0, bind,
                         [](const auto& step, int64_t unit, void*) {
                           step.kernels.elementwise(step.call, step.ranges.first(unit),
                                                    step.ranges.last(unit));
                         });
  }

 private:
  // An operand that lies as the output does, of a map that no other operand reads elsewhere.
  int64_t operand_in_place() const {
    const auto lies_like_output = [this](size_t o) {
      int64_t stride = 1;
      for (size_t d = places_.sizes.size(); d-- > 0;) {
        if (places_.sizes[d] > 1 && places_.strides[o][d] != stride) return false;
        stride *= places_.sizes[d];
      }
      return offsets_[o] == 0 && images_[o] == values_;
    };
    for (size_t o = 0; o < maps_.size(); ++o) {
      if (maps_[o] == kNoMap || !lies_like_output(o)) continue;
      bool alone = true;
      for (size_t other = 0; other < maps_.size(); ++other) {
        alone = alone && (maps_[other] != maps_[o] || lies_like_output(other));
      }
      if (alone) return maps_[o];
    }
    return kNoMap;
  }

  const NamedFunction& function_;
  std::vector<int64_t> maps_, offsets_, images_;  // values of an image of each, 0: a constant
  Dimensions places_;
  std::vector<float> constants_;
  int64_t values_, out_;
};

}  // namespace

extern const StepKind kElementwiseStep;
const StepKind kElementwiseStep{"elementwise", &make_step<ElementwiseStep>};

}  // namespace biper
