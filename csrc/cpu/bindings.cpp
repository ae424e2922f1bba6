// The module biper_engine._cpu. Private to the package: biper_engine/ops/cpu.py is its only caller.
//
// Memory comes as (address, elements, type); what a call needs is checked against it, so that
// arguments that do not fit raise ValueError. The caller keeps the memory alive. Programs take
// tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "caller.h"
#include "conv.h"
#include "dispatch.h"
#include "maps.h"
#include "peak.h"
#include "program.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace biper {
namespace {

using Memory = std::tuple<uintptr_t, int64_t, int32_t>;
using OptionalMemory = std::optional<Memory>;
using GeometryValues = std::array<int64_t, 13>;
using WindowValues = std::array<int64_t, 6>;
using FloatMemory = std::tuple<uintptr_t, int64_t, int32_t>;

// Types of memory beside those of FloatType, as biper_engine/ops/native_arguments.py counts them.
constexpr int32_t kWords = 5, kFlags = 6;

template <class T>
constexpr int32_t type_of() {
  using Element = std::remove_const_t<T>;
  if (std::is_same_v<Element, float>) return static_cast<int32_t>(FloatType::kFloat32);
  return sizeof(Element) == 4 ? kWords : kFlags;
}

// Memory of another type may have fewer bytes than its elements would need.
template <class T>
Span<T> span(const Memory& memory) {
  const auto [address, size, type] = memory;
  if (type != type_of<T>()) {
    fail("Memory of type " + std::to_string(type) + " came, of type " +
         std::to_string(type_of<T>()) + " is wanted (1: float32, 5: int32, 6: bool).");
  }
  return {reinterpret_cast<T*>(address), size};
}

template <class T>
Span<T> span(const OptionalMemory& memory) {
  return memory ? span<T>(*memory) : Span<T>{};
}

FloatSpan float_span(const std::optional<FloatMemory>& memory) {
  if (!memory) return {};
  const auto [address, size, type] = *memory;
  require_range("type", type, 1, 3);
  return {reinterpret_cast<void*>(address), size, static_cast<FloatType>(type)};
}

ConvGeometry geometry(const GeometryValues& v) {
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12]};
}

Window window(const WindowValues& v) { return {v[0], v[1], v[2], v[3], v[4], v[5]}; }

std::shared_ptr<Conv> fused_conv(const GeometryValues& values, const Memory& prepacked,
                                 const WindowValues& pool, const Memory& multiplier,
                                 const Memory& bias, const OptionalMemory& slope,
                                 const OptionalMemory& shift, const OptionalMemory& threshold,
                                 const OptionalMemory& sense, const OptionalMemory& pool_min,
                                 std::optional<float> clamp_min, std::optional<float> clamp_max) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EpilogueSpans epilogue;
  epilogue.multiplier = span<const float>(multiplier);
  epilogue.bias = span<const float>(bias);
  epilogue.slope = span<const float>(slope);
  epilogue.shift = span<const float>(shift);
  epilogue.threshold = span<const float>(threshold);
  epilogue.sense = span<const uint8_t>(sense);
  epilogue.pool_min = span<const uint8_t>(pool_min);
  epilogue.clamp_min = clamp_min.value_or(-kInfinity);
  epilogue.clamp_max = clamp_max.value_or(kInfinity);
  return std::make_shared<Conv>(geometry(values), span<const uint32_t>(prepacked), window(pool),
                                epilogue);
}

MapShape map_shape(const std::tuple<int64_t, int64_t, int64_t, bool>& v) {
  return {std::get<0>(v), std::get<1>(v), std::get<2>(v), std::get<3>(v)};
}

float or_infinite(std::optional<float> limit, float sign) {
  return limit.value_or(sign * std::numeric_limits<float>::infinity());
}

std::shared_ptr<FloatConv> float_conv(const GeometryValues& values, const Memory& weight,
                                      const OptionalMemory& bias, const WindowValues& pool,
                                      std::optional<float> clamp_min,
                                      std::optional<float> clamp_max,
                                      const OptionalMemory& threshold,
                                      const OptionalMemory& sense) {
  const FloatEpilogue epilogue{window(pool), or_infinite(clamp_min, -1), or_infinite(clamp_max, 1),
                               span<const float>(threshold), span<const uint8_t>(sense)};
  return std::make_shared<FloatConv>(geometry(values), span<const float>(weight),
                                     span<const float>(bias), epilogue);
}

