#include "npy.h"

#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <system_error>

namespace {

constexpr size_t kMostRank = 16;

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw std::runtime_error("Cannot read '" + path + "': " + what + ".");
}

// The text behind a key of the dictionary in an .npy header, which is written in Python.
std::string behind(const std::string& path, const std::string& header, const std::string& key) {
  const size_t at = header.find("'" + key + "':");
  if (at == std::string::npos) refuse(path, "its header has no " + key);
  const size_t first = header.find_first_not_of(' ', at + key.size() + 3);
  return first == std::string::npos ? "" : header.substr(first);
}

std::vector<int64_t> sizes_in(const std::string& path, const std::string& text) {
  std::vector<int64_t> sizes;
  const size_t end = text.find(')');
  if (text.empty() || text[0] != '(' || end == std::string::npos) refuse(path, "it has no shape");
  std::istringstream items(text.substr(1, end - 1));
  for (std::string item; std::getline(items, item, ',');) {
    const size_t first = item.find_first_not_of(' ');
    if (first == std::string::npos) continue;
    const std::string digits = item.substr(first);
    if (digits.find_first_not_of("0123456789") != std::string::npos || digits.size() > 9) {
      refuse(path, "its shape has the size " + digits.substr(0, 40));
    }
    sizes.push_back(std::stoll(digits));
  }
  if (sizes.size() > kMostRank) refuse(path, "it has too many dimensions");
  return sizes;
}

int64_t count_of(const std::string& path, const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(count, size, &count) ||
        count > std::numeric_limits<int64_t>::max() / 8) {
      refuse(path, "it is too large");
    }
  }
  return count;
}

// A number of a PGM or PPM header, behind spaces and comments.
int64_t number_in(const std::string& path, const std::string& text, size_t& at) {
  while (at < text.size() &&
         (std::isspace(static_cast<unsigned char>(text[at])) != 0 || text[at] == '#')) {
    if (text[at] == '#') {
      while (at < text.size() && text[at] != '\n') ++at;
    } else {
      ++at;
    }
  }
  int64_t value = 0;
  const size_t first = at;
  while (at < text.size() && std::isdigit(static_cast<unsigned char>(text[at])) != 0) {
    value = value * 10 + (text[at++] - '0');
    if (value > 1 << 20) refuse(path, "its header has a number that is too large");
  }
  if (at == first) refuse(path, "its header lacks a number");
  return value;
}

// Whether it begins as an image of Netpbm: "P5" and white space, for example.
bool is_netpbm(const std::string& contents) {
  return contents.size() > 2 && contents[0] == 'P' && contents[1] >= '1' && contents[1] <= '7' &&
         (std::isspace(static_cast<unsigned char>(contents[2])) != 0 || contents[2] == '#');
}

// What the header of a BMP image says of its size.
size_t bitmap_bytes(const std::string& contents) {
  size_t bytes = 0;
  for (size_t i = 6; i-- > 2;) bytes = bytes << 8 | static_cast<uint8_t>(contents[i]);
  return bytes;
}

}  // namespace

std::string read_file(const std::string& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::ostringstream contents;
  if (file) contents << file.rdbuf();
  if (!file || file.bad() || contents.str().empty()) {
    refuse(path, errno != 0 ? std::strerror(errno) : "it is empty, or no regular file");
  }
  return contents.str();
}

bool is_npy(const std::string& contents) { return contents.compare(0, 6, "\x93NUMPY") == 0; }

bool is_pixmap(const std::string& contents) {
  return is_netpbm(contents) && (contents[1] == '5' || contents[1] == '6');
}

std::string image_kind(const std::string& contents) {
  const auto has = [&](size_t at, std::string_view start) {
    return contents.size() > at && contents.compare(at, start.size(), start) == 0;
  };
  if (has(0, "\x89PNG")) return "a PNG image";
  // The fourth byte is that of a marker; no image begins with so large a float.
  if (has(0, "\xFF\xD8\xFF") && contents.size() > 3 && static_cast<uint8_t>(contents[3]) >= 0xDB) {
    return "a JPEG image";
  }
  if (has(0, "GIF8")) return "a GIF image";
  if (has(0, "RIFF") && has(8, "WEBP")) return "a WebP image";
  if (has(0, {"II*\0", 4}) || has(0, {"MM\0*", 4})) return "a TIFF image";
  if (has(4, "ftyp")) return "a HEIF or AVIF image, or a film";
  if (has(0, "BM") && contents.size() >= 6 && bitmap_bytes(contents) == contents.size()) {
    return "a BMP image";
  }
  if (is_netpbm(contents)) return "a PBM, PGM, PPM or PAM image that is not of bytes (P5 or P6)";
  if (has(0, "PK\x03\x04")) return "a zip archive";
  return "";
}

