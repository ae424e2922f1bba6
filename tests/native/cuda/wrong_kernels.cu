// Kernels with one mistake each, which the emulator must find.
//
// Each reverses the values of a block through shared memory: the result shows what was read too
// early or too late.

#include <map>
#include <stdexcept>
#include <string>

#include "emulated.h"
#include "platform.cuh"

namespace biper {
namespace {

constexpr int kThreads = 128;
constexpr int kRounds = 3;  // each reverses again
constexpr int kSharedBytes = kThreads * int(sizeof(int));

struct Reversal {
  const int* in;
  int* out;
};

__device__ int* tile() { return reinterpret_cast<int*>(dynamic_shared()); }

__device__ void reverse_once(int* tile, int& value) {
  tile[threadIdx.x] = value;
  __syncthreads();
  value = tile[kThreads - 1 - threadIdx.x];
  __syncthreads();
}

__global__ void correct(Reversal p) {
  int value = p.in[threadIdx.x];
  for (int i = 0; i < kRounds; ++i) reverse_once(tile(), value);
  p.out[threadIdx.x] = value;
}

__global__ void correct_in_static_shared(Reversal p) {
  __shared__ __align__(16) int tile[kThreads];
  if (threadIdx.x < kThreads / 4)
    cp_async<16>(tile + 4 * threadIdx.x, p.in + 4 * threadIdx.x, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  p.out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

__global__ void missing_barrier(Reversal p) {
  tile()[threadIdx.x] = p.in[threadIdx.x];
  p.out[threadIdx.x] = tile()[kThreads - 1 - threadIdx.x];
}

__global__ void missing_barrier_before_reuse(Reversal p) {
  int value = p.in[threadIdx.x];
  for (int i = 0; i < kRounds; ++i) {
    tile()[threadIdx.x] = value;
    __syncthreads();
    value = tile()[kThreads - 1 - threadIdx.x];
  }
  p.out[threadIdx.x] = value;
}

__global__ void missing_warp_barrier(Reversal p) {
  const unsigned reversed_warp = threadIdx.x ^ 31;
  tile()[threadIdx.x] = p.in[kThreads - 1 - ((threadIdx.x & ~31u) | (reversed_warp & 31))];
  p.out[threadIdx.x] = tile()[reversed_warp];
}

__global__ void missing_wait(Reversal p) {
  cp_async<4>(tile() + threadIdx.x, p.in + threadIdx.x, true);
  cp_async_commit();
  __syncthreads();
  p.out[threadIdx.x] = tile()[kThreads - 1 - threadIdx.x];
}

__global__ void missing_commit(Reversal p) {
  cp_async<4>(tile() + threadIdx.x, p.in + threadIdx.x, true);
  cp_async_wait<0>();
  __syncthreads();
  p.out[threadIdx.x] = tile()[kThreads - 1 - threadIdx.x];
}

__global__ void wait_for_too_few(Reversal p) {
  cp_async<4>(tile() + threadIdx.x, p.in + threadIdx.x, true);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  p.out[threadIdx.x] = tile()[kThreads - 1 - threadIdx.x];
}

__global__ void wait_without_barrier(Reversal p) {
  cp_async<4>(tile() + threadIdx.x, p.in + threadIdx.x, true);
  cp_async_commit();
  cp_async_wait<0>();
  p.out[threadIdx.x] = tile()[kThreads - 1 - threadIdx.x];
}

__global__ void source_changes_before_the_wait(Reversal p) {
  p.out[threadIdx.x] = p.in[kThreads - 1 - threadIdx.x];
  cp_async<4>(tile() + threadIdx.x, p.out + threadIdx.x, true);
  cp_async_commit();
  p.out[threadIdx.x] = -1;
  cp_async_wait<0>();
  p.out[threadIdx.x] = tile()[threadIdx.x];
}

__global__ void misaligned_copy(Reversal p) {
  if (threadIdx.x == 0) cp_async<8>(tile() + 1, p.in, true);
  correct(p);
}

__global__ void copy_beyond_shared(Reversal p) {
  if (threadIdx.x == 0) cp_async<16>(tile() + kThreads, p.in, false);
  correct(p);
}

__global__ void copy_to_global(Reversal p) {
  if (threadIdx.x == 0) cp_async<4>(p.out, p.in, true);
  correct(p);
}

__global__ void divergent_barrier(Reversal p) {
  int value = p.in[threadIdx.x];
  if (threadIdx.x < 100) {
    reverse_once(tile(), value);
  } else {
    __syncthreads();
    __syncthreads();
  }
  p.out[threadIdx.x] = value;
}

__global__ void barrier_after_a_return(Reversal p) {
  if (threadIdx.x == 77) return;
  correct(p);
}

__global__ void barrier_beside_a_collective(Reversal p) {
  if (threadIdx.x == 5) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  correct(p);
}

__global__ void different_collectives(Reversal p) {
  if (threadIdx.x & 1) {
    __syncwarp();
  } else {
    __ballot_sync(~0u, 1);
  }
  correct(p);
}

__global__ void different_masks(Reversal p) {
  __syncwarp(threadIdx.x % 32 < 16 ? ~0u : 0xffff0000u);
  correct(p);
}

__global__ void lane_outside_its_mask(Reversal p) {
  __syncwarp(0x7fffffffu);
  correct(p);
}

__global__ void product_after_a_return(Reversal p) {
  if (threadIdx.x == 33) return;
  int d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  bmma_and_popc(d, a, b);
  p.out[threadIdx.x] = d[0];
}

__global__ void trap(Reversal p) {
  if (threadIdx.x == 3) __trap();
  correct(p);
}

__global__ void exception(Reversal p) {
  if (threadIdx.x == 4) throw std::out_of_range("thrown in a kernel");
  correct(p);
}

__global__ void write_beyond_shared(Reversal p) {
  if (threadIdx.x == 0) tile()[kThreads] = 0;
  correct(p);
}

__global__ void write_before_shared(Reversal p) {
  if (threadIdx.x == 0) tile()[-1] = 0;
  correct(p);
}

__global__ void write_below_the_stack(Reversal p) {
  void* const stack = const_cast<void*>(emulator::current->context.stack);
  if (threadIdx.x == 9) static_cast<volatile unsigned char*>(stack)[-64] = 0;
  correct(p);
}

__global__ void misaligned_vector(Reversal p) {
  if (threadIdx.x == 0) *reinterpret_cast<uint4*>(tile() + 1) = make_uint4(0, 0, 0, 0);
  __syncthreads();
  correct(p);
}

using Kernel = void (*)(Reversal);

const std::map<std::string, Kernel>& kernels() {
#define BIPER_KERNEL(NAME) \
  {                        \
    #NAME, NAME            \
  }
  static const std::map<std::string, Kernel> all = {
      BIPER_KERNEL(correct),
      BIPER_KERNEL(correct_in_static_shared),
      BIPER_KERNEL(missing_barrier),
      BIPER_KERNEL(missing_barrier_before_reuse),
      BIPER_KERNEL(missing_warp_barrier),
      BIPER_KERNEL(missing_wait),
      BIPER_KERNEL(missing_commit),
      BIPER_KERNEL(wait_for_too_few),
      BIPER_KERNEL(wait_without_barrier),
      BIPER_KERNEL(source_changes_before_the_wait),
      BIPER_KERNEL(misaligned_copy),
      BIPER_KERNEL(copy_beyond_shared),
      BIPER_KERNEL(copy_to_global),
      BIPER_KERNEL(divergent_barrier),
      BIPER_KERNEL(barrier_after_a_return),
      BIPER_KERNEL(barrier_beside_a_collective),
      BIPER_KERNEL(different_collectives),
      BIPER_KERNEL(different_masks),
      BIPER_KERNEL(lane_outside_its_mask),
      BIPER_KERNEL(product_after_a_return),
      BIPER_KERNEL(trap),
      BIPER_KERNEL(exception),
      BIPER_KERNEL(write_beyond_shared),
      BIPER_KERNEL(write_before_shared),
      BIPER_KERNEL(write_below_the_stack),
      BIPER_KERNEL(misaligned_vector),
  };
#undef BIPER_KERNEL
  return all;
}

}  // namespace

Outcome run_wrong_kernel(const std::string& name) {
  alignas(16) int in[kThreads];
  alignas(16) int out[kThreads] = {};
  for (int i = 0; i < kThreads; ++i) in[i] = 1000 + i;
  const Reversal params = {in, out};
  Outcome outcome = {};
  outcome.error = launch(kernels().at(name), 1, kThreads, kSharedBytes, nullptr, params);
  for (int i = 0; i < kThreads; ++i) outcome.differ += out[i] != in[kThreads - 1 - i];
  return outcome;
}

}  // namespace biper
