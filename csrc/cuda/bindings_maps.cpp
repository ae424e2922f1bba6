// Bindings of maps, of the stem and of the classifier.

#include <array>
#include <cstdint>
#include <limits>

#include "bindings.h"
#include "maps.h"
#include "pooled_linear.h"
#include "stem.h"

namespace biper {
namespace {

using Sizes = std::array<int64_t, 4>;  // of [N, C, H, W]
using Pair = std::array<int, 2>;
using PoolValues = std::array<int, 6>;  // kernel, stride, padding
using release = py::call_guard<py::gil_scoped_release>;

int narrow(int64_t value) {
  require(value >= 0 && value <= INT32_MAX, "a size is out of range");
  return static_cast<int>(value);
}

// Elements from the first to the last of a strided map, inclusive.
int64_t extent(const Sizes& sizes, const Sizes& strides) {
  int64_t last = 0;
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] == 0) return 0;
    require(strides[i] >= 0, "strides must not be negative");
    last += (sizes[i] - 1) * strides[i];
  }
  return last + 1;
}

int64_t count(const Sizes& sizes) { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }

int64_t packed_count(const Sizes& sizes) {
  return sizes[0] * words(sizes[1]) * sizes[2] * sizes[3];
}

const void* image(const TypedMemory& memory, const Sizes& sizes, const Sizes& strides, int* type) {
  const auto [address, elements, kind] = memory.value();
  require(kind >= kFloat32 && kind <= kUint8, "images are float32, float16, bfloat16 or uint8");
  *type = kind;
  return values<const void>(Memory{address, elements}, extent(sizes, strides), "x");
}

void run_binarize(const TypedMemory& x, const Sizes& sizes, const Sizes& strides,
                  const OptionalMemory& threshold, const OptionalMemory& sense, const Memory& bits,
                  uintptr_t stream) {
  BinarizeArgs a = {};
  a.x = image(x, sizes, strides, &a.type);
  require(a.type != kUint8, "a float map is float32, float16 or bfloat16");
  a.stride_n = strides[0], a.stride_c = strides[1];
  a.stride_h = strides[2], a.stride_w = strides[3];
  a.threshold = values<const float>(threshold, sizes[1], "threshold");
  a.sense = values<const bool>(sense, sizes[1], "sense");
  a.bits = values<uint32_t>(bits, packed_count(sizes), "bits");
  a.n = sizes[0], a.c = narrow(sizes[1]), a.h = narrow(sizes[2]), a.w = narrow(sizes[3]);
  succeed(binarize(a, reinterpret_cast<void*>(stream)));
}

void run_unbinarize(const Memory& bits, const TypedMemory& x, const Sizes& sizes,
                    uintptr_t stream) {
  UnbinarizeArgs a = {};
  const TypedValues out = typed(x, count(sizes), "x");
  a.bits = values<const uint32_t>(bits, packed_count(sizes), "bits");
  a.x = out.address, a.type = out.type;
  a.n = sizes[0], a.c = narrow(sizes[1]), a.h = narrow(sizes[2]), a.w = narrow(sizes[3]);
  succeed(unbinarize(a, reinterpret_cast<void*>(stream)));
}

int positions(int64_t size, int kernel, int stride, int padding) {
  const int64_t found = (size + 2 * padding - kernel) / stride + 1;
  require(kernel >= 1 && stride >= 1 && padding >= 0 && found >= 1, "the pool does not fit");
  return narrow(found);
}

void run_bmaxpool2d(const Memory& bits, const OptionalMemory& take_and, const Memory& out,
                    const Sizes& sizes, const PoolValues& pool, uintptr_t stream) {
  BitPoolArgs a = {};
  a.n = sizes[0], a.c = narrow(sizes[1]), a.h = narrow(sizes[2]), a.w = narrow(sizes[3]);
  a.kernel_h = pool[0], a.kernel_w = pool[1], a.stride_h = pool[2], a.stride_w = pool[3];
  a.padding_h = pool[4], a.padding_w = pool[5];
  a.out_h = positions(sizes[2], pool[0], pool[2], pool[4]);
  a.out_w = positions(sizes[3], pool[1], pool[3], pool[5]);
  a.bits = values<const uint32_t>(bits, packed_count(sizes), "bits");
  a.take_and = values<const bool>(take_and, sizes[1], "take_and");
  a.out = values<uint32_t>(out, packed_count({sizes[0], sizes[1], a.out_h, a.out_w}), "out");
  succeed(bmaxpool2d(a, reinterpret_cast<void*>(stream)));
}

int64_t stem_weights(const StemArgs& a) {
  const int64_t groups = words(a.o);
  if (!a.tensor_cores) return groups * a.kernel_h * a.kernel_w * a.c * 32;
  const int64_t row = int64_t{a.kernel_w} * (a.c + a.c * a.stride_x % 2);
  return groups * ((a.kernel_h * ((row + 7) / 8) + 1) / 2) * 512;
}

