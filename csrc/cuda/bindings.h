// Shared parts of the bindings: memory from Python, and errors.
//
// Memory is passed as (address, elements) on the current device. The elements that a call needs are
// checked, so arguments that do not fit raise ValueError.

#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "types.h"

namespace biper {

namespace py = pybind11;

using Memory = std::pair<uintptr_t, int64_t>;
using OptionalMemory = std::optional<Memory>;
using TypedMemory = std::optional<std::tuple<uintptr_t, int64_t, int>>;

inline void succeed(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// Return the address of at least `elements` values.
template <class T>
T* values(const Memory& memory, int64_t elements, const char* name) {
  if (memory.second < elements) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(memory.second) +
                                " elements, but needs " + std::to_string(elements));
  }
  return reinterpret_cast<T*>(memory.first);
}

template <class T>
T* values(const OptionalMemory& memory, int64_t elements, const char* name) {
  return memory ? values<T>(*memory, elements, name) : nullptr;
}

struct TypedValues {
  void* address = nullptr;
  int type = kNone;
};

inline TypedValues typed(const TypedMemory& memory, int64_t elements, const char* name) {
  if (!memory) return {};
  const auto [address, count, type] = *memory;
  require(type >= kFloat32 && type <= kBfloat16, "a float map is float32, float16 or bfloat16");
  return {values<void>(Memory{address, count}, elements, name), type};
}

inline int64_t words(int64_t channels) { return (channels + 31) / 32; }

void define_maps(py::module_& m);
void define_ends(py::module_& m);

}  // namespace biper
