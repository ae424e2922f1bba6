#include "json.h"

#include <charconv>
#include <cmath>
#include <locale>
#include <set>
#include <sstream>
#include <stdexcept>

namespace biper {
namespace {

constexpr int kMostDepth = 256;
constexpr size_t kMostDigits = 4300;  // of an integer, as Python reads them

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

bool is_digit(char c) { return c >= '0' && c <= '9'; }

double real_of(const std::string& text) {
  std::istringstream in(text);
  in.imbue(std::locale::classic());
  double value = 0.0;
  in >> value;
  const bool tiny = std::abs(value) < 1.0;  // rounded to 0 or to a number with fewer digits
  if ((in.fail() && !tiny) || !std::isfinite(value)) refuse(text.substr(0, 40) + " is no number");
  return value;
}

// The bytes of a character outside of ASCII.
void append_utf8(uint32_t code, std::string& to) {
  const auto tail = [&](int shift) { to += static_cast<char>(0x80 | ((code >> shift) & 0x3F)); };
  if (code < 0x80) {
    to += static_cast<char>(code);
  } else if (code < 0x800) {
    to += static_cast<char>(0xC0 | (code >> 6));
    tail(0);
  } else if (code < 0x10000) {
    to += static_cast<char>(0xE0 | (code >> 12));
    tail(6);
    tail(0);
  } else {
    to += static_cast<char>(0xF0 | (code >> 18));
    tail(12);
    tail(6);
    tail(0);
  }
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json parse() {
    Json value = parse_value(0);
    skip_spaces();
    if (at_ != text_.size()) refuse("there is more behind its end");
    return value;
  }

 private:
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip_spaces() {
    while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != text_.npos) ++at_;
  }

  void expect(char c) {
    skip_spaces();
    if (peek() != c || at_ >= text_.size()) {
      refuse(std::string("'") + c + "' is wanted at byte " + std::to_string(at_));
    }
    ++at_;
  }

  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json parse_value(int depth) {
    if (depth > kMostDepth) refuse("it is nested too deep");
    skip_spaces();
    Json value;
    value.first = at_;
    const char c = peek();
    if (c == '{') {
      parse_object(depth, value);
    } else if (c == '[') {
      parse_array(depth, value);
    } else if (c == '"') {
      value.kind = Json::Kind::kString;
      value.text = parse_string();
    } else if (c == '-' || is_digit(c)) {
      parse_number(value);
    } else if (take("true") || take("false")) {
      value.kind = Json::Kind::kBool;
      value.flag = c == 't';
    } else if (!take("null")) {
      refuse("there is no value at byte " + std::to_string(at_));
    }
    value.last = at_;
    return value;
  }

  void parse_array(int depth, Json& value) {
    value.kind = Json::Kind::kArray;
    expect('[');
    skip_spaces();
    if (peek() == ']') {
      ++at_;
      return;
    }
    for (;;) {
      value.items.push_back(parse_value(depth + 1));
      skip_spaces();
      if (peek() != ',') break;
      ++at_;
    }
    expect(']');
  }

  void parse_object(int depth, Json& value) {
    value.kind = Json::Kind::kObject;
    expect('{');
    skip_spaces();
    if (peek() == '}') {
      ++at_;
      return;
    }
    std::set<std::string> seen;
    for (;;) {
      skip_spaces();
      std::string key = parse_string();
      if (!seen.insert(key).second) refuse("an object has a key twice");
      expect(':');
      value.keys.push_back(std::move(key));
      value.items.push_back(parse_value(depth + 1));
      skip_spaces();
      if (peek() != ',') break;
      ++at_;
    }
    expect('}');
  }

  void parse_number(Json& value) {
    const size_t first = at_;
    if (peek() == '-') ++at_;
    const size_t digits = at_;
    skip_digits();
    if (at_ - digits > 1 && text_[digits] == '0') refuse("a number begins with 0");
    bool whole = true;
    if (peek() == '.') {
      ++at_;
      skip_digits();
      whole = false;
    }
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      skip_digits();
      whole = false;
    }
    const std::string_view text = text_.substr(first, at_ - first);
    if (!whole) {
      value.kind = Json::Kind::kReal;
      value.real = real_of(std::string(text));
      return;
    }
    if (text.size() > kMostDigits) refuse("an integer is too long");
    const auto read = std::from_chars(text.data(), text.data() + text.size(), value.integer);
    value.kind = read.ec == std::errc() ? Json::Kind::kInteger : Json::Kind::kLarge;
  }

  void skip_digits() {
    if (!is_digit(peek())) refuse("a digit is wanted at byte " + std::to_string(at_));
    while (is_digit(peek())) ++at_;
  }

  std::string parse_string() {
    expect('"');
    std::string made;
    for (;;) {
      if (at_ >= text_.size()) refuse("a string does not end");
      const unsigned char c = static_cast<unsigned char>(text_[at_]);
      if (c == '"') {
        ++at_;
        return made;
      }
      if (c < 0x20) refuse("a string has a control character");
      if (c == '\\') {
        ++at_;
        parse_escape(made);
      } else {
        copy_character(made);
      }
    }
  }

  void parse_escape(std::string& made) {
    const char c = peek();
    ++at_;
    const size_t found = std::string_view("\"\\/bfnrt").find(c);
    if (c == 'u') {
      uint32_t code = parse_hex();
      if (code >= 0xD800 && code < 0xDC00 && text_.substr(at_, 2) == "\\u") {
        const size_t before = at_;
        at_ += 2;
        const uint32_t low = parse_hex();
        if (low >= 0xDC00 && low < 0xE000) {
          code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        } else {
          at_ = before;
        }
      }
      append_utf8(code, made);  // also of half a pair, which Python's strings may have
    } else if (c != '\0' && found != std::string_view::npos) {
      made += "\"\\/\b\f\n\r\t"[found];
    } else {
      refuse("a string has an unknown escape");
    }
  }

  uint32_t parse_hex() {
    const std::string_view digits = text_.substr(at_, 4);
    uint32_t code = 0;
    const auto read = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
    if (digits.size() != 4 || read.ptr != digits.data() + 4) refuse("an escape lacks digits");
    at_ += 4;
    return code;
  }

  // Copies a character of UTF-8: the shortest form, and no half of a pair.
  void copy_character(std::string& made) {
    const auto byte = [&](size_t i) {
      return at_ + i < text_.size() ? static_cast<unsigned char>(text_[at_ + i]) : 0u;
    };
    const uint32_t c = byte(0);
    size_t length = 1;
    uint32_t code = c;
    if (c >= 0x80) {
      length = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : 2;
      code = c & (0xFFu >> (length + 1));
      if (c < 0xC2 || c > 0xF4) refuse("it is not UTF-8");
      for (size_t i = 1; i < length; ++i) {
        if ((byte(i) & 0xC0) != 0x80) refuse("it is not UTF-8");
        code = code << 6 | (byte(i) & 0x3F);
      }
      const uint32_t least = length == 2 ? 0x80 : length == 3 ? 0x800 : 0x10000;
      if (code < least || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) {
        refuse("it is not UTF-8");
      }
    }
    made.append(text_.substr(at_, length));
    at_ += length;
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view key) const {
  for (size_t i = 0; i < keys.size(); ++i) {
    if (keys[i] == key) return &items[i];
  }
  return nullptr;
}

Json parse_json(std::string_view text) { return Parser(text).parse(); }

}  // namespace biper
