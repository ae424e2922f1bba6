// Kernels with products of bytes, for devices without 1-bit products.

#include "bconv_cut.cuh"

namespace biper {

const char* launch_bytes(const Cut& cut, cudaStream_t stream) {
  return launch_mma<true>(cut, stream);
}

}  // namespace biper
