#include "arguments.h"

namespace biper {

void require_type(const char* name, int64_t type, int32_t wanted) {
  if (type == wanted) return;
  fail("`" + std::string(name) + "` has memory of type " + std::to_string(type) + ", but of type " +
       std::to_string(wanted) + " is wanted (1: float32, 5: int32, 6: bool).");
}

bool Arguments::has(const char* name) const {
  read_.insert(name);
  const auto found = values_.find(name);
  return found != values_.end() && !std::holds_alternative<std::monostate>(found->second);
}

template <class T>
const T& Arguments::get(const char* name, const char* kind) const {
  if (!has(name)) fail("`" + std::string(name) + "` is missing.");
  const T* value = std::get_if<T>(&values_.at(name));
  if (value == nullptr) fail("`" + std::string(name) + "` must be " + kind + ".");
  return *value;
}

int64_t Arguments::integer(const char* name) const { return get<int64_t>(name, "an integer"); }

int64_t Arguments::integer(const char* name, int64_t otherwise) const {
  return has(name) ? integer(name) : otherwise;
}

bool Arguments::flag(const char* name) const { return get<bool>(name, "a bool"); }

bool Arguments::flag(const char* name, bool otherwise) const {
  return has(name) ? flag(name) : otherwise;
}

double Arguments::real(const char* name, double otherwise) const {
  if (!has(name)) return otherwise;
  const int64_t* whole = std::get_if<int64_t>(&values_.at(name));  // as a limit of 6 may be written
  return whole ? static_cast<double>(*whole) : get<double>(name, "a number");
}

float Arguments::number(const char* name, float otherwise) const {
  return static_cast<float>(real(name, static_cast<double>(otherwise)));
}

std::vector<int64_t> Arguments::integers(const char* name) const {
  return get<std::vector<int64_t>>(name, "a tuple of integers");
}

std::string Arguments::text(const char* name) const { return get<std::string>(name, "a string"); }

std::vector<int64_t> Arguments::integers(const char* name, size_t count) const {
  const std::vector<int64_t> found = integers(name);
  if (found.size() != count) {
    fail("`" + std::string(name) + "` has " + std::to_string(found.size()) + " integers, but " +
         std::to_string(count) + " are wanted.");
  }
  return found;
}

Window Arguments::window(const char* name) const {
  const std::vector<int64_t> v = integers(name, 6);
  return {v[0], v[1], v[2], v[3], v[4], v[5]};
}

ConvGeometry Arguments::geometry(const char* name) const {
  const std::vector<int64_t> v = integers(name, 13);
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12]};
}

void Arguments::require_all_read() const {
  for (const auto& [name, value] : values_) {
    if (read_.count(name) == 0) fail("`" + name + "` is no argument of this step.");
  }
}

}  // namespace biper
