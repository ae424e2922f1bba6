// Loops that are bound by one kind of instruction. Everything is in registers: operands come from
// the parameters, so that nothing is known at compile time, and memory is never accessed.
//
// Each warp has kPeakChains independent instructions in flight, and each of the four parts of an SM
// has eight warps: 64 in flight, for a latency of some 30 clocks.
#pragma once

#include "platform.cuh"

namespace biper {

constexpr int kPeakThreads = 256;
constexpr int kPeakBlocksPerSm = 4;
constexpr int kPeakChains = 8;
constexpr int kPeakUnroll = 4;  // rounds of all chains in one turn of the loop

struct PeakParams {
  int turns;       // turns of the loop
  uint32_t seed;   // value that operands are made from; below 2^16, so that `keep` never stores
  uint32_t* sink;  // never written
};

// Instructions of one warp, and the operations of one instruction in all lanes.
constexpr double kPeakInstructions = double(kPeakChains) * kPeakUnroll;
constexpr double kBinaryMacs = 16.0 * 8.0 * 256.0;
constexpr double kPopcountMacs = 32.0 * 32.0;
constexpr double kInt8Macs = 16.0 * 8.0 * 32.0;
constexpr double kHalfMacs = 16.0 * 8.0 * 16.0;

// Uses a result in a test that always fails, but only at run time. Without it, ptxas removes the
// whole loop, including volatile asm.
__device__ __forceinline__ void keep(const PeakParams& params, uint32_t result) {
  if ((result ^ params.seed) == 0xFFFFFFFFu) atomicExch(params.sink, result);
}

template <class Sum, class Multiply>
__device__ __forceinline__ void peak_loop(const PeakParams& params, const Multiply& multiply) {
  // Half of the bits are ones, as in packed maps: with zeros, a GPU uses less power and may clock
  // higher.
  const uint32_t lane = (params.seed + threadIdx.x) * 0x9E3779B9u;
  const uint32_t a[4] = {lane, lane * 3u, lane * 5u, lane * 7u};
  const uint32_t b[2] = {lane * 9u, lane * 11u};
  Sum d[kPeakChains][4] = {};
#pragma unroll 1
  for (int turn = 0; turn < params.turns; ++turn) {
#pragma unroll
    for (int i = 0; i < kPeakUnroll; ++i) {
#pragma unroll
      for (int chain = 0; chain < kPeakChains; ++chain) multiply(d[chain], a, b);
    }
  }
  uint32_t all = 0;
#pragma unroll
  for (int chain = 0; chain < kPeakChains; ++chain) {
#pragma unroll
    for (int i = 0; i < 4; ++i) all |= static_cast<uint32_t>(d[chain][i] != 0);
  }
  keep(params, all);
}

__global__ void __launch_bounds__(kPeakThreads) peak_binary(PeakParams params) {
  peak_loop<int>(params, [](int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    bmma_and_popc(d, a, b);
  });
}

__global__ void __launch_bounds__(kPeakThreads) peak_int8(PeakParams params) {
  peak_loop<int>(params, [](int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    imma_u8(d, a, b);
  });
}

__global__ void __launch_bounds__(kPeakThreads) peak_half(PeakParams params) {
  peak_loop<float>(params, [](float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    hmma_f16(d, a, b);
  });
}

// x = popc(x ^ w): one LOP3 for each POPC, which has a quarter of LOP3's rate or less.
__global__ void __launch_bounds__(kPeakThreads) peak_popcount(PeakParams params) {
  uint32_t x[kPeakChains];
#pragma unroll
  for (int chain = 0; chain < kPeakChains; ++chain) x[chain] = params.seed * (chain + 1);
  const uint32_t w = params.seed ^ (threadIdx.x * 0x9E3779B9u);
#pragma unroll 1
  for (int turn = 0; turn < params.turns; ++turn) {
#pragma unroll
    for (int i = 0; i < kPeakUnroll; ++i) {
#pragma unroll
      for (int chain = 0; chain < kPeakChains; ++chain) x[chain] = __popc(x[chain] ^ w);
    }
  }
  uint32_t sum = 0;
#pragma unroll
  for (int chain = 0; chain < kPeakChains; ++chain) sum += x[chain];
  keep(params, sum);
}

__global__ void peak_nothing(PeakParams) {}

}  // namespace biper
