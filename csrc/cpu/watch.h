// Whether the tensors of a module are still those that something was made from.
//
// Every call of an engine asks, so that the answer must cost few microseconds for a hundred
// tensors. It is yes where the dicts that hold them hold the same objects, these show the same
// memory, and that has the same values: all of them where they are few, else samples, and the
// number of writes that PyTorch counted. Nothing is told of a write to a large tensor that PyTorch
// does not count and that leaves all samples as they were.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace biper {

class WatchedTensor {
 public:
  explicit WatchedTensor(pybind11::object tensor);
  bool holds() const;

 private:
  bool has_same_memory() const;
  bool has_same_values() const;

  pybind11::object tensor_;
  bool is_read_ = false, is_counted_ = false;
  void* address_ = nullptr;
  std::pair<uint8_t, uint8_t> type_;
  std::vector<int64_t> shape_, strides_;
  int64_t version_ = 0;
  std::vector<int64_t> offsets_;  // of the values, in bytes
  std::vector<char> values_;
};

class WatchedDict {
 public:
  explicit WatchedDict(pybind11::dict dict);
  bool holds() const;

 private:
  bool has_same_values() const;

  pybind11::dict dict_;
  std::vector<pybind11::object> values_;  // kept, so that no other object gets their addresses
  mutable uint64_t tag_;                  // of the dict, when its values were last compared
};

class Watch {
 public:
  Watch(const std::vector<pybind11::dict>& dicts, const std::vector<pybind11::object>& tensors);

  // Call it with the GIL.
  bool holds() const;

 private:
  std::vector<WatchedDict> dicts_;
  std::vector<WatchedTensor> tensors_;
};

void define_watch(pybind11::module_& m);

}  // namespace biper
