// "average" and "maximum": pools of the float map `x` with the window `pool` at `size` places,
// height and width, which `ceil_mode` of PyTorch decides. Without `pool`, the windows share the map
// as those of PyTorch's adaptive pools do.
//
// An average is divided by `divisor`, or where that is 0 or missing by the window with its padding
// (`count_padding`) or by the values of the map in it; `channels_before` and `channels_after` zero
// channels are added around it. Padding never wins a maximum.
#include <algorithm>
#include <limits>

#include "dispatch.h"
#include "steps.h"

namespace biper {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

// Every window must have a value of the map in it, or its mean would be 0 / 0.
void require_windows(const char* axis, int64_t size, int64_t out, int64_t kernel, int64_t stride,
                     int64_t pad) {
  require_range("stride", stride, 1, kMost);
  require_range("kernel_size", kernel, 1, kMost);
  require_range("padding", pad, 0, kernel / 2);
  require_range("size", out, 1, kMost);
  if ((out - 1) * stride - pad >= size) {
    fail(std::string("The last window along the ") + axis + " lies outside of the map.");
  }
}

// The call of a pool, all but its addresses and what is an average's alone.
FloatPoolCall pool_call(const MapShape& in, const Arguments& a) {
  FloatPoolCall call{};
  call.adaptive = !a.has("pool");
  if (!call.adaptive) call.window = a.window("pool");
  const std::vector<int64_t> size = a.integers("size", 2);
  call.height = in.height;
  call.width = in.width;
  call.channels = call.out_channels = in.channels;
  call.out_h = size[0];
  call.out_w = size[1];
  if (call.adaptive) {
    require_range("size", size[0], 1, kMost);
    require_range("size", size[1], 1, kMost);
    call.window = {in.height / size[0] + 1, in.width / size[1] + 1, 1, 1, 0, 0};  // at most
    return call;
  }
  const Window& w = call.window;
  require_windows("height", in.height, size[0], w.kernel_h, w.stride_h, w.pad_h);
  require_windows("width", in.width, size[1], w.kernel_w, w.stride_w, w.pad_w);
  return call;
}

// A pool whose rows a kernel of the table makes.
template <void (*Kernels::*kRow)(const FloatPoolCall&, int64_t)>
class FloatPoolStep : public Step {
 public:
  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    const int64_t rows = checked_product("The map", {shape.batch, call_.out_h});
    const int64_t work = std::min(call_.window.kernel_h, call_.height) *
                         std::min(call_.window.kernel_w, call_.width) * call_.channels;
    const auto bind = [this](FloatPoolCall& c, void* const* maps) {
      c.x = static_cast<const float*>(maps[x_]);
      c.out = static_cast<float*>(maps[out_]);
    };
    return prepared_call(biper::kernels(), call_, ranges_of(rows, call_.out_w * work), 0, bind,
                         [](const auto& step, int64_t unit, void*) {
                           const int64_t last = step.ranges.last(unit);
                           for (int64_t r = step.ranges.first(unit); r < last; ++r) {
                             (step.kernels.*kRow)(step.call, r);
                           }
                         });
  }

 protected:
  FloatPoolStep(Program& program, const Arguments& a)
      : x_(a.map("x")), call_(pool_call(program.floats(x_), a)) {
    reads = {x_};
  }

  void write_to(Program& program) {
    out_ = program.add_map({call_.out_h, call_.out_w, call_.out_channels, false});
    writes = {out_};
  }

  int64_t x_, out_ = kNoMap;
  FloatPoolCall call_;
};

class AverageStep : public FloatPoolStep<&Kernels::average_row> {
 public:
  AverageStep(Program& program, const Arguments& a) : FloatPoolStep(program, a) {
    const int64_t before = a.integer("channels_before", 0), after = a.integer("channels_after", 0);
    call_.count_padding = a.flag("count_padding", true);
    call_.divisor = a.integer("divisor", 0);
    require_range("divisor", call_.divisor, 0, kMost);
    require_range("channels_before", before, 0, kMost);
    require_range("channels_after", after, 0, kMost);
    call_.first_channel = before;
    call_.out_channels = before + call_.channels + after;
    write_to(program);
  }
};

class MaximumStep : public FloatPoolStep<&Kernels::maximum_row> {
 public:
  MaximumStep(Program& program, const Arguments& a) : FloatPoolStep(program, a) {
    write_to(program);
  }
};

}  // namespace

extern const StepKind kAverageStep, kMaximumStep;
const StepKind kAverageStep{"average", &make_step<AverageStep>};
const StepKind kMaximumStep{"maximum", &make_step<MaximumStep>};

}  // namespace biper
