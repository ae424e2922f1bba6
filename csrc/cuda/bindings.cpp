// The module biper_engine._cuda. It is private to the package: only biper_engine/ops/cuda.py calls
// it.
//
// The caller keeps memory alive and the device current, and passes its stream.
#include "bindings.h"

#include <array>
#include <limits>

#include "bconv.h"
#include "device.h"
#include "peak.h"

#ifndef BIPER_MODULE_NAME
#define BIPER_MODULE_NAME _cuda
#endif

namespace biper {
namespace {

using GeometryValues = std::array<int, 13>;  // C, O, groups, kernel, stride, padding x 4, dilation
using PoolValues = std::array<int, 6>;       // kernel, stride, padding
using ImageValues = std::array<int, 3>;      // batch, height, width

int outputs_along(int size, int kernel, int stride, int padding, int dilation) {
  return (size + padding - dilation * (kernel - 1) - 1) / stride + 1;
}

ConvShape conv_shape(const GeometryValues& g, const PoolValues& pool, const ImageValues& image) {
  for (const int at : {0, 1, 2, 3, 4, 5, 6, 11, 12}) require(g[at] >= 1, "geometry out of range");
  for (const int at : {7, 8, 9, 10}) require(g[at] >= 0, "padding out of range");
  for (const int at : {0, 1, 2, 3}) require(pool[at] >= 1, "pool out of range");
  require(pool[4] >= 0 && pool[5] >= 0, "pool padding out of range");
  require(image[0] >= 0 && image[1] >= 1 && image[2] >= 1, "image out of range");
  require(g[0] % g[2] == 0 && g[1] % g[2] == 0, "groups do not divide the channels");
  ConvShape s = {};
  s.batch = image[0], s.height = image[1], s.width = image[2];
  s.in_channels = g[0], s.out_channels = g[1], s.groups = g[2];
  s.conv = {g[3], g[4], g[5], g[6], g[7], g[9], g[11], g[12]};
  s.conv_h = outputs_along(s.height, g[3], g[5], g[7] + g[8], g[11]);
  s.conv_w = outputs_along(s.width, g[4], g[6], g[9] + g[10], g[12]);
  s.pool = {pool[0], pool[1], pool[2], pool[3], pool[4], pool[5], 1, 1};
  require(s.conv_h >= 1 && s.conv_w >= 1, "the kernel does not fit");
  s.out_h = outputs_along(s.conv_h, pool[0], pool[2], 2 * pool[4], 1);
  s.out_w = outputs_along(s.conv_w, pool[1], pool[3], 2 * pool[5], 1);
  require(s.out_h >= 1 && s.out_w >= 1, "the pool does not fit");
  return s;
}

int64_t fragment_elements(const ConvShape& s) {
  const int taps = s.conv.kernel_h * s.conv.kernel_w;
  const int64_t chunk = fragment_words(s.in_channels, taps);
  const int64_t chunks = (words(s.in_channels) + chunk - 1) / chunk;
  return words(s.out_channels) * chunks * ((taps * chunk / 2 + 3) / 4) * 256;
}

// A convolution with fixed parameters; `run` takes the maps.
class Conv {
 public:
  Conv(const GeometryValues& geometry, const PoolValues& pool, const OptionalMemory& fragments,
       const OptionalMemory& sums, const Memory& tap_words, const OptionalMemory& multiplier,
       const OptionalMemory& bias, const OptionalMemory& slope, const OptionalMemory& shift,
       const OptionalMemory& threshold, const OptionalMemory& sense, const OptionalMemory& pool_min,
       const OptionalMemory& first, const OptionalMemory& span, std::optional<float> clamp_min,
       std::optional<float> clamp_max, int path, int processors)
      : geometry_(geometry), pool_(pool) {
    // The parameters do not depend on the image's size, so the kernel's size is used for it.
    const ImageValues smallest = {1, (geometry[3] - 1) * geometry[11] + pool[0] * geometry[5] + 1,
                                  (geometry[4] - 1) * geometry[12] + pool[1] * geometry[6] + 1};
    const ConvShape s = conv_shape(geometry, pool, smallest);
    const int64_t channels = s.out_channels;
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    ConvEpilogue& e = args_.epilogue;
    e.multiplier = values<const float>(multiplier, channels, "multiplier");
    e.bias = values<const float>(bias, channels, "bias");
    e.slope = values<const float>(slope, channels, "slope");
    e.shift = values<const float>(shift, channels, "shift");
    e.threshold = values<const float>(threshold, channels, "threshold");
    e.sense = values<const bool>(sense, channels, "sense");
    e.pool_min = values<const bool>(pool_min, channels, "pool_min");
    require(e.threshold != nullptr || e.sense == nullptr, "sense needs a threshold");
    first_ = values<const int32_t>(first, channels, "first");
    span_ = values<const uint32_t>(span, channels, "span");
    require((first_ == nullptr) == (span_ == nullptr), "first and span come together");
    e.clamp_min = clamp_min.value_or(-kInfinity);
    e.clamp_max = clamp_max.value_or(kInfinity);
    const int64_t taps = int64_t{s.conv.kernel_h} * s.conv.kernel_w;
    ConvWeights& w = args_.weights;
    w.fragments = values<const uint32_t>(fragments, fragment_elements(s), "fragments");
    w.sums = values<const int32_t>(
        sums, int64_t{s.conv.kernel_h + 1} * (s.conv.kernel_w + 1) * words(channels) * 32, "sums");
    require((w.fragments == nullptr) == (w.sums == nullptr), "fragments and sums come together");
    w.words = values<const uint32_t>(tap_words, taps * words(s.in_channels / s.groups) * channels,
                                     "words");
    args_.path = path;
    args_.processors = processors;
  }

