// What a step is made from: values by name, as Python passes them, read without Python.
#pragma once

#include <map>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "conv.h"

namespace biper {

constexpr int64_t kNoMap = -1;

// Types of memory beside those of FloatType, as biper_engine/ops/native_arguments.py counts them.
constexpr int32_t kWords = 5, kFlags = 6;

template <class T>
constexpr int32_t type_of() {
  using Element = std::remove_const_t<T>;
  if (std::is_same_v<Element, float>) return static_cast<int32_t>(FloatType::kFloat32);
  return sizeof(Element) == 4 ? kWords : kFlags;
}

// Throws unless memory has the wanted type: of another one it may have fewer bytes than its
// elements would need.
void require_type(const char* name, int64_t type, int32_t wanted);

// Every function throws std::invalid_argument where a value is missing or of another kind. Nothing
// stands for an optional value: no such name, or a name without a value.
class Arguments {
 public:
  // Lists of integers are maps, windows, geometries, sizes, and memory as (address, elements,
  // type).
  using Value =
      std::variant<std::monostate, bool, int64_t, double, std::vector<int64_t>, std::string>;
  using Values = std::map<std::string, Value>;

  explicit Arguments(Values values) : values_(std::move(values)) {}

  int64_t integer(const char* name) const;
  int64_t integer(const char* name, int64_t otherwise) const;
  int64_t map(const char* name) const { return integer(name); }
  int64_t optional_map(const char* name) const { return integer(name, kNoMap); }
  bool flag(const char* name) const;
  bool flag(const char* name, bool otherwise) const;
  float number(const char* name, float otherwise) const;
  double real(const char* name, double otherwise) const;
  std::vector<int64_t> integers(const char* name) const;
  std::vector<int64_t> integers(const char* name, size_t count) const;
  std::string text(const char* name) const;
  Window window(const char* name) const;
  ConvGeometry geometry(const char* name) const;

  // Memory of the caller.
  template <class T>
  Span<const T> span(const char* name) const {
    const std::vector<int64_t> memory = integers(name, 3);
    require_type(name, memory[2], type_of<T>());
    return {reinterpret_cast<const T*>(memory[0]), memory[1]};
  }
  template <class T>
  Span<const T> optional_span(const char* name) const {
    return has(name) ? span<T>(name) : Span<const T>{};
  }

  bool has(const char* name) const;

  // Throws where there is a value that nobody has read.
  void require_all_read() const;

 private:
  template <class T>
  const T& get(const char* name, const char* kind) const;

  Values values_;
  mutable std::set<std::string> read_;
};

}  // namespace biper
