// Memory of a test: exactly as large as asked for, so that a sanitizer sees what goes beyond it.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace biper {

class Memory {
 public:
  // Holds `bytes` bytes that end where the allocation ends and start `shift` bytes into it.
  Memory(int64_t bytes, int64_t shift, uint8_t fill)
      : block_(static_cast<size_t>(bytes + shift), fill), shift_(static_cast<size_t>(shift)) {}

  Memory(const std::vector<uint8_t>& contents, int64_t shift)
      : Memory(static_cast<int64_t>(contents.size()), shift, 0) {
    if (!contents.empty()) std::memcpy(data(), contents.data(), contents.size());
  }

  uint8_t* data() { return block_.data() + shift_; }
  int64_t size() const { return static_cast<int64_t>(block_.size() - shift_); }

 private:
  std::vector<uint8_t> block_;
  size_t shift_;
};

}  // namespace biper
