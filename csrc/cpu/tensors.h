// Tensors of PyTorch, read without a header of PyTorch: by DLPack's exchange API for C, which
// torch.Tensor has from 2.10 on. What is read is true until the GIL is given up.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace biper {

// The parts of dlpack.h, version 1.3, that are used here: DLTensor and DLPackExchangeAPI.
struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t type, bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;  // in values
  uint64_t byte_offset;

  char* start() const { return static_cast<char*>(data) + byte_offset; }
};

struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* older;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*read)(void* object, Tensor* tensor);  // no reference is kept
  void* stream;
};

constexpr int32_t kCpuDevice = 1;
constexpr uint8_t kIntType = 0, kFloatType = 2;

// What is used of PyTorch.
struct Torch {
  PyTypeObject* tensor;
  const ExchangeApi* api;
  pybind11::object empty_like, requires_grad, is_neg, version;
  void* (*address)(PyObject* tensor);  // where its values are; null where PyTorch has no such
};

extern const Torch* torch;  // null before use_torch; never freed: tensors may outlive modules

void use_torch(const pybind11::module_& module);

// Reads a tensor of PyTorch, also one of a subclass; false where it has no memory.
bool read_any(PyObject* object, Tensor* tensor);

// Reads a tensor of PyTorch; false for one of a subclass, or that has no memory.
bool read(PyObject* object, Tensor* tensor);

// Whether the values lie without gaps, the dimensions in `order` from the outermost to the
// innermost.
template <size_t kDimensions>
bool lies_in_order(const Tensor& x, const std::array<int, kDimensions>& order) {
  int64_t stride = 1;
  bool in_order = true;
  for (size_t i = kDimensions; i-- > 0;) {
    const int64_t size = x.shape[order[i]];
    if (size == 0) return true;  // whatever the strides are, there is nothing
    in_order = in_order && (size == 1 || x.strides[order[i]] == stride);
    stride *= size;
  }
  return in_order;
}

}  // namespace biper