  void run(const ImageValues& image, const Memory& bits, const TypedMemory& residual,
           const TypedMemory& floats, const OptionalMemory& packed, const OptionalMemory& dots,
           uintptr_t stream) const {
    succeed(bconv2d(complete(image, bits, residual, floats, packed, dots),
                    reinterpret_cast<void*>(stream)));
  }

  ConvWay way(const ImageValues& image, const Memory& bits, const TypedMemory& residual,
              const TypedMemory& floats, const OptionalMemory& packed,
              const OptionalMemory& dots) const {
    ConvWay found = {};
    succeed(bconv2d_way(complete(image, bits, residual, floats, packed, dots), &found));
    return found;
  }

 private:
  ConvArgs complete(const ImageValues& image, const Memory& bits, const TypedMemory& residual,
                    const TypedMemory& floats, const OptionalMemory& packed,
                    const OptionalMemory& dots) const {
    ConvArgs args = args_;
    const ConvShape& s = args.shape = conv_shape(geometry_, pool_, image);
    const int64_t pixels = int64_t{s.batch} * s.out_h * s.out_w;
    args.bits = values<const uint32_t>(
        bits, int64_t{s.batch} * s.height * s.width * words(s.in_channels), "bits");
    ConvOutputs& out = args.outputs;
    const TypedValues added = typed(residual, pixels * s.out_channels, "residual");
    const TypedValues stored = typed(floats, pixels * s.out_channels, "floats");
    out.residual = added.address, out.residual_type = added.type;
    out.floats = stored.address, out.float_type = stored.type;
    out.bits = values<uint32_t>(packed, pixels * words(s.out_channels), "packed");
    out.dots = values<int32_t>(dots, pixels * s.out_channels, "dots");
    const bool scaled = args.epilogue.multiplier != nullptr && args.epilogue.bias != nullptr;
    require(out.dots != nullptr || scaled || (out.floats == nullptr && out.bits == nullptr),
            "floats and bits need multiplier and bias");
    if (out.bits != nullptr && out.floats == nullptr && out.residual == nullptr) {
      args.epilogue.first = first_;
      args.epilogue.span = span_;
    }
    return args;
  }

