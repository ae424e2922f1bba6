#include "watch.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "conv.h"
#include "tensors.h"

namespace py = pybind11;

namespace biper {
namespace {

constexpr int64_t kWholeBytes = 4096;  // that are compared
constexpr int64_t kSamples = 32;       // of a larger tensor
constexpr int64_t kSampleBytes = 64;
constexpr int64_t kUncounted = -1;

// The bytes of a tensor that lies without gaps in some order of its dimensions; -1 of any other,
// and of one that is not in memory of the CPU.
int64_t dense_bytes(const Tensor& x) {
  if (x.device_type != kCpuDevice) return -1;
  int64_t values = 1, reach = 1;
  for (int32_t d = 0; d < x.dimensions; ++d) {
    if (x.shape[d] == 0) return 0;
    values *= x.shape[d];
    reach += (x.shape[d] - 1) * x.strides[d];
  }
  return reach == values && x.start() != nullptr ? values * x.bits / 8 * x.lanes : -1;
}

// How often PyTorch counted a write; kUncounted for tensors of inference mode.
int64_t version(PyObject* tensor) {
  const auto count =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, torch->version.ptr()));
  const int64_t value = count ? PyLong_AsLongLong(count.ptr()) : kUncounted;
  if (PyErr_Occurred() != nullptr) PyErr_Clear();
  return value;
}

constexpr uint64_t kNoTag = 0;

// What changes with a dict; kNoTag in versions of Python without it.
uint64_t dict_tag(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  static_cast<void>(dict);
  return kNoTag;
#endif
}

void* address(PyObject* tensor) {
  if (torch->address != nullptr) {
    try {
      return torch->address(tensor);
    } catch (...) {  // of PyTorch: what is there now has no memory
      return nullptr;
    }
  }
  Tensor x;
  return read_any(tensor, &x) ? x.start() : nullptr;
}

}  // namespace

WatchedTensor::WatchedTensor(py::object tensor) : tensor_(std::move(tensor)) {
  Tensor x;
  if (!read_any(tensor_.ptr(), &x)) return;
  is_read_ = true;
  address_ = address(tensor_.ptr());
  type_ = {x.type, x.bits};
  shape_.assign(x.shape, x.shape + x.dimensions);
  strides_.assign(x.strides, x.strides + x.dimensions);
  const int64_t bytes = dense_bytes(x);
  const bool whole = bytes <= kWholeBytes;
  if (bytes > 0) {
    const int64_t samples = whole ? 1 : kSamples, size = whole ? bytes : kSampleBytes;
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t offset = whole ? 0 : (bytes - size) * i / (samples - 1);
      offsets_.push_back(offset);
      values_.insert(values_.end(), x.start() + offset, x.start() + offset + size);
    }
  }
  is_counted_ = bytes < 0 || !whole;
  if (is_counted_) version_ = version(tensor_.ptr());
}

bool WatchedTensor::holds() const {
  if (!is_read_) return true;  // nothing was made from it
  return has_same_memory() && has_same_values() &&
         (!is_counted_ || version(tensor_.ptr()) == version_);
}

bool WatchedTensor::has_same_memory() const {
  if (shape_.size() == 1) return address(tensor_.ptr()) == address_;
  Tensor x;
  return read_any(tensor_.ptr(), &x) && x.start() == address_ &&
         std::make_pair(x.type, x.bits) == type_ &&
         x.dimensions == static_cast<int32_t>(shape_.size()) &&
         std::equal(shape_.begin(), shape_.end(), x.shape) &&
         std::equal(strides_.begin(), strides_.end(), x.strides);
}

bool WatchedTensor::has_same_values() const {
  if (values_.empty()) return true;
  const size_t size = values_.size() / offsets_.size();
  const char* start = static_cast<const char*>(address_);
  for (size_t i = 0; i < offsets_.size(); ++i) {
    if (std::memcmp(start + offsets_[i], values_.data() + i * size, size) != 0) return false;
  }
  return true;
}

WatchedDict::WatchedDict(py::dict dict) : dict_(std::move(dict)), tag_(dict_tag(dict_.ptr())) {
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(dict_.ptr(), &at, &key, &value) != 0;) {
    values_.push_back(py::reinterpret_borrow<py::object>(value));
  }
}

bool WatchedDict::holds() const {
  const uint64_t tag = dict_tag(dict_.ptr());
  if (tag != kNoTag && tag == tag_) return true;
  tag_ = tag;
  if (has_same_values()) return true;
  tag_ = kNoTag;
  return false;
}

bool WatchedDict::has_same_values() const {
  if (PyDict_GET_SIZE(dict_.ptr()) != static_cast<Py_ssize_t>(values_.size())) return false;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t at = 0;
  for (const py::object& wanted : values_) {
    if (PyDict_Next(dict_.ptr(), &at, &key, &value) == 0 || value != wanted.ptr()) return false;
  }
  return true;
}

Watch::Watch(const std::vector<py::dict>& dicts, const std::vector<py::object>& tensors) {
  for (const py::dict& dict : dicts) dicts_.emplace_back(dict);
  for (const py::object& tensor : tensors) tensors_.emplace_back(tensor);
}

bool Watch::holds() const {
  const auto holds = [](const auto& watched) { return watched.holds(); };
  return std::all_of(dicts_.begin(), dicts_.end(), holds) &&
         std::all_of(tensors_.begin(), tensors_.end(), holds);
}

namespace {

// Copies all values without giving up the GIL, in which another thread could free what is read.
// Returns false, with nothing done, for tensors that lie differently in memory, or have none.
bool copy(const py::object& target, const py::object& source) {
  Tensor to, from;
  if (!read_any(target.ptr(), &to) || !read_any(source.ptr(), &from)) return false;
  const int64_t bytes = dense_bytes(from);
  if (bytes < 0 || bytes != dense_bytes(to) || from.dimensions != to.dimensions ||
      !std::equal(from.shape, from.shape + from.dimensions, to.shape) ||
      !std::equal(from.strides, from.strides + from.dimensions, to.strides)) {
    return false;
  }
  if (bytes > 0) std::memcpy(to.start(), from.start(), static_cast<size_t>(bytes));
  return true;
}

}  // namespace

void define_watch(py::module_& m) {
  m.def("copy", &copy, py::arg("target"), py::arg("source"));
  py::class_<Watch>(m, "Watch")
      .def(py::init<const std::vector<py::dict>&, const std::vector<py::object>&>(),
           py::arg("dicts"), py::arg("tensors"))
      .def("holds", &Watch::holds);
}

}  // namespace biper
