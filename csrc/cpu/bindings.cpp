// The module biper_engine._cpu. Private to the package: biper_engine/ops is its only caller.
//
// Memory comes as (address, elements, type); what a call needs is checked against it, so that
// arguments that do not fit raise ValueError. The caller keeps the memory alive. Programs take
// tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "caller.h"
#include "conv.h"
#include "dispatch.h"
#include "maps.h"
#include "matmul.h"
#include "peak.h"
#include "sign_gradient.h"
#include "signed_conv.h"
#include "steps.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace biper {
namespace {

using Memory = std::tuple<uintptr_t, int64_t, int32_t>;
using OptionalMemory = std::optional<Memory>;
using GeometryValues = std::array<int64_t, 13>;
using WindowValues = std::array<int64_t, 6>;
using FloatMemory = std::tuple<uintptr_t, int64_t, int32_t>;

template <class T>
Span<T> span(const char* name, const Memory& memory) {
  const auto [address, size, type] = memory;
  require_type(name, type, type_of<T>());
  return {reinterpret_cast<T*>(address), size};
}

template <class T>
Span<T> span(const char* name, const OptionalMemory& memory) {
  return memory ? span<T>(name, *memory) : Span<T>{};
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

void define_program(py::module_& m) {
  using Shape = std::tuple<int64_t, int64_t, int64_t, bool>;
  const auto map_shape = [](const Shape& v) {
    return MapShape{std::get<0>(v), std::get<1>(v), std::get<2>(v), std::get<3>(v)};
  };
  py::class_<Program, std::shared_ptr<Program>>(m, "Program")
      .def(py::init<>())
      .def("add_map",
           [map_shape](Program& p, const Shape& shape) { return p.add_map(map_shape(shape)); })
      .def("add_view",
           [map_shape](Program& p, int64_t map, const Shape& shape) {
             return p.add_view(map, map_shape(shape));
           })
      .def("shape",
           [](const Program& p, int64_t map) {
             const MapShape& shape = p.shape(map);
             return Shape{shape.height, shape.width, shape.channels, shape.packed};
           })
      .def("add",
           [](Program& p, const std::string& step, const Arguments::Values& values) {
             return add_step(p, step, Arguments(values));
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
        prepack(geometry(g), span<const uint32_t>("weight", weight),
                span<uint32_t>("prepacked", prepacked));
      },
      nogil);

  py::class_<Conv, std::shared_ptr<Conv>>(m, "Conv")
      .def(py::init([](const GeometryValues& g, const Memory& prepacked) {
        return std::make_shared<Conv>(geometry(g), span<const uint32_t>("prepacked", prepacked));
      }))
      .def(py::init([](const Arguments::Values& values) {
        const Arguments arguments(values);
        return fused_conv(arguments, arguments.span<uint32_t>("prepacked"));
      }))
      .def(
          "accumulate",
          [](const Conv& conv, int64_t batch, int64_t height, int64_t width, const Memory& bits,
             const Memory& dots, int64_t threads) {
            conv.accumulate(batch, height, width, span<const uint32_t>("bits", bits),
                            span<int32_t>("dots", dots), threads);
          },
          nogil)
      .def(
          "run",
          [](const Conv& conv, int64_t batch, int64_t height, int64_t width, const Memory& bits,
             const std::optional<FloatMemory>& residual,
             const std::optional<FloatMemory>& out_float, const OptionalMemory& out_bits,
             const OptionalMemory& gate, const std::pair<int64_t, int64_t>& gate_sizes,
             int64_t threads) {
            conv.run(
                {batch, height, width, span<const uint32_t>("bits", bits), float_span(residual),
                 float_span(out_float), span<uint32_t>("out_bits", out_bits),
                 span<const float>("gate", gate), gate_sizes.first, gate_sizes.second},
                threads);
          },
          nogil);

  m.def(
      "binarize",
      [](int64_t pixels, int64_t channels, const FloatMemory& x, const OptionalMemory& threshold,
         const OptionalMemory& sense, const Memory& bits, int64_t threads) {
        binarize(pixels, channels, float_span(x), span<const float>("threshold", threshold),
                 span<const uint8_t>("sense", sense), span<uint32_t>("bits", bits), threads);
      },
      nogil);
  m.def(
      "unbinarize",
      [](int64_t pixels, int64_t channels, const Memory& bits, const FloatMemory& x,
         int64_t threads) {
        unbinarize(pixels, channels, span<const uint32_t>("bits", bits), float_span(x), threads);
      },
      nogil);
  m.def(
      "maxpool",
      [](int64_t batch, int64_t height, int64_t width, int64_t channels, const WindowValues& pool,
         const Memory& bits, const OptionalMemory& take_and, const Memory& out, int64_t threads) {
        maxpool(batch, height, width, channels, window(pool), span<const uint32_t>("bits", bits),
                span<const uint8_t>("take_and", take_and), span<uint32_t>("out", out), threads);
      },
      nogil);

  m.def(
      "matmul",
      [](int64_t batch, const std::array<int64_t, 7>& s, const std::array<float, 4>& scale,
         const Memory& a, const Memory& b, const std::optional<FloatMemory>& out,
         const OptionalMemory& sums, int64_t threads) {
        matmul(batch, {s[0], s[1], s[2], s[3], s[4], s[5], s[6]},
               {scale[0], scale[1], scale[2], scale[3]}, span<const uint32_t>("a", a),
               span<const uint32_t>("b", b), float_span(out), span<int32_t>("sums", sums), threads);
      },
      nogil);
  m.def(
      "weight_linear",
      [](int64_t rows, int64_t inputs, int64_t outputs, const Memory& x, const Memory& weight,
         const Memory& multiplier, const OptionalMemory& bias, const OptionalMemory& offset,
         const Memory& out, int64_t threads) {
        const SignLinear linear(inputs, outputs, span<const uint32_t>("weight", weight),
                                span<const float>("multiplier", multiplier),
                                span<const float>("bias", bias),
                                span<const float>("offset", offset));
        linear.run(rows, span<const float>("x", x), span<float>("out", out), threads);
      },
      nogil);

  m.def(
      "sign_gradient",
      [](int64_t samples, int64_t length, int32_t surrogate, double epsilon, const Memory& x,
         const Memory& gradient, const Memory& out, int64_t threads) {
        sign_gradient(samples, length, surrogate, epsilon, span<const float>("x", x),
                      span<const float>("gradient", gradient), span<float>("out", out), threads);
      },
      nogil);

  m.def(
      "signed_conv",
      [](const GeometryValues& g, const std::array<int64_t, 3>& size, const Memory& x,
         const Memory& weight, const Memory& alpha, const Memory& out, int64_t threads) {
        return signed_conv(geometry(g), size[0], size[1], size[2], span<const float>("x", x),
                           span<const float>("weight", weight), span<const float>("alpha", alpha),
                           span<float>("out", out), threads);
      },
      nogil);

  define_program(m);
  define_caller(m);
}

}  // namespace biper
