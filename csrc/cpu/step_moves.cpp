// "rearrange", "join" and "constant": steps that only move numbers.
//
// "rearrange" writes a map whose dimensions have `sizes`, outermost first. The number at a place is
// that of `x` at the sum of one entry for each dimension: `places` has those of the first
// dimension, then those of the second, and so on. Where an entry is -1, the number is `fill`.
//
// "join" writes `count` times `lengths[i]` numbers of each of `maps`, one map after the other.
//
// "constant" writes `values`, for each image.
#include <algorithm>
#include <cstring>
#include <limits>

#include "dispatch.h"
#include "steps.h"

namespace biper {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostPlaces = 16;
// An entry that makes any sum of others negative.
constexpr int64_t kOutside = std::numeric_limits<int64_t>::min() / (2 * kMostPlaces);

// One dimension: the place that each of its positions adds, or the step between those of an even
// one.
struct Axis {
  int64_t size, stride;
  std::vector<int64_t> places;  // of one that is not even

  int64_t at(int64_t i) const {
    return places.empty() ? i * stride : places[static_cast<size_t>(i)];
  }
};

// Returns the axis with these places; adds to `base` where an even one begins.
Axis axis_of(const std::vector<int64_t>& places, int64_t& base) {
  const int64_t size = static_cast<int64_t>(places.size());
  const int64_t stride = size < 2 ? 0 : places[1] - places[0];
  for (size_t i = 0; i < places.size(); ++i) {
    const int64_t even = places[0] + static_cast<int64_t>(i) * stride;
    if (places[i] < 0 || places[i] != even) return {size, 0, places};
  }
  base += places[0];
  return {size, stride, {}};
}

// Joins even neighbours that lie as one dimension, so that runs are long.
void join(std::vector<Axis>& axes) {
  for (size_t outer = 0; outer + 1 < axes.size();) {
    const Axis a = axes[outer], b = axes[outer + 1];
    const bool even = a.places.empty() && b.places.empty();
    const auto at = axes.begin() + static_cast<std::ptrdiff_t>(outer);
    if (a.places.empty() && a.size == 1) {
      axes.erase(at);
    } else if (b.places.empty() && b.size == 1) {
      axes.erase(at + 1);
    } else if (even && a.stride == b.stride * b.size) {
      axes[outer + 1].size *= a.size;
      axes.erase(at);
    } else {
      ++outer;
    }
  }
}

struct RearrangeCall {
  const std::vector<Axis>* axes;
  int64_t base, in_values, out_values;
  float fill;
  const float* x;
  float* out;
};

// Writes `count` numbers of the innermost dimension, from `column` on.
void write_run(const Axis& inner, const RearrangeCall& call, const float* x, int64_t place,
               int64_t column, int64_t count, float* out) {
  if (place < 0) {
    std::fill(out, out + count, call.fill);
  } else if (!inner.places.empty()) {
    const int64_t* places = inner.places.data() + column;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = place + places[i];
      out[i] = at < 0 ? call.fill : x[at];
    }
  } else if (inner.stride == 1 || count == 1) {
    std::memcpy(out, x + place + column * inner.stride, static_cast<size_t>(count) * sizeof(float));
  } else {
    const float* from = x + place + column * inner.stride;
    for (int64_t i = 0; i < count; ++i) out[i] = from[i * inner.stride];
  }
}

// Writes the numbers [first, last) of one image.
void rearrange(const RearrangeCall& call, const float* x, int64_t first, int64_t last, float* out) {
  const std::vector<Axis>& axes = *call.axes;
  const size_t inner = axes.size() - 1;
  const int64_t length = axes[inner].size;
  int64_t index[kMostPlaces] = {};
  int64_t rest = first / length, column = first % length;
  for (size_t d = inner; d-- > 0;) {
    index[d] = rest % axes[d].size;
    rest /= axes[d].size;
  }
  while (first < last) {
    int64_t place = call.base;
    for (size_t d = 0; d < inner; ++d) place += axes[d].at(index[d]);
    const int64_t count = std::min(length - column, last - first);
    write_run(axes[inner], call, x, place, column, count, out);
    first += count;
    out += count;
    column = 0;
    for (size_t d = inner; d-- > 0;) {
      if (++index[d] < axes[d].size) break;
      index[d] = 0;
    }
  }
}

