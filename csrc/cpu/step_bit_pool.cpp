// "bit_pool": `biper::bmaxpool2d` of `bits` with the window `pool`. `take_and` may be missing.
#include "dispatch.h"
#include "steps.h"

namespace biper {
namespace {

class BitPoolStep : public Step {
 public:
  BitPoolStep(Program& program, const Arguments& a) : bits_(a.map("bits")) {
    const MapShape in = program.bits(bits_);
    const Window w = a.window("pool");
    require_window(w);
    const Span<const uint8_t> take_and = a.optional_span<uint8_t>("take_and");
    require_optional("take_and", take_and, in.channels);
    if (take_and.data != nullptr) take_and_ = pack_flags(take_and);
    const int64_t out_h =
        window_positions("A pool", in.height, w.kernel_h, w.stride_h, 2 * w.pad_h, 1);
    const int64_t out_w =
        window_positions("A pool", in.width, w.kernel_w, w.stride_w, 2 * w.pad_w, 1);
    call_ = {nullptr,
             in.height,
             in.width,
             in.channels,
             (in.channels + kWordBits - 1) / kWordBits,
             w,
             out_h,
             out_w,
             take_and_.empty() ? nullptr : take_and_.data(),
             nullptr};
    out_ = program.add_map({out_h, out_w, in.channels, true});
    reads = {bits_};
    writes = {out_};
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    const int64_t rows = checked_product("The map", {shape.batch, call_.out_h});
    const auto bind = [this](PoolCall& c, void* const* maps) {
      c.bits = static_cast<const uint32_t*>(maps[bits_]);
      c.out = static_cast<uint32_t*>(maps[out_]);
    };
    return prepared_call(biper::kernels(), call_, ranges_of(rows, call_.channels * call_.out_w), 0,
                         bind, [](const auto& step, int64_t unit, void*) {
                           const int64_t last = step.ranges.last(unit);
                           for (int64_t r = step.ranges.first(unit); r < last; ++r) {
                             step.kernels.maxpool_row(step.call, r);
                           }
                         });
  }

 private:
  int64_t bits_, out_;
  std::vector<uint32_t> take_and_;
  PoolCall call_;
};

}  // namespace

extern const StepKind kBitPoolStep;
const StepKind kBitPoolStep{"bit_pool", &make_step<BitPoolStep>};

}  // namespace biper
