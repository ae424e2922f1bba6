// The device of the emulated module, in the place of csrc/cuda/device.cu and peak.cu.

#include <cstdlib>

#include "device.h"
#include "peak.h"

namespace biper {

namespace {

int variable(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}

}  // namespace

// Variables say which device it is like; they are read at every call.
const char* current_device(DeviceProperties* properties) {
  const int capability = variable("BIPER_EMULATED_CAPABILITY", 90);
  const int major = capability / 10;
  properties->capability = capability;
  properties->processors = 2;
  properties->shared_bytes = variable("BIPER_EMULATED_SHARED_BYTES", 227 * 1024);
  properties->has_binary_mma = major == 8 || major == 9;
  properties->has_byte_mma = properties->has_half_mma = major >= 8;
  return nullptr;
}

int device_count(const char** error) {
  *error = nullptr;
  return 1;
}

const char* measure_peak(int, int, double*) { return "an emulator has no peak"; }

}  // namespace biper
