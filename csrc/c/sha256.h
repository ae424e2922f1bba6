// SHA-256, as FIPS 180-4 defines it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace biper {

class Sha256 {
 public:
  void add(const void* bytes, size_t size);

  // The digest in 64 hexadecimal digits; nothing is added after it.
  std::string finish();

 private:
  void add_block(const uint8_t* block);

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> rest_{};  // bytes of an unfinished block
  uint64_t size_ = 0;
};

}  // namespace biper
