// Kernels with 1-bit products, for compute capabilities 8 and 9.

#include "bconv_cut.cuh"

namespace biper {

const char* launch_bits(const Cut& cut, cudaStream_t stream) {
  return launch_mma<false>(cut, stream);
}

}  // namespace biper