void run_stem(const TypedMemory& x, const Sizes& sizes, const Sizes& strides,
              const OptionalMemory& scale, const OptionalMemory& offset, const Memory& weight,
              const OptionalMemory& bias, const OptionalMemory& threshold,
              const OptionalMemory& sense, const TypedMemory& out, const OptionalMemory& bits,
              int compute, bool tensor_cores, int channels, const Pair& kernel, const Pair& stride,
              const Sizes& padding, const PoolValues& pool, std::optional<float> clamp_min,
              std::optional<float> clamp_max, uintptr_t stream) {
  StemArgs a = {};
  require(sizes[1] >= 1 && sizes[1] <= 4 && channels >= 1, "channels out of range");
  require(kernel[0] >= 1 && kernel[1] >= 1 && stride[0] >= 1 && stride[1] >= 1, "out of range");
  require(compute >= kFloat32 && compute <= kBfloat16, "computes in float32, float16 or bfloat16");
  a.x = image(x, sizes, strides, &a.type);
  a.stride_n = strides[0], a.stride_c = strides[1];
  a.stride_h = strides[2], a.stride_w = strides[3];
  a.n = sizes[0], a.c = narrow(sizes[1]), a.h = narrow(sizes[2]), a.w = narrow(sizes[3]);
  a.o = channels;
  a.kernel_h = kernel[0], a.kernel_w = kernel[1], a.stride_y = stride[0], a.stride_x = stride[1];
  a.padding_top = narrow(padding[0]), a.padding_left = narrow(padding[2]);
  const int64_t conv_h = (sizes[2] + padding[0] + padding[1] - kernel[0]) / stride[0] + 1;
  const int64_t conv_w = (sizes[3] + padding[2] + padding[3] - kernel[1]) / stride[1] + 1;
  require(conv_h >= 1 && conv_w >= 1, "the kernel does not fit");
  a.conv_h = narrow(conv_h), a.conv_w = narrow(conv_w);
  a.pool_kernel_h = pool[0], a.pool_kernel_w = pool[1];
  a.pool_stride_h = pool[2], a.pool_stride_w = pool[3];
  a.pool_padding_h = pool[4], a.pool_padding_w = pool[5];
  a.out_h = positions(conv_h, pool[0], pool[2], pool[4]);
  a.out_w = positions(conv_w, pool[1], pool[3], pool[5]);
  a.compute = compute, a.tensor_cores = tensor_cores;
  a.scale = values<const float>(scale, sizes[1], "scale");
  a.offset = values<const float>(offset, sizes[1], "offset");
  require((a.scale == nullptr) == (a.offset == nullptr), "scale and offset come together");
  a.weight = values<const void>(weight, stem_weights(a), "weight");
  a.bias = values<const float>(bias, channels, "bias");
  a.threshold = values<const float>(threshold, channels, "threshold");
  a.sense = values<const bool>(sense, channels, "sense");
  const Sizes made = {sizes[0], channels, a.out_h, a.out_w};
  const TypedValues floats = typed(out, count(made), "out");
  require(floats.type == kNone || floats.type == compute, "floats leave as they are computed");
  a.out = floats.address;
  a.bits = values<uint32_t>(bits, packed_count(made), "bits");
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  a.clamp_min = clamp_min.value_or(-kInfinity), a.clamp_max = clamp_max.value_or(kInfinity);
  succeed(stem(a, reinterpret_cast<void*>(stream)));
}

void run_pooled_linear(const TypedMemory& x, const Sizes& sizes, const TypedMemory& weight,
                       const TypedMemory& bias, int classes, const TypedMemory& out,
                       uintptr_t stream) {
  PooledLinearArgs a = {};
  require(classes >= 1, "classes out of range");
  const TypedValues map = typed(x, count(sizes), "x");
  const TypedValues matrix = typed(weight, classes * sizes[1], "weight");
  const TypedValues added = typed(bias, classes, "bias");
  const TypedValues made = typed(out, sizes[0] * classes, "out");
  require(map.type != kNone && made.type == map.type, "out has the type of x");
  a.x = map.address, a.type = map.type;
  a.weight = matrix.address, a.weight_type = matrix.type;
  a.bias = added.address, a.bias_type = added.type;
  a.out = made.address;
  a.n = sizes[0], a.c = narrow(sizes[1]), a.h = narrow(sizes[2]), a.w = narrow(sizes[3]);
  a.classes = classes;
  succeed(pooled_linear(a, reinterpret_cast<void*>(stream)));
}

}  // namespace

void define_maps(py::module_& m) {
  m.def("binarize", &run_binarize, release(), py::arg("x"), py::arg("sizes"), py::arg("strides"),
        py::arg("threshold"), py::arg("sense"), py::arg("bits"), py::arg("stream"));
  m.def("unbinarize", &run_unbinarize, release(), py::arg("bits"), py::arg("x"), py::arg("sizes"),
        py::arg("stream"));
  m.def("bmaxpool2d", &run_bmaxpool2d, release(), py::arg("bits"), py::arg("take_and"),
        py::arg("out"), py::arg("sizes"), py::arg("pool"), py::arg("stream"));
}

void define_ends(py::module_& m) {
  m.def("pooled_linear", &run_pooled_linear, release(), py::arg("x"), py::arg("sizes"),
        py::arg("weight"), py::arg("bias"), py::arg("classes"), py::arg("out"), py::arg("stream"));
  m.def("stem_has_tensor_cores", &stem_has_tensor_cores, py::arg("compute"));
  m.def("stem", &run_stem, release(), py::arg("x"), py::arg("sizes"), py::arg("strides"),
        py::kw_only(), py::arg("scale"), py::arg("offset"), py::arg("weight"), py::arg("bias"),
        py::arg("threshold"), py::arg("sense"), py::arg("out"), py::arg("bits"), py::arg("compute"),
        py::arg("tensor_cores"), py::arg("channels"), py::arg("kernel"), py::arg("stride"),
        py::arg("padding"), py::arg("pool"), py::arg("clamp_min"), py::arg("clamp_max"),
        py::arg("stream"));
}

}  // namespace biper
