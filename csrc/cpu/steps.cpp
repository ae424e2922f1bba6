#include "steps.h"

#include <algorithm>

namespace biper {

extern const StepKind kConvStep, kFloatConvStep, kBinarizeStep, kUnbinarizeStep, kBitPoolStep,
    kAverageStep, kMaximumStep, kSumStep, kElementwiseStep, kRowsStep, kMatmulStep, kDepthwiseStep,
    kRearrangeStep, kJoinStep, kConstantStep, kBitMatmulStep, kWeightLinearStep, kEmbeddingStep,
    kIntegersStep;

namespace {

const StepKind* const kKinds[] = {
    &kConvStep,      &kFloatConvStep,    &kBinarizeStep,  &kUnbinarizeStep,  &kBitPoolStep,
    &kAverageStep,   &kMaximumStep,      &kSumStep,       &kElementwiseStep, &kRowsStep,
    &kMatmulStep,    &kDepthwiseStep,    &kRearrangeStep, &kJoinStep,        &kConstantStep,
    &kBitMatmulStep, &kWeightLinearStep, &kEmbeddingStep, &kIntegersStep,
};

// Values of work, some 10 us, below which a unit of its own costs more than it brings.
constexpr int64_t kValuesPerUnit = int64_t{1} << 15;

}  // namespace

std::vector<int64_t> add_step(Program& program, const std::string& name,
                              const Arguments& arguments) {
  for (const StepKind* kind : kKinds) {
    if (kind->name != name) continue;
    std::unique_ptr<Step> step = kind->make(program, arguments);
    arguments.require_all_read();
    std::vector<int64_t> written = step->writes;
    program.add(std::move(step));
    return written;
  }
  fail("There is no step '" + name + "'.");
}

void require_shape(const char* name, const MapShape& shape, int64_t height, int64_t width,
                   int64_t channels) {
  if (shape.height == height && shape.width == width && shape.channels == channels) return;
  const auto text = [](int64_t h, int64_t w, int64_t c) {
    return std::to_string(h) + "x" + std::to_string(w) + "x" + std::to_string(c);
  };
  fail(std::string("`") + name + "` is " + text(shape.height, shape.width, shape.channels) +
       ", wanted " + text(height, width, channels) + " (height, width, channels).");
}

std::vector<int64_t> wanted_maps(std::initializer_list<int64_t> maps) {
  std::vector<int64_t> found;
  std::copy_if(maps.begin(), maps.end(), std::back_inserter(found),
               [](int64_t map) { return map != kNoMap; });
  return found;
}

Ranges ranges_of(int64_t count, int64_t values_each) {
  return {count, std::max<int64_t>(1, kValuesPerUnit / std::max<int64_t>(values_each, 1))};
}

}  // namespace biper
