// Kernels without mistakes, whose results the test knows from elsewhere.

#include <cstring>
#include <string>

#include "emulated.h"
#include "platform.cuh"

namespace biper {
namespace {

// -- a product of bits: tiles of 64 x 32, 256 bits at a time, two stages --------------------------

constexpr int kRows = 64;
constexpr int kColumns = 32;
constexpr int kStepWords = 8;
constexpr int kStages = 2;
constexpr int kStageWords = (kRows + kColumns) * kStepWords;

struct CommonBits {
  const uint32_t* a;
  const uint32_t* b;
  int* counts;
  int m, n, words;
};

__device__ void load_stage(const CommonBits& p, int step, uint32_t* stage) {
  for (int i = int(threadIdx.x); i < (kRows + kColumns) * 2; i += int(blockDim.x)) {
    const bool is_a = i < kRows * 2;
    const int row = (is_a ? i : i - kRows * 2) / 2;
    const int all_row = row + int(is_a ? blockIdx.x * kRows : blockIdx.y * kColumns);
    const uint32_t* const matrix = is_a ? p.a : p.b;
    const bool valid = all_row < (is_a ? p.m : p.n);
    const int word = step * kStepWords + i % 2 * 4;
    cp_async<16>(stage + i * 4, matrix + (valid ? all_row * p.words + word : 0), valid);
  }
  cp_async_commit();
}

__global__ void __launch_bounds__(128) common_bits(CommonBits p) {
  uint32_t* const stages = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int lane = int(threadIdx.x) % warpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  const int first_row = int(threadIdx.x) / warpSize * 16;
  int sums[kColumns / 8][4] = {};

  const int steps = p.words / kStepWords;
  load_stage(p, 0, stages);
  for (int step = 0; step < steps; ++step) {
    const uint32_t* const stage = stages + step % kStages * kStageWords;
    if (step + 1 < steps) {
      load_stage(p, step + 1, stages + (step + 1) % kStages * kStageWords);
    } else {
      cp_async_commit();
    }
    cp_async_wait<1>();
    __syncthreads();
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = stage[(first_row + g + 8 * (i % 2)) * kStepWords + t + 4 * (i / 2)];
    }
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const uint32_t* const column = stage + (kRows + 8 * j + g) * kStepWords + t;
      const uint32_t b[2] = {column[0], column[4]};
      bmma_and_popc(sums[j], a, b);
    }
    __syncthreads();
  }
  for (int j = 0; j < kColumns / 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = int(blockIdx.x) * kRows + first_row + g + 8 * (i / 2);
      const int column = int(blockIdx.y) * kColumns + 8 * j + 2 * t + i % 2;
      if (row < p.m && column < p.n) p.counts[row * p.n + column] = sums[j][i];
    }
  }
}

// -- fragments ------------------------------------------------------------------------------------

struct Fragments {
  const uint32_t* a;
  const uint32_t* b;
  uint32_t* d;
};

