// "matmul" and "depthwise_conv": products of float maps.
//
// "matmul" multiplies `count` matrices [rows, depth] of the map `a` with as many [depth, columns]
// of the map `b`, each without gaps, one after the other.
//
// "depthwise_conv" convolves each channel of `x` with its own filter: `weight` is [KH, KW, C], and
// `geometry` has as many groups and outputs as channels. `bias` may be missing. The step copies
// both.
#include <limits>

#include "dispatch.h"
#include "steps.h"

namespace biper {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

class MatmulStep : public Step {
 public:
  MatmulStep(Program& program, const Arguments& a)
      : a_(a.map("a")), b_(a.map("b")), count_(a.integer("count")) {
    call_.rows = a.integer("rows");
    call_.columns = a.integer("columns");
    call_.depth = a.integer("depth");
    for (const int64_t size : {count_, call_.rows, call_.columns, call_.depth}) {
      require_range("size of a matrix", size, 1, kMost);
    }
    const auto require_values = [&](const char* name, int64_t map, int64_t height, int64_t width) {
      if (program.floats(map).values() == checked_product("A matrix", {count_, height, width}))
        return;
      fail("`" + std::string(name) + "` has not " + std::to_string(count_) + " matrices of " +
           std::to_string(height) + "x" + std::to_string(width) + ".");
    };
    require_values("a", a_, call_.rows, call_.depth);
    require_values("b", b_, call_.depth, call_.columns);
    const int64_t rows = checked_product("The map", {count_, call_.rows});
    out_ = program.add_map({1, rows, call_.columns, false});
    reads = {a_, b_};
    writes = {out_};
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    const auto bind = [this](MatmulCall& c, void* const* maps) {
      c.a = static_cast<const float*>(maps[a_]);
      c.b = static_cast<const float*>(maps[b_]);
      c.out = static_cast<float*>(maps[out_]);
    };
    const int64_t rows = checked_product("The map", {shape.batch, count_, call_.rows});
    const int64_t work = checked_product("A row", {call_.columns, call_.depth}) / 4 + 1;
    return prepared_call(biper::kernels(), call_, ranges_of(rows, work), 0, bind,
                         [](const auto& step, int64_t unit, void*) {
                           step.kernels.matmul_rows(step.call, step.ranges.first(unit),
                                                    step.ranges.last(unit));
                         });
  }

 private:
  int64_t a_, b_, count_, out_;
  MatmulCall call_{};
};

class DepthwiseStep : public Step {
 public:
  DepthwiseStep(Program& program, const Arguments& a) : x_(a.map("x")) {
    const MapShape& in = program.floats(x_);
    const ConvGeometry g = a.geometry("geometry");
    const Span<const float> weight = a.span<float>("weight");
    const Span<const float> bias = a.optional_span<float>("bias");
    require_geometry(g);
    if (g.groups != g.in_channels || g.out_channels != g.in_channels) {
      fail("`groups`, `in_channels` and `out_channels` must be the same.");
    }
    require_shape("x", in, in.height, in.width, g.in_channels);
    require_memory("weight", weight.data, weight.size,
                   checked_product("The weight", {g.kernel_h, g.kernel_w, g.in_channels}), 4);
    require_optional("bias", bias, g.in_channels);
    weight_.assign(weight.data, weight.data + weight.size);
    bias_.assign(static_cast<size_t>(g.in_channels), 0.0f);
    if (bias.data != nullptr) bias_.assign(bias.data, bias.data + bias.size);
    const int64_t out_h = window_positions("The kernel", in.height, g.kernel_h, g.stride_h,
                                           g.pad_top + g.pad_bottom, g.dilation_h);
    const int64_t out_w = window_positions("The kernel", in.width, g.kernel_w, g.stride_w,
                                           g.pad_left + g.pad_right, g.dilation_w);
    call_ = {in.height,  in.width,       g.in_channels, g.kernel_h,   g.kernel_w,   g.stride_h,
             g.stride_w, g.pad_top,      g.pad_left,    g.dilation_h, g.dilation_w, out_h,
             out_w,      weight_.data(), bias_.data(),  nullptr,      nullptr};
    out_ = program.add_map({out_h, out_w, g.in_channels, false});
    reads = {x_};
    writes = {out_};
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    const auto bind = [this](DepthwiseCall& c, void* const* maps) {
      c.x = static_cast<const float*>(maps[x_]);
      c.out = static_cast<float*>(maps[out_]);
    };
    const int64_t rows = checked_product("The map", {shape.batch, call_.out_h});
    const int64_t work =
        checked_product("A row", {call_.out_w, call_.channels, call_.kernel_h, call_.kernel_w});
    return prepared_call(biper::kernels(), call_, ranges_of(rows, work), 0, bind,
                         [](const auto& step, int64_t unit, void*) {
                           const int64_t last = step.ranges.last(unit);
                           for (int64_t r = step.ranges.first(unit); r < last; ++r) {
                             step.kernels.depthwise_row(step.call, r);
                           }
                         });
  }

 private:
  int64_t x_, out_;
  DepthwiseCall call_{};
  std::vector<float> weight_, bias_;
};

}  // namespace

extern const StepKind kMatmulStep, kDepthwiseStep;
const StepKind kMatmulStep{"matmul", &make_step<MatmulStep>};
const StepKind kDepthwiseStep{"depthwise_conv", &make_step<DepthwiseStep>};

}  // namespace biper