class RearrangeStep : public Step {
 public:
  RearrangeStep(Program& program, const Arguments& a)
      : x_(a.map("x")), in_values_(program.floats(x_).values()), fill_(a.number("fill", 0.0f)) {
    const std::vector<int64_t> sizes = a.integers("sizes");
    const std::vector<int64_t> places = a.integers("places");
    require_range("number of sizes", static_cast<int64_t>(sizes.size()), 1, kMostPlaces);
    int64_t last = 0;
    auto from = places.begin();
    for (const int64_t size : sizes) {
      require_range("size", size, 1, kMost);
      if (places.end() - from < size) fail("`places` has too few entries.");
      std::vector<int64_t> own(from, from + size);
      from += size;
      for (int64_t& place : own) {
        require_range("place", place, -1, kMost);
        if (place < 0) place = kOutside;
      }
      last += std::max<int64_t>(0, *std::max_element(own.begin(), own.end()));
      axes_.push_back(axis_of(own, base_));
      values_ = checked_product("The map", {values_, size});
    }
    if (from != places.end()) fail("`places` has too many entries.");
    require_range("the last place", last, 0, in_values_ - 1);
    join(axes_);
    out_ = program.add_map({1, 1, values_, false});
    reads = {x_};
    writes = {out_};
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    const RearrangeCall call{&axes_, base_, in_values_, values_, fill_, nullptr, nullptr};
    const auto bind = [this](RearrangeCall& c, void* const* maps) {
      c.x = static_cast<const float*>(maps[x_]);
      c.out = static_cast<float*>(maps[out_]);
    };
    const int64_t values = checked_product("The map", {shape.batch, values_});
    return prepared_call(
        biper::kernels(), call, ranges_of(values, axes_.back().stride == 1 ? 1 : 4), 0, bind,
        [](const auto& step, int64_t unit, void*) {
          const RearrangeCall& c = step.call;
          int64_t first = step.ranges.first(unit);
          const int64_t last = step.ranges.last(unit);
          while (first < last) {
            const int64_t image = first / c.out_values, start = image * c.out_values;
            const int64_t end = std::min(last, start + c.out_values);
            rearrange(c, c.x + image * c.in_values, first - start, end - start, c.out + first);
            first = end;
          }
        });
  }

 private:
  int64_t x_, in_values_;
  float fill_;
  std::vector<Axis> axes_;
  int64_t base_ = 0, values_ = 1, out_;
};

struct JoinCall {
  const std::vector<int64_t>* lengths;
  int64_t length;  // the sum of those
  std::vector<const float*> maps;
  float* out;
};

class JoinStep : public Step {
 public:
  JoinStep(Program& program, const Arguments& a)
      : maps_(a.integers("maps")),
        lengths_(a.integers("lengths", maps_.size())),
        count_(a.integer("count")) {
    if (maps_.empty()) fail("`maps` is empty.");
    require_range("count", count_, 1, kMost);
    for (size_t i = 0; i < maps_.size(); ++i) {
      require_range("length", lengths_[i], 1, kMost);
      const int64_t wanted = checked_product("The map", {count_, lengths_[i]});
      if (program.floats(maps_[i]).values() != wanted) {
        fail("Map " + std::to_string(maps_[i]) + " has another number of values than " +
             std::to_string(wanted) + ".");
      }
      length_ += lengths_[i];
    }
    out_ = program.add_map({1, count_, length_, false});
    reads = maps_;
    writes = {out_};
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    const auto bind = [this](JoinCall& c, void* const* maps) {
      c.maps.clear();
      for (const int64_t map : maps_) c.maps.push_back(static_cast<const float*>(maps[map]));
      c.out = static_cast<float*>(maps[out_]);
    };
    const int64_t rows = checked_product("The map", {shape.batch, count_});
    return prepared_call(
        biper::kernels(), JoinCall{&lengths_, length_, {}, nullptr}, ranges_of(rows, length_), 0,
        bind, [](const auto& step, int64_t unit, void*) {
          const JoinCall& c = step.call;
          for (int64_t row = step.ranges.first(unit); row < step.ranges.last(unit); ++row) {
            float* out = c.out + row * c.length;
            for (size_t i = 0; i < c.maps.size(); ++i) {
              const int64_t length = (*c.lengths)[i];
              std::memcpy(out, c.maps[i] + row * length,
                          static_cast<size_t>(length) * sizeof(float));
              out += length;
            }
          }
        });
  }

 private:
  std::vector<int64_t> maps_, lengths_;
  int64_t count_, length_ = 0, out_;
};

struct ConstantCall {
  const std::vector<float>* values;
  float* out;
};

class ConstantStep : public Step {
 public:
  ConstantStep(Program& program, const Arguments& a) {
    const Span<const float> values = a.span<float>("values");
    require_range("number of values", values.size, 1, kMost);
    require_optional("values", values, values.size);
    values_.assign(values.data, values.data + values.size);
    out_ = program.add_map({1, 1, values.size, false});
    writes = {out_};
  }

  std::unique_ptr<PreparedStep> prepare(const CallShape& shape) const override {
    const auto bind = [this](ConstantCall& c, void* const* maps) {
      c.out = static_cast<float*>(maps[out_]);
    };
    const Ranges images = ranges_of(shape.batch, static_cast<int64_t>(values_.size()));
    return prepared_call(biper::kernels(), ConstantCall{&values_, nullptr}, images, 0, bind,
                         [](const auto& step, int64_t unit, void*) {
                           const std::vector<float>& from = *step.call.values;
                           for (int64_t n = step.ranges.first(unit); n < step.ranges.last(unit);
                                ++n) {
                             std::copy(from.begin(), from.end(),
                                       step.call.out + n * static_cast<int64_t>(from.size()));
                           }
                         });
  }

 private:
  std::vector<float> values_;
  int64_t out_;
};

}  // namespace

extern const StepKind kRearrangeStep, kJoinStep, kConstantStep;
const StepKind kRearrangeStep{"rearrange", &make_step<RearrangeStep>};
const StepKind kJoinStep{"join", &make_step<JoinStep>};
const StepKind kConstantStep{"constant", &make_step<ConstantStep>};

}  // namespace biper
