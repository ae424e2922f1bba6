#include <mutex>

#include "device.h"
#include "platform.cuh"

namespace biper {
namespace {

constexpr int kMostDevices = 64;

const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// An empty kernel: if it has code for a device, all kernels have.
__global__ void probe() {}

const char* ask(int index, DeviceProperties* properties) {
  cudaFuncAttributes attributes;
  if (const char* error = text_of(cudaFuncGetAttributes(&attributes, probe))) return error;
  int major = 0, minor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } questions[] = {
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMultiProcessorCount, &properties->processors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &properties->shared_bytes},
  };
  for (const auto& question : questions) {
    if (const char* error =
            text_of(cudaDeviceGetAttribute(question.value, question.attribute, index))) {
      return error;
    }
  }
  properties->capability = 10 * major + minor;
  properties->has_binary_mma = major == 8 || major == 9;  // later devices emulate it
  properties->has_byte_mma = properties->has_half_mma = major >= 8;
  return nullptr;
}

}  // namespace

const char* current_device(DeviceProperties* properties) {
  static DeviceProperties known[kMostDevices];
  static bool is_known[kMostDevices];
  static std::mutex mutex;
  int index = 0;
  if (const char* error = text_of(cudaGetDevice(&index))) return error;
  if (index >= kMostDevices) return ask(index, properties);
  const std::lock_guard<std::mutex> lock(mutex);
  if (!is_known[index]) {
    if (const char* error = ask(index, &known[index])) return error;
    is_known[index] = true;
  }
  *properties = known[index];
  return nullptr;
}

int device_count(const char** error) {
  int count = 0;
  *error = text_of(cudaGetDeviceCount(&count));
  return *error == nullptr ? count : 0;
}

}  // namespace biper
