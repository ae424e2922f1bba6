// The device of the emulated module, in the place of csrc/cuda/device.cu.

#include <cstdlib>

#include "device.h"

namespace biper {

// BIPER_EMULATED_CAPABILITY says which device it is like, such as 90; read at every call.
const char* current_device(DeviceProperties* properties) {
  const char* text = std::getenv("BIPER_EMULATED_CAPABILITY");
  const int capability = text == nullptr ? 90 : std::atoi(text);
  const int major = capability / 10;
  *properties = {capability, 2, 99 * 1024, major == 8 || major == 9, major >= 8};
  return nullptr;
}

int device_count(const char** error) {
  *error = nullptr;
  return 1;
}

const char* set_device(int) { return nullptr; }

}  // namespace biper
