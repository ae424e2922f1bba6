#include "steps.h"

#include <algorithm>

#include "dispatch.h"

namespace biper {
namespace {

// Values of work, some 10 us, below which a unit of its own costs more than it brings.
constexpr int64_t kValuesPerUnit = int64_t{1} << 15;

Ranges ranges_of(int64_t count, int64_t values_each) {
  return {count, std::max<int64_t>(1, kValuesPerUnit / std::max<int64_t>(values_each, 1))};
}

void* map_or_null(void* const* maps, int64_t map) { return map == kNoMap ? nullptr : maps[map]; }

std::vector<int64_t> wanted(std::initializer_list<int64_t> maps) {
  std::vector<int64_t> found;
  for (const int64_t map : maps) {
    if (map != kNoMap) found.push_back(map);
  }
  return found;
}

// A ready step whose call structure `Call` is run by `Run(kernels, call, unit, scratch)`.
template <class Call, class Bind>
class ReadyCall : public ReadyStep {
 public:
  using Run = void (*)(const ReadyCall& step, int64_t unit, void* scratch);

  ReadyCall(const Kernels& kernels, Call call, Ranges ranges, Bind bind, Run run)
      : kernels(kernels), call(call), ranges(ranges), bind_(bind), run_(run) {
    job.context = this;
    job.units = ranges.units();
    job.run = [](const void* context, int64_t unit, void* scratch) {
      const ReadyCall* step = static_cast<const ReadyCall*>(context);
      step->run_(*step, unit, scratch);
    };
  }

  void bind(void* const* maps) override { bind_(call, maps); }

  const Kernels& kernels;
  Call call;
  const Ranges ranges;

 private:
  Bind bind_;
  Run run_;
};

template <class Call, class Bind>
std::unique_ptr<ReadyStep> ready_call(const Kernels& kernels, const Call& call, Ranges ranges,
                                      int64_t scratch_bytes, Bind bind,
                                      typename ReadyCall<Call, Bind>::Run run) {
  auto step = std::make_unique<ReadyCall<Call, Bind>>(kernels, call, ranges, bind, run);
  step->job.scratch_bytes = static_cast<size_t>(scratch_bytes);
  return step;
}

class ConvStep : public Step {
 public:
  ConvStep(std::shared_ptr<const Conv> conv, const MapShape& in, int64_t bits, int64_t residual,
           int64_t out_float, int64_t out_bits)
      : conv_(std::move(conv)),
        in_(in),
        bits_(bits),
        residual_(residual),
        out_float_(out_float),
        out_bits_(out_bits) {
    reads = wanted({bits, residual});
    writes = wanted({out_float, out_bits});
    if (out_float != kNoMap) in_place = residual;  // each value is read, then written
  }

  std::unique_ptr<ReadyStep> ready(const Setting& setting) const override {
    ConvPlan plan = conv_->plan_for(setting.batch, in_.height, in_.width, false);
    conv_->prepare(plan, setting.threads);
    plan.residual_type = FloatType::kFloat32;
    plan.out_type = FloatType::kFloat32;
    const auto bind = [this](ConvPlan& p, void* const* maps) {
      p.bits = static_cast<const uint32_t*>(maps[bits_]);
      p.residual = map_or_null(maps, residual_);
      p.out_float = map_or_null(maps, out_float_);
      p.out_bits = static_cast<uint32_t*>(map_or_null(maps, out_bits_));
    };
    return ready_call(conv_->kernels(), plan, {plan.units, 1}, plan.scratch.bytes, bind,
                      [](const auto& step, int64_t unit, void* scratch) {
                        step.kernels.conv_unit(step.call, unit, scratch);
                      });
  }

 private:
  std::shared_ptr<const Conv> conv_;
  MapShape in_;
  int64_t bits_, residual_, out_float_, out_bits_;
};

class FloatConvStep : public Step {
 public:
  FloatConvStep(std::shared_ptr<const FloatConv> conv, const MapShape& in, int64_t x,
                int64_t out_float, int64_t out_bits)
      : conv_(std::move(conv)), in_(in), x_(x), out_float_(out_float), out_bits_(out_bits) {
    reads = {x};
    writes = wanted({out_float, out_bits});
  }

  bool takes_planar() const override { return true; }

