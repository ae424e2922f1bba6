// JSON texts, and nothing that JSON does not define: no NaN, no key twice, valid UTF-8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace biper {

class Json {
 public:
  enum class Kind { kNull, kBool, kInteger, kReal, kLarge, kString, kArray, kObject };

  Kind kind = Kind::kNull;
  bool flag = false;
  int64_t integer = 0;  // kLarge: an integer that does not fit, without a value
  double real = 0.0;
  std::string text;               // of a string
  std::vector<std::string> keys;  // of an object, one for each of its items
  std::vector<Json> items;        // of an array or an object
  size_t first = 0, last = 0;     // where it begins and ends in the text that was parsed

  bool is(Kind wanted) const { return kind == wanted; }

  // The value of a key of an object; null where there is none, or where this is no object.
  const Json* find(std::string_view key) const;
};

// Throws std::invalid_argument where `text` is no such JSON, or is nested too deep.
Json parse_json(std::string_view text);

}  // namespace biper
