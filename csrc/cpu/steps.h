// The kinds of step, and what their files share.
//
// A file step_*.cpp has all of a kind but its kernels: how its arguments are checked, which maps it
// writes, and how it makes itself ready for a batch. To add one, write such a file and name the
// kind in steps.cpp.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "arguments.h"
#include "program.h"

namespace biper {

struct StepKind {
  const char* name;
  // Checks the arguments and adds the maps that the step writes.
  std::unique_ptr<Step> (*make)(Program& program, const Arguments& arguments);
};

template <class Kind>
std::unique_ptr<Step> make_step(Program& program, const Arguments& arguments) {
  return std::make_unique<Kind>(program, arguments);
}

// Adds a step of the kind `name` to a program; returns the maps that it writes.
std::vector<int64_t> add_step(Program& program, const std::string& name,
                              const Arguments& arguments);

// A convolution with the epilogue that the arguments name as biper_engine/ops/epilogue.py does.
std::shared_ptr<Conv> fused_conv(const Arguments& arguments, Span<const uint32_t> prepacked);

// -- shared by step_*.cpp -------------------------------------------------------------------------

void require_shape(const char* name, const MapShape& shape, int64_t height, int64_t width,
                   int64_t channels);

// Throws unless an optional span is empty or has `wanted` elements.
template <class T>
void require_optional(const char* name, const Span<T>& span, int64_t wanted) {
  if (span.data == nullptr && span.size == 0) return;
  require_memory(name, span.data, span.size, wanted, sizeof(T));
}

// Those of `maps` that are there.
std::vector<int64_t> wanted_maps(std::initializer_list<int64_t> maps);

inline void* map_or_null(void* const* maps, int64_t map) {
  return map == kNoMap ? nullptr : maps[map];
}

// Units of whole rows or ranges of values, for up to `threads` threads.
struct Ranges {
  int64_t count, step;

  int64_t units() const { return (count + step - 1) / step; }
  int64_t first(int64_t unit) const { return unit * step; }
  int64_t last(int64_t unit) const { return std::min(count, (unit + 1) * step); }
};

// Cuts `count` items, each worth `values_each` values of work, into units that are worth a thread.
Ranges ranges_of(int64_t count, int64_t values_each);

// A prepared step whose call structure `Call` is run by `Run(step, unit, scratch)`.
template <class Call, class Bind>
class PreparedCall : public PreparedStep {
 public:
  using Run = void (*)(const PreparedCall& step, int64_t unit, void* scratch);

  PreparedCall(const Kernels& kernels, Call call, Ranges ranges, Bind bind, Run run)
      : kernels(kernels), call(call), ranges(ranges), bind_(bind), run_(run) {
    job.context = this;
    job.units = ranges.units();
    job.run = [](const void* context, int64_t unit, void* scratch) {
      const PreparedCall* step = static_cast<const PreparedCall*>(context);
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
std::unique_ptr<PreparedStep> prepared_call(const Kernels& kernels, const Call& call, Ranges ranges,
                                            int64_t scratch_bytes, Bind bind,
                                            typename PreparedCall<Call, Bind>::Run run) {
  auto step = std::make_unique<PreparedCall<Call, Bind>>(kernels, call, ranges, bind, run);
  step->job.scratch_bytes = static_cast<size_t>(scratch_bytes);
  return step;
}

}  // namespace biper