  std::unique_ptr<ReadyStep> ready(const Setting& setting) const override {
    int64_t batch = setting.batch, height = in_.height, width = in_.width;
    const bool planar = setting.planar[static_cast<size_t>(x_)];
    if (is_pointwise() && !planar) {  // all pixels are alike: one image of them
      height = checked_product("The map", {batch, height, width});
      batch = width = 1;
    }
    FloatConvPlan plan = conv_->plan_for(batch, std::max<int64_t>(height, 1), width, planar,
                                         out_bits_ != kNoMap, setting.threads);
    const auto bind = [this](FloatConvPlan& p, void* const* maps) {
      p.x = static_cast<const float*>(maps[x_]);
      p.out_float = static_cast<float*>(map_or_null(maps, out_float_));
      p.out_bits = static_cast<uint32_t*>(map_or_null(maps, out_bits_));
    };
    return ready_call(conv_->kernels(), plan, {plan.units, 1}, plan.scratch.bytes, bind,
                      [](const auto& step, int64_t unit, void* scratch) {
                        step.kernels.float_conv_unit(step.call, unit, scratch);
                      });
  }

 private:
  bool is_pointwise() const {
    const ConvGeometry& g = conv_->geometry();
    return g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 &&
           g.pad_top + g.pad_bottom + g.pad_left + g.pad_right == 0 && !conv_->pooled();
  }

  std::shared_ptr<const FloatConv> conv_;
  MapShape in_;
  int64_t x_, out_float_, out_bits_;
};

class BinarizeStep : public Step {
 public:
  BinarizeStep(const MapShape& in, int64_t x, Span<const float> threshold,
               Span<const uint8_t> sense, int64_t out)
      : in_(in), x_(x), out_(out), sense_(pack_flags(sense)) {
    threshold_.assign(threshold.data, threshold.data + threshold.size);
    if (sense.data == nullptr) sense_.clear();
    reads = {x};
    writes = {out};
  }

  std::unique_ptr<ReadyStep> ready(const Setting& setting) const override {
    BinarizeCall call{};
    call.type = FloatType::kFloat32;
    call.channels = in_.channels;
    call.threshold = threshold_.empty() ? nullptr : threshold_.data();
    call.sense = sense_.empty() ? nullptr : sense_.data();
    const int64_t pixels = checked_product("The map", {setting.batch, in_.height, in_.width});
    const auto bind = [this](BinarizeCall& c, void* const* maps) {
      c.x = maps[x_];
      c.bits = static_cast<uint32_t*>(maps[out_]);
    };
    return ready_call(biper::kernels(), call, ranges_of(pixels, in_.channels), 0, bind,
                      [](const auto& step, int64_t unit, void*) {
                        step.kernels.binarize(step.call, step.ranges.first(unit),
                                              step.ranges.last(unit));
                      });
  }

 private:
  MapShape in_;
  int64_t x_, out_;
  std::vector<float> threshold_;
  std::vector<uint32_t> sense_;
};

class BitPoolStep : public Step {
 public:
  BitPoolStep(const MapShape& in, const MapShape& shape, int64_t bits, const Window& window,
              Span<const uint8_t> take_and, int64_t out)
      : bits_(bits), out_(out), take_and_(pack_flags(take_and)) {
    if (take_and.data == nullptr) take_and_.clear();
    call_ = {nullptr,
             in.height,
             in.width,
             in.channels,
             (in.channels + kWordBits - 1) / kWordBits,
             window,
             shape.height,
             shape.width,
             take_and_.empty() ? nullptr : take_and_.data(),
             nullptr};
    reads = {bits};
    writes = {out};
  }

  std::unique_ptr<ReadyStep> ready(const Setting& setting) const override {
    const int64_t rows = checked_product("The map", {setting.batch, call_.out_h});
    const auto bind = [this](PoolCall& c, void* const* maps) {
      c.bits = static_cast<const uint32_t*>(maps[bits_]);
      c.out = static_cast<uint32_t*>(maps[out_]);
    };
    return ready_call(biper::kernels(), call_, ranges_of(rows, call_.channels * call_.out_w), 0,
                      bind, [](const auto& step, int64_t unit, void*) {
                        for (int64_t r = step.ranges.first(unit); r < step.ranges.last(unit); ++r) {
                          step.kernels.maxpool_row(step.call, r);
                        }
                      });
  }

 private:
  int64_t bits_, out_;
  std::vector<uint32_t> take_and_;
  PoolCall call_;
};

class FloatPoolStep : public Step {
 public:
  FloatPoolStep(const FloatPoolCall& call, int64_t x, int64_t out, bool average)
      : call_(call), x_(x), out_(out), average_(average) {
    reads = {x};
    writes = {out};
  }

