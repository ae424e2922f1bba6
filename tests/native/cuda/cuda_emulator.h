// What platform.cuh stands on where there is no nvcc: kernels as functions, run on this processor.
//
// Each thread of a block is a fiber; blocks run one after another. BIPER_EMULATOR_SEED (a number)
// chooses in which order, see emulator_schedule.h. Errors end the launch and become its result,
// with the block and the thread (the launch after it runs as if nothing had been): threads that
// diverge at a barrier or in a collective, a lane that its mask leaves out, threads that have
// returned and are waited for, copies that are misaligned or leave shared memory, __trap(), an
// exception.
//
// Compile with -ffp-contract=off, -fno-strict-aliasing and -Wno-unknown-pragmas (#pragma unroll).
// -fsanitize=address finds what leaves a buffer or dynamic shared memory, -fsanitize=alignment
// misaligned vectors.
//
// What it does not show:
// - races between lanes within one stretch of code without a collective, other than by their
//   order; stores that become visible late; reads and writes that a compiler for the GPU reorders
// - threads that wait for others by reading memory in a loop: they wait forever
// - blocks at the same time, and static __shared__ variables as they are when a block starts:
//   they hold what the last block left. Only dynamic shared memory starts as garbage
// - registers, bank conflicts, __launch_bounds__, the static part of shared memory in its limit,
//   which instructions a device has, and addresses of the wrong space (except in cp_async)
// - the order of a tensor core's float sums, and what it cuts off in them: here they are rounded
//   to float32 one after another, and C is added last
// - copies that a thread has not waited for when it returns: they are dropped
// - a misaligned vector without -fsanitize=alignment: it may work or end the process
// - `extern __shared__` arrays and __noinline__, which do not compile

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "emulator_floats.h"
#include "emulator_intrinsics.h"
#include "emulator_schedule.h"
#include "emulator_shared.h"
#include "emulator_state.h"
#include "emulator_tensor_cores.h"
#include "emulator_types.h"
#include "emulator_warp.h"

#define threadIdx (::biper::emulator::current->thread)
#define blockIdx (::biper::emulator::device.block_index)
#define blockDim (::biper::emulator::device.block)
#define gridDim (::biper::emulator::device.grid)

namespace biper {
namespace emulator {

inline const char* launch_error(dim3 grid, unsigned threads, size_t shared_bytes) {
  const char* what = nullptr;
  unsigned long long value = 0;
  unsigned long long most = 0;
  const auto check = [&](const char* name, unsigned long long got, unsigned long long limit) {
    if (what == nullptr && got > limit) what = name, value = got, most = limit;
  };
  check("threads in a block", threads, kMaxThreads);
  check("bytes of shared memory", shared_bytes, kMaxSharedBytes);
  check("blocks along x", grid.x, 0x7fffffffu);
  check("blocks along y", grid.y, kMaxGridYZ);
  check("blocks along z", grid.z, kMaxGridYZ);
  if (what == nullptr && threads > 0) return nullptr;
  if (what == nullptr) {
    std::snprintf(error_text, sizeof(error_text), "invalid launch: no threads in a block");
  } else {
    std::snprintf(error_text, sizeof(error_text), "invalid launch: %llu %s, at most %llu", value,
                  what, most);
  }
  return error_text;
}

inline void set_threads(unsigned threads) {
  device.threads = threads;
  device.warp_count = (threads + 31) / 32;
  device.block = dim3(threads);
  while (device.warps.size() < device.warp_count) {
    const unsigned first = 32 * static_cast<unsigned>(device.warps.size());
    device.warps.push_back(std::make_unique<Warp>());
    Warp& warp = *device.warps.back();
    for (unsigned lane = 0; lane < 32; ++lane) {
      Fiber& fiber = warp.fibers[lane];
      fiber.warp = &warp;
      fiber.lane = lane;
      fiber.thread = {first + lane, 0, 0};
      fiber.context.stack = warp.stacks.at(lane);
      fiber.context.stack_bytes = Stacks::kBytes;
    }
  }
}

inline void check_stacks() {
  for (unsigned i = 0; i < device.threads; ++i) {
    if (!device.warps[i / 32]->stacks.restore_gap(i % 32)) {
      record(&device.warps[i / 32]->fibers[i % 32], "more than %zu bytes of stack", Stacks::kBytes);
    }
  }
}

inline uint64_t seed_of_environment() {
  const char* text = std::getenv("BIPER_EMULATOR_SEED");
  return text == nullptr ? kDefaultSeed : std::strtoull(text, nullptr, 10);
}

// Run body(call) in every thread. Returns nullptr, or what went wrong.
inline const char* run_grid(void (*body)(const void*), const void* call, dim3 grid,
                            unsigned threads, size_t shared_bytes) {
  if (const char* error = launch_error(grid, threads, shared_bytes)) return error;
  const std::lock_guard<std::mutex> lock(device.mutex);
  SharedMemory shared(shared_bytes);
  set_threads(threads);
  device.scheduler.stack = nullptr;
  device.grid = grid;
  device.body = body;
  device.call = call;
  device.shared = shared.start();
  device.shared_bytes = shared_bytes;
  device.cancelled = false;

  const uint64_t seed = seed_of_environment();
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  seed_random(seed, blocks);
  const bool backwards = random_word() & 1;
  for (uint64_t i = 0; i < blocks && !device.cancelled; ++i) {
    const uint64_t block = backwards ? blocks - 1 - i : i;
    device.block_index.x = static_cast<unsigned>(block % grid.x);
    device.block_index.y = static_cast<unsigned>(block / grid.x % grid.y);
    device.block_index.z = static_cast<unsigned>(block / grid.x / grid.y);
    seed_random(seed, block);
    shared.poison();
    run_block();
    if (!shared.intact()) {
      record(nullptr, "writes outside its %zu bytes of dynamic shared memory", shared_bytes);
    }
  }
  check_stacks();
  return device.cancelled ? error_text : nullptr;
}

}  // namespace emulator

// Run a kernel to its end. Returns nullptr, or what went wrong. An empty grid starts nothing.
template <class Params>
const char* launch(void (*kernel)(Params), dim3 grid, unsigned threads, size_t shared_bytes,
                   cudaStream_t, const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  };
  const Call call = {kernel, params};
  const auto body = [](const void* erased) {
    const Call& made = *static_cast<const Call*>(erased);
    made.kernel(made.params);
  };
  return emulator::run_grid(body, &call, grid, threads, shared_bytes);
}

}  // namespace biper
