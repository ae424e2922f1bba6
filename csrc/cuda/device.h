// Properties of the current device, by capability, without CUDA headers.

#pragma once

namespace biper {

struct DeviceProperties {
  int capability;       // 10 * major + minor, such as 90
  int processors;       // streaming multiprocessors
  int shared_bytes;     // most shared memory of a block
  bool has_binary_mma;  // products of bits in one instruction
  bool has_byte_mma;    // products of 8-bit integers, 16 x 8 x 32
  bool has_half_mma;    // products of float16 and bfloat16, 16 x 8 x 16
};

// Query the current device; the result is cached. Returns nullptr, or what went wrong.
const char* current_device(DeviceProperties* properties);

// The number of devices; if it cannot be queried, `error` is the error's text.
int device_count(const char** error);

}  // namespace biper