  std::unique_ptr<ReadyStep> ready(const Setting& setting) const override {
    const int64_t rows = checked_product("The map", {setting.batch, call_.out_h});
    const int64_t work = call_.window.kernel_h * call_.window.kernel_w * call_.channels;
    const auto bind = [this](FloatPoolCall& c, void* const* maps) {
      c.x = static_cast<const float*>(maps[x_]);
      c.out = static_cast<float*>(maps[out_]);
    };
    const auto average = [](const auto& step, int64_t unit, void*) {
      for (int64_t r = step.ranges.first(unit); r < step.ranges.last(unit); ++r) {
        step.kernels.average_row(step.call, r);
      }
    };
    const auto maximum = [](const auto& step, int64_t unit, void*) {
      for (int64_t r = step.ranges.first(unit); r < step.ranges.last(unit); ++r) {
        step.kernels.maximum_row(step.call, r);
      }
    };
    const Ranges ranges = ranges_of(rows, call_.out_w * work);
    const Kernels& isa = biper::kernels();
    return average_ ? ready_call(isa, call_, ranges, 0, bind, average)
                    : ready_call(isa, call_, ranges, 0, bind, maximum);
  }

 private:
  FloatPoolCall call_;
  int64_t x_, out_;
  bool average_;
};

class SumStep : public Step {
 public:
  SumStep(const MapShape& shape, int64_t a, int64_t b, float clamp_min, float clamp_max,
          int64_t out)
      : values_(shape.values()), a_(a), b_(b), out_(out), low_(clamp_min), high_(clamp_max) {
    reads = wanted({a, b});
    writes = {out};
    in_place = a;
  }

  std::unique_ptr<ReadyStep> ready(const Setting& setting) const override {
    const int64_t values = checked_product("The map", {setting.batch, values_});
    const auto bind = [this](SumCall& c, void* const* maps) {
      c.a = static_cast<const float*>(maps[a_]);
      c.b = static_cast<const float*>(map_or_null(maps, b_));
      c.out = static_cast<float*>(maps[out_]);
    };
    return ready_call(biper::kernels(), SumCall{nullptr, nullptr, low_, high_, nullptr},
                      ranges_of(values, 1), 0, bind, [](const auto& step, int64_t unit, void*) {
                        step.kernels.sum(step.call, step.ranges.first(unit),
                                         step.ranges.last(unit));
                      });
  }

 private:
  int64_t values_, a_, b_, out_;
  float low_, high_;
};

}  // namespace

std::unique_ptr<Step> conv_step(std::shared_ptr<const Conv> conv, const MapShape& in, int64_t bits,
                                int64_t residual, int64_t out_float, int64_t out_bits) {
  return std::make_unique<ConvStep>(std::move(conv), in, bits, residual, out_float, out_bits);
}

std::unique_ptr<Step> float_conv_step(std::shared_ptr<const FloatConv> conv, const MapShape& in,
                                      int64_t x, int64_t out_float, int64_t out_bits) {
  return std::make_unique<FloatConvStep>(std::move(conv), in, x, out_float, out_bits);
}

std::unique_ptr<Step> binarize_step(const MapShape& in, int64_t x, Span<const float> threshold,
                                    Span<const uint8_t> sense, int64_t out) {
  return std::make_unique<BinarizeStep>(in, x, threshold, sense, out);
}

std::unique_ptr<Step> bit_pool_step(const MapShape& in, const MapShape& shape, int64_t bits,
                                    const Window& window, Span<const uint8_t> take_and,
                                    int64_t out) {
  return std::make_unique<BitPoolStep>(in, shape, bits, window, take_and, out);
}

std::unique_ptr<Step> average_step(const FloatPoolCall& call, int64_t x, int64_t out) {
  return std::make_unique<FloatPoolStep>(call, x, out, true);
}

std::unique_ptr<Step> maximum_step(const FloatPoolCall& call, int64_t x, int64_t out) {
  return std::make_unique<FloatPoolStep>(call, x, out, false);
}

std::unique_ptr<Step> sum_step(const MapShape& shape, int64_t a, int64_t b, float clamp_min,
                               float clamp_max, int64_t out) {
  return std::make_unique<SumStep>(shape, a, b, clamp_min, clamp_max, out);
}

}  // namespace biper