Array read_npy(const std::string& path, const std::string& contents) {
  if (!is_npy(contents) || contents.size() < 12) refuse(path, "it is no .npy file");
  const auto byte = [&](size_t i) {
    return static_cast<size_t>(static_cast<uint8_t>(contents[i]));
  };
  const size_t version = byte(6), first = version == 1 ? 10 : 12;
  if (version < 1 || version > 3) refuse(path, "it is an .npy file of an unknown version");
  size_t length = byte(8) | byte(9) << 8;
  if (version > 1) length |= byte(10) << 16 | byte(11) << 24;
  if (length > contents.size() - first) refuse(path, "it is truncated");
  const std::string header = contents.substr(first, length);
  const std::string type = behind(path, header, "descr");
  Array array;
  array.is_bytes = type.compare(0, 5, "'|u1'") == 0;
  if (!array.is_bytes && type.compare(0, 5, "'<f4'") != 0) {
    refuse(path, "its values are " + type.substr(0, type.find(',')) +
                     ", but float32 ('<f4') or bytes ('|u1') are wanted");
  }
  if (behind(path, header, "fortran_order").compare(0, 5, "False") != 0) {
    refuse(path, "it is in the order of Fortran; save numpy.ascontiguousarray of it");
  }
  array.sizes = sizes_in(path, behind(path, header, "shape"));
  array.values = contents.substr(first + length);
  const int64_t bytes = count_of(path, array.sizes) * (array.is_bytes ? 1 : 4);
  if (static_cast<int64_t>(array.values.size()) != bytes) {
    refuse(path, "it has not the values of its shape");
  }
  return array;
}

Array read_pixmap(const std::string& path, const std::string& contents) {
  if (!is_pixmap(contents)) refuse(path, "it is no PGM or PPM image of bytes (P5 or P6)");
  size_t at = 2;
  const int64_t width = number_in(path, contents, at), height = number_in(path, contents, at);
  const int64_t most = number_in(path, contents, at);
  if (most != 255) refuse(path, "its pixels go up to " + std::to_string(most) + ", not to 255");
  Array array;
  array.is_bytes = true;
  array.sizes = {height, width, contents[1] == '5' ? 1 : 3};
  const size_t bytes = static_cast<size_t>(count_of(path, array.sizes));
  ++at;  // one space
  if (bytes == 0 || at > contents.size() || contents.size() - at < bytes) {
    refuse(path, "it is truncated");
  }
  array.values = contents.substr(at, bytes);
  return array;
}

void write_npy(const std::string& path, const std::vector<int64_t>& sizes,
               const std::vector<float>& values) {
  std::string shape;
  for (const int64_t size : sizes) shape += std::to_string(size) + ", ";
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.append(63 - (10 + header.size()) % 64, ' ').append("\n");
  // A new file is written under another name first, so that no half of one is left.
  std::error_code unknown;
  const bool plain =
      !std::filesystem::exists(path, unknown) || std::filesystem::is_regular_file(path, unknown);
  const std::string to = plain ? path + ".part" : path;
  errno = 0;
  std::ofstream file(to, std::ios::binary);
  const bool opened = file.is_open();
  const char length[] = {static_cast<char>(header.size() & 0xFF),
                         static_cast<char>(header.size() >> 8)};
  file.write("\x93NUMPY\x01\x00", 8).write(length, 2);
  file << header;
  file.write(reinterpret_cast<const char*>(values.data()),
             static_cast<std::streamsize>(values.size() * sizeof(float)));
  file.close();
  if (file && (!plain || std::rename(to.c_str(), path.c_str()) == 0)) return;
  const std::string reason = errno != 0 ? std::strerror(errno) : "the system says no reason";
  if (plain && opened) std::remove(to.c_str());
  throw std::runtime_error("Cannot write '" + path + "': " + reason + ".");
}
