// The instructions that kernels use, with one name for all targets.
//
// With nvcc they are inline PTX and intrinsics. With a C++ compiler, cuda_emulator.h of the tests
// defines the same names, so that kernels and launchers run on a CPU without changes.
// Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k256", ".m16n8k32" and ".m16n8k16".

#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __CUDACC__
#include "cuda_emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace biper {

// -- tensor cores: d += a * b, rows of 16, columns of 8 -----------------------------------------

// d[i] += popc(a & b) over 256 bits. One instruction from sm_80 to sm_90, none on others.
__device__ __forceinline__ void bmma_and_popc(int (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1000
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  (void)a, (void)b;
  d[0] = d[1] = d[2] = d[3] = 0;
  __trap();
#endif
}

// Unsigned bytes, 32 products for each d[i]. sm_80 and later.
__device__ __forceinline__ void imma_u8(int (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  (void)a, (void)b;
  d[0] = d[1] = d[2] = d[3] = 0;
  __trap();
#endif
}

// float16 operands, two in a word, 16 products for each d[i], sums in float32. sm_80 and later.
__device__ __forceinline__ void hmma_f16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  (void)a, (void)b;
  d[0] = d[1] = d[2] = d[3] = 0.0f;
  __trap();
#endif
}

// The same with bfloat16 operands.
__device__ __forceinline__ void hmma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  (void)a, (void)b;
  d[0] = d[1] = d[2] = d[3] = 0.0f;
  __trap();
#endif
}

// -- copies to shared memory ----------------------------------------------------------------------

// Copy BYTES (4, 8 or 16, aligned to that) in the background, or write zeros if not `valid`.
// `global` is then not read, but must still be a valid pointer.
template <int BYTES>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async copies");
#if __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int size = valid ? BYTES : 0;
  if (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES),
                 "r"(size)
                 : "memory");
  }
#else
  uint32_t* to = static_cast<uint32_t*>(shared);
  const uint32_t* from = static_cast<const uint32_t*>(global);
  for (int i = 0; i < BYTES / 4; ++i) to[i] = valid ? from[i] : 0;
#endif
}

// End a group of copies.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most PENDING of this thread's groups are in flight. Copies of other threads are
// complete after a __syncthreads() that follows.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ uint4 biper_dynamic_shared[];
  return reinterpret_cast<unsigned char*>(biper_dynamic_shared);
}

// -- 16-bit floats, stored as their bits ----------------------------------------------------------

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

// Round to nearest, ties to even; infinity beyond the range.
__device__ __forceinline__ uint16_t float_to_half(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

__device__ __forceinline__ float bfloat_to_float(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ __forceinline__ uint16_t float_to_bfloat(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// -- launches -------------------------------------------------------------------------------------

// Launch a kernel. Returns nullptr, or what went wrong. An empty grid launches nothing.
template <class Params>
const char* launch(void (*kernel)(Params), dim3 grid, unsigned threads, size_t shared_bytes,
                   cudaStream_t stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  if (shared_bytes > 48 * 1024) {
    // A kernel needs permission for more than this. The limit applies to the kernel in all threads,
    // so it is always set to the device's maximum: no thread lowers it before another's launch.
    int device = 0, most = 0;
    cudaError_t refused = cudaGetDevice(&device);
    if (refused == cudaSuccess) {
      refused = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (refused == cudaSuccess) {
      refused = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (refused != cudaSuccess) return cudaGetErrorString(refused);
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace biper

#endif