template <class Sum, void (*multiply)(Sum (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
__global__ void multiply_kernel(Fragments p) {
  const unsigned index = blockIdx.x * warpSize + threadIdx.x;
  uint32_t a[4];
  uint32_t b[2];
  Sum d[4];
  std::memcpy(a, p.a + index * 4, sizeof(a));
  std::memcpy(b, p.b + index * 2, sizeof(b));
  std::memcpy(d, p.d + index * 4, sizeof(d));
  multiply(d, a, b);
  std::memcpy(p.d + index * 4, d, sizeof(d));
}

using A = const uint32_t (&)[4];
using B = const uint32_t (&)[2];
__device__ void bits(int (&d)[4], A a, B b) { bmma_and_popc(d, a, b); }
__device__ void bytes(int (&d)[4], A a, B b) { imma_u8(d, a, b); }
__device__ void halves(float (&d)[4], A a, B b) { hmma_f16(d, a, b); }
__device__ void bfloats(float (&d)[4], A a, B b) { hmma_bf16(d, a, b); }

// -- exchanges and intrinsics ---------------------------------------------------------------------

struct Words {
  const uint32_t* in;
  uint32_t* out;
  int count;
};

__global__ void exchange_kernel(Words p) {
  const unsigned lane = threadIdx.x;
  const uint32_t value = p.in[lane];
  const uint64_t wide = uint64_t{value} << 32 | lane;
  const float number = float(lane);
  int i = 0;
  const auto put = [&](uint32_t result) { p.out[32 * i++ + lane] = result; };
  put(__shfl_sync(~0u, value, int(lane) + 5));
  put(__shfl_sync(~0u, value, 3, 8));
  put(__shfl_xor_sync(~0u, value, 9));
  put(__shfl_up_sync(~0u, value, 3, 16));
  put(__shfl_down_sync(~0u, value, 3, 16));
  put(uint32_t(__shfl_xor_sync(~0u, wide, 1) >> 32));
  put(uint32_t(__shfl_down_sync(~0u, number, 1)));
  put(__ballot_sync(~0u, int(value & 1)));
  put(uint32_t(__any_sync(~0u, lane == 31)) + 2 * uint32_t(__all_sync(~0u, lane < 31)));
  put(__reduce_add_sync(~0u, value));
  put(__reduce_or_sync(~0u, value & 0xffu));
  if (lane < 12) {
    put(__reduce_max_sync(0xfffu, lane));
  } else {
    put(__reduce_min_sync(~0xfffu, lane));
  }
}
static_assert(kExchanges == 12, "as many as above");

__global__ void intrinsics_kernel(Words p) {
  const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= unsigned(p.count)) return;
  const uint32_t* const in = p.in + 3 * index;
  uint32_t* out = p.out + kIntrinsics * index;
  *out++ = uint32_t(__popc(in[0]));
  *out++ = uint32_t(__clz(int(in[0])));
  *out++ = uint32_t(__ffs(int(in[0])));
  *out++ = __brev(in[0]);
  *out++ = __umulhi(in[0], in[1]);
  *out++ = __funnelshift_l(in[0], in[1], in[2]);
  *out++ = __funnelshift_r(in[0], in[1], in[2]);
  *out++ = __byte_perm(in[0], in[1], in[2]);
  *out++ = uint32_t(__popcll(uint64_t{in[0]} << 32 | in[1]));
}

struct Order {
  int* order;
  unsigned* next;
};

__global__ void order_kernel(Order p) {
  p.order[atomicAdd(p.next, 1u)] = int(blockIdx.x * blockDim.x + threadIdx.x);
}

__global__ void nothing_kernel(Order) {}

}  // namespace

const char* count_common_bits(const uint32_t* a, const uint32_t* b, int* counts, int m, int n,
                              int words) {
  const CommonBits params = {a, b, counts, m, n, words};
  const dim3 grid((m + kRows - 1) / kRows, (n + kColumns - 1) / kColumns);
  return launch(common_bits, grid, 128, kStages * kStageWords * sizeof(uint32_t), nullptr, params);
}

const char* multiply_fragments(const std::string& instruction, const uint32_t* a, const uint32_t* b,
                               uint32_t* d, int count) {
  const Fragments params = {a, b, d};
  void (*kernel)(Fragments) = nullptr;
  if (instruction == "bmma_and_popc") kernel = multiply_kernel<int, bits>;
  if (instruction == "imma_u8") kernel = multiply_kernel<int, bytes>;
  if (instruction == "hmma_f16") kernel = multiply_kernel<float, halves>;
  if (instruction == "hmma_bf16") kernel = multiply_kernel<float, bfloats>;
  if (kernel == nullptr) return "no such instruction";
  return launch(kernel, unsigned(count), warpSize, 0, nullptr, params);
}

const char* exchange(const uint32_t* values, uint32_t* results) {
  return launch(exchange_kernel, 1, warpSize, 0, nullptr, Words{values, results, warpSize});
}

const char* apply_intrinsics(const uint32_t* words, uint32_t* results, int count) {
  const unsigned blocks = (unsigned(count) + 95) / 96;
  return launch(intrinsics_kernel, blocks, 96, 0, nullptr, Words{words, results, count});
}

const char* order_of_threads(int* order) {
  unsigned next = 0;
  return launch(order_kernel, 2, 256, 0, nullptr, Order{order, &next});
}

const char* launch_nothing(const unsigned (&grid)[3], unsigned threads, size_t shared_bytes) {
  const Order params = {nullptr, nullptr};
  return launch(nothing_kernel, dim3(grid[0], grid[1], grid[2]), threads, shared_bytes, nullptr,
                params);
}

}  // namespace biper