  GeometryValues geometry_;
  PoolValues pool_;
  ConvArgs args_ = {};
  const int32_t* first_;
  const uint32_t* span_;
};

int count_devices() {
  const char* error = nullptr;
  const int count = device_count(&error);
  if (error != nullptr) throw std::runtime_error(error);
  return count;
}

// Properties of the current device.
DeviceProperties properties() {
  DeviceProperties found = {};
  succeed(current_device(&found));
  return found;
}

double peak(int kind, int milliseconds) {
  double operations_per_second = 0;
  succeed(measure_peak(kind, milliseconds, &operations_per_second));
  return operations_per_second;
}

}  // namespace

PYBIND11_MODULE(BIPER_MODULE_NAME, m) {
  m.doc() = "CUDA kernels of biper_engine; private, see biper_engine/ops/cuda.py.";
  using release = py::call_guard<py::gil_scoped_release>;

  py::class_<DeviceProperties>(m, "DeviceProperties")
      .def_readonly("capability", &DeviceProperties::capability)
      .def_readonly("processors", &DeviceProperties::processors)
      .def_readonly("shared_bytes", &DeviceProperties::shared_bytes)
      .def_readonly("has_binary_mma", &DeviceProperties::has_binary_mma)
      .def_readonly("has_byte_mma", &DeviceProperties::has_byte_mma);
  m.def("device_count", &count_devices);
  m.def("device_properties", &properties);
  m.def("measure_peak", &peak, release(), py::arg("kind"), py::arg("milliseconds"));
  define_maps(m);
  define_ends(m);
  m.def("fragment_words", &fragment_words, py::arg("in_channels"), py::arg("taps"));

  py::class_<ConvWay>(m, "ConvWay")
      .def_readonly("path", &ConvWay::path)
      .def_readonly("rows", &ConvWay::rows)
      .def_readonly("columns", &ConvWay::columns)
      .def_readonly("width", &ConvWay::width)
      .def_readonly("chunks", &ConvWay::chunks)
      .def_readonly("ragged", &ConvWay::ragged)
      .def_readonly("shared_bytes", &ConvWay::shared_bytes);
  py::class_<Conv>(m, "Conv")
      .def(py::init<const GeometryValues&, const PoolValues&, const OptionalMemory&,
                    const OptionalMemory&, const Memory&, const OptionalMemory&,
                    const OptionalMemory&, const OptionalMemory&, const OptionalMemory&,
                    const OptionalMemory&, const OptionalMemory&, const OptionalMemory&,
                    const OptionalMemory&, const OptionalMemory&, std::optional<float>,
                    std::optional<float>, int, int>(),
           py::arg("geometry"), py::arg("pool"), py::kw_only(), py::arg("fragments"),
           py::arg("sums"), py::arg("words"), py::arg("multiplier") = py::none(),
           py::arg("bias") = py::none(), py::arg("slope") = py::none(),
           py::arg("shift") = py::none(), py::arg("threshold") = py::none(),
           py::arg("sense") = py::none(), py::arg("pool_min") = py::none(),
           py::arg("first") = py::none(), py::arg("span") = py::none(),
           py::arg("clamp_min") = py::none(), py::arg("clamp_max") = py::none(),
           py::arg("path") = static_cast<int>(kAnyPath), py::arg("processors") = 0)
      .def("run", &Conv::run, release(), py::arg("image"), py::arg("bits"), py::arg("residual"),
           py::arg("floats"), py::arg("packed"), py::arg("dots"), py::arg("stream"))
      .def("way", &Conv::way, py::arg("image"), py::arg("bits"), py::arg("residual"),
           py::arg("floats"), py::arg("packed"), py::arg("dots"));
}

}  // namespace biper
