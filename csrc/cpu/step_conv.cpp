// "conv": a binary convolution with its epilogue.
//
// Reads `bits`, and `residual` and `gate`, which may be missing. A residual may have a part of the
// output's channels, which then repeats. A gate has a pixel for as many output pixels as any other
// of its pixels, in the same order, and one channel or those of the output. Writes the epilogue's
// float map where `want_float`, then its bits where `want_bits`. The step re-lays the canonical
// `weight`, [O, KH, KW, words], for the kernels in use, in memory of its own.
#include <cstdlib>
#include <limits>
#include <new>

#include "steps.h"

namespace biper {

std::shared_ptr<Conv> fused_conv(const Arguments& a, Span<const uint32_t> prepacked) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EpilogueSpans epilogue;
  for (size_t i = 0; i < std::size(kEpilogueVectors); ++i) {
    epilogue.vectors[i] = a.optional_span<float>(kEpilogueVectors[i].name);
  }
  epilogue.sense = a.optional_span<uint8_t>("sense");
  epilogue.pool_min = a.optional_span<uint8_t>("pool_min");
  epilogue.clamp_min = a.number("clamp_min", -kInfinity);
  epilogue.clamp_max = a.number("clamp_max", kInfinity);
  return std::make_shared<Conv>(a.geometry("geometry"), prepacked, a.window("pool"), epilogue);
}

namespace {

// Prepacked weights in aligned memory, so that kernels load whole cache lines.
class Prepacked {
 public:
  Prepacked(const ConvGeometry& geometry, Span<const uint32_t> weight) {
    require_weight(geometry, weight);  // the memory below is then no more than some times as large
    size_ = prepacked_words(geometry);
    const size_t bytes = (static_cast<size_t>(size_) * 4 + kLine - 1) / kLine * kLine;
    words_.reset(static_cast<uint32_t*>(std::aligned_alloc(kLine, bytes)));
    if (!words_) throw std::bad_alloc();
    prepack(geometry, weight, {words_.get(), size_});
  }

  Span<const uint32_t> span() const { return {words_.get(), size_}; }

 private:
  static constexpr size_t kLine = 64;
  std::unique_ptr<uint32_t, void (*)(void*)> words_{nullptr, std::free};
  int64_t size_ = 0;
};

class ConvStep : public Step {
 public:
  ConvStep(Program& program, const Arguments& a)
      : prepacked_(a.geometry("geometry"), a.span<uint32_t>("weight")),
        conv_(fused_conv(a, prepacked_.span())),
        bits_(a.map("bits")),
        residual_(a.optional_map("residual")),
        gate_(a.optional_map("gate")),
        in_(program.bits(bits_)) {
    const bool want_float = a.flag("want_float"), want_bits = a.flag("want_bits");
    const int64_t outputs = conv_->geometry().out_channels;
    require_shape("bits", in_, in_.height, in_.width, conv_->geometry().in_channels);
    const ConvPlan plan = conv_->plan_for(1, in_.height, in_.width, false);
    if (residual_ != kNoMap) {
      const int64_t channels = program.floats(residual_).channels;
      require_shape("residual", program.floats(residual_), plan.out_h, plan.out_w, channels);
      if (channels != outputs &&
          (outputs % channels != 0 || channels % kWordBits != 0 || conv_->geometry().groups != 1)) {
        fail("`residual` has " + std::to_string(channels) +
             " channels, but the channels of the output, or a part of them that repeats, are " +
             "wanted.");
      }
      residual_channels_ = channels;
    }
    if (gate_ != kNoMap) take_gate(program.floats(gate_), plan);
    if (gate_ == kNoMap && conv_->has_offset()) fail("`offset` is given, but there is no `gate`.");
    if (!want_float && !want_bits) fail("Nothing of this convolution leaves.");
    if (want_bits && !conv_->has_threshold()) fail("Bits leave, but there is no `threshold`.");
    const auto add_map = [&](bool packed) {
      return program.add_map({plan.out_h, plan.out_w, outputs, packed});
    };
    if (want_float) out_float_ = add_map(false);
    if (want_bits) out_bits_ = add_map(true);
    reads = wanted_maps({bits_, residual_, gate_});
    writes = wanted_maps({out_float_, out_bits_});
    // Each value is read, then written.
    if (want_float && residual_channels_ == outputs) in_place = residual_;
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    ConvPlan plan = conv_->plan_for(shape.batch, in_.height, in_.width, false);
    conv_->prepare(plan, shape.threads);
    plan.residual_type = FloatType::kFloat32;
    if (residual_ != kNoMap) plan.residual_channels = residual_channels_;
    plan.out_type = FloatType::kFloat32;
    plan.gate_channels = gate_channels_;
    plan.gate_pixels = gate_pixels_;
    const auto bind = [this](ConvPlan& p, void* const* maps) {
      p.bits = static_cast<const uint32_t*>(maps[bits_]);
      p.residual = map_or_null(maps, residual_);
      p.gate = static_cast<const float*>(map_or_null(maps, gate_));
      p.out_float = map_or_null(maps, out_float_);
      p.out_bits = static_cast<uint32_t*>(map_or_null(maps, out_bits_));
    };
    return prepared_call(conv_->kernels(), plan, {plan.units, 1}, plan.scratch.bytes, bind,
                         [](const auto& step, int64_t unit, void* scratch) {
                           step.call.kernels->conv_unit(step.call, unit, scratch);
                         });
  }

 private:
  void take_gate(const MapShape& gate, const ConvPlan& plan) {
    const int64_t outputs = conv_->geometry().out_channels, pixels = plan.out_h * plan.out_w;
    const int64_t rows = gate.height * gate.width;
    if ((gate.channels != 1 && gate.channels != outputs) || pixels % rows != 0) {
      fail("`gate` has " + std::to_string(rows) + " pixels of " + std::to_string(gate.channels) +
           " channels, which do not fit an output of " + std::to_string(pixels) + " pixels of " +
           std::to_string(outputs) + " channels.");
    }
    gate_channels_ = gate.channels;
    gate_pixels_ = pixels / rows;
  }

  Prepacked prepacked_;
  std::shared_ptr<const Conv> conv_;
  int64_t bits_, residual_, gate_;
  int64_t gate_channels_ = 0, gate_pixels_ = 0, residual_channels_ = 0;
  MapShape in_;
  int64_t out_float_ = kNoMap, out_bits_ = kNoMap;
};

}  // namespace

extern const StepKind kConvStep;
const StepKind kConvStep{"conv", &make_step<ConvStep>};

}  // namespace biper
