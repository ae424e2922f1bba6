// What the current device can do, by capability. Free of CUDA headers.

#pragma once

namespace biper {

struct DeviceProperties {
  int capability;       // 10 * major + minor, such as 90
  int processors;       // streaming multiprocessors
  int shared_bytes;     // of shared memory that a block may have
  bool has_binary_mma;  // products of bits in one instruction
  bool has_byte_mma;    // products of 8-bit integers, 16 x 8 x 32
  bool has_half_mma;    // products of float16 and bfloat16, 16 x 8 x 16
};

// Ask about the current device; answers are kept. Returns nullptr, or what went wrong.
const char* current_device(DeviceProperties* properties);

// How many devices there are; an error's text in `error` where that cannot be told.
int device_count(const char** error);

}  // namespace biper