void define_program(py::module_& m) {
  using Shape = std::tuple<int64_t, int64_t, int64_t, bool>;
  py::class_<FloatConv, std::shared_ptr<FloatConv>>(m, "FloatConv")
      .def(py::init(&float_conv), py::arg("geometry"), py::arg("weight"), py::arg("bias"),
           py::kw_only(), py::arg("pool"), py::arg("clamp_min"), py::arg("clamp_max"),
           py::arg("threshold"), py::arg("sense"));

  py::class_<Program, std::shared_ptr<Program>>(m, "Program")
      .def(py::init<>())
      .def("add_map", [](Program& p, const Shape& shape) { return p.add_map(map_shape(shape)); })
      .def("add_view", [](Program& p, int64_t map,
                          const Shape& shape) { return p.add_view(map, map_shape(shape)); })
      .def("add_conv",
           [](Program& p, std::shared_ptr<Conv> conv, int64_t bits, int64_t residual,
              int64_t out_float, int64_t out_bits) {
             p.add_conv(std::move(conv), bits, residual, out_float, out_bits);
           })
      .def("add_float_conv",
           [](Program& p, std::shared_ptr<FloatConv> conv, int64_t x, int64_t out_float,
              int64_t out_bits) { p.add_float_conv(std::move(conv), x, out_float, out_bits); })
      .def("add_binarize",
           [](Program& p, int64_t x, const OptionalMemory& threshold, const OptionalMemory& sense,
              int64_t out) {
             p.add_binarize(x, span<const float>(threshold), span<const uint8_t>(sense), out);
           })
      .def("add_bit_pool",
           [](Program& p, int64_t bits, const WindowValues& pool, const OptionalMemory& take_and,
              int64_t out) {
             p.add_bit_pool(bits, window(pool), span<const uint8_t>(take_and), out);
           })
      .def("add_average",
           [](Program& p, int64_t x, const WindowValues& pool, bool count_padding, int64_t divisor,
              int64_t first_channel, int64_t out) {
             p.add_average(x, window(pool), count_padding, divisor, first_channel, out);
           })
      .def("add_maximum", [](Program& p, int64_t x, const WindowValues& pool,
                             int64_t out) { p.add_maximum(x, window(pool), out); })
      .def("add_sum",
           [](Program& p, int64_t a, int64_t b, std::optional<float> clamp_min,
              std::optional<float> clamp_max, int64_t out) {
             p.add_sum(a, b, or_infinite(clamp_min, -1), or_infinite(clamp_max, 1), out);
           })
      .def("finish", &Program::finish)
      .def("arena_bytes", &Program::arena_bytes);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  m.def("isa", [] { return std::string(kernels().name); });
  m.def("usable_isas", &usable_isas);
  m.def("select_isa", &select_isa, py::arg("name"));
  m.def("processors", &processors);
  m.def("limit_processors", &limit_processors);
  m.def("share_threads", [](uintptr_t parallel_region) {
    share_threads(reinterpret_cast<ParallelRegion>(parallel_region));
  });
  m.def("shares_threads", &shares_threads);
  m.def("measure_peak", [] {
    py::gil_scoped_release release;
    const Peak peak = measure_peak();
    return std::pair<double, double>(peak.macs_per_second, peak.macs_per_clock);
  });

  m.def("prepacked_words", [](const GeometryValues& g) { return prepacked_words(geometry(g)); });
  m.def(
      "prepack",
      [](const GeometryValues& g, const Memory& weight, const Memory& prepacked) {
        prepack(geometry(g), span<const uint32_t>(weight), span<uint32_t>(prepacked));
      },
      nogil);

  py::class_<Conv, std::shared_ptr<Conv>>(m, "Conv")
      .def(py::init([](const GeometryValues& g, const Memory& prepacked) {
        return std::make_shared<Conv>(geometry(g), span<const uint32_t>(prepacked));
      }))
      .def(py::init(&fused_conv), py::arg("geometry"), py::arg("prepacked"), py::kw_only(),
           py::arg("pool"), py::arg("multiplier"), py::arg("bias"), py::arg("slope"),
           py::arg("shift"), py::arg("threshold"), py::arg("sense"), py::arg("pool_min"),
           py::arg("clamp_min"), py::arg("clamp_max"))
      .def(
          "accumulate",
          [](const Conv& conv, int64_t batch, int64_t height, int64_t width, const Memory& bits,
             const Memory& dots, int64_t threads) {
            conv.accumulate(batch, height, width, span<const uint32_t>(bits), span<int32_t>(dots),
                            threads);
          },
          nogil)
      .def(
          "run",
          [](const Conv& conv, int64_t batch, int64_t height, int64_t width, const Memory& bits,
             const std::optional<FloatMemory>& residual,
             const std::optional<FloatMemory>& out_float, const OptionalMemory& out_bits,
             int64_t threads) {
            conv.run({batch, height, width, span<const uint32_t>(bits), float_span(residual),
                      float_span(out_float), span<uint32_t>(out_bits)},
                     threads);
          },
          nogil);

  m.def(
      "binarize",
      [](int64_t pixels, int64_t channels, const FloatMemory& x, const OptionalMemory& threshold,
         const OptionalMemory& sense, const Memory& bits, int64_t threads) {
        binarize(pixels, channels, float_span(x), span<const float>(threshold),
                 span<const uint8_t>(sense), span<uint32_t>(bits), threads);
      },
      nogil);
  m.def(
      "unbinarize",
      [](int64_t pixels, int64_t channels, const Memory& bits, const FloatMemory& x,
         int64_t threads) {
        unbinarize(pixels, channels, span<const uint32_t>(bits), float_span(x), threads);
      },
      nogil);
  m.def(
      "maxpool",
      [](int64_t batch, int64_t height, int64_t width, int64_t channels, const WindowValues& pool,
         const Memory& bits, const OptionalMemory& take_and, const Memory& out, int64_t threads) {
        maxpool(batch, height, width, channels, window(pool), span<const uint32_t>(bits),
                span<const uint8_t>(take_and), span<uint32_t>(out), threads);
      },
      nogil);

  define_program(m);
  define_caller(m);
}

}  // namespace biper
