// The outer form of a .biper file, checked as biper_engine/serialization checks it: kind, length,
// version, table of tensors and checksum.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "json.h"

namespace biper {

// Memory that is aligned for any tensor, so that those of a file mostly are.
class Bytes {
 public:
  explicit Bytes(size_t size);  // throws std::bad_alloc

  char* data() const { return memory_.get(); }
  size_t size() const { return size_; }
  std::string_view view() const { return {memory_.get(), size_}; }

 private:
  std::unique_ptr<char, void (*)(void*)> memory_;
  size_t size_;
};

struct FileTensor {
  std::string type;  // as safetensors names it
  std::vector<int64_t> sizes;
  int64_t values = 1;
  const char* data = nullptr;  // in the file's bytes; not always aligned
  size_t bytes = 0;
};

struct File {
  Json header;
  std::string header_text;
  std::map<std::string, FileTensor> tensors;
  std::shared_ptr<const Bytes> bytes;  // that the tensors lie in
};

// Reads a regular file. Throws Error where it cannot.
Bytes read_bytes(const std::string& path);

// Reads and checks a .biper file; `name` is what messages call it. Throws Error.
File open_file(const std::string& name, Bytes bytes);

}  // namespace biper
