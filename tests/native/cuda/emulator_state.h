// The emulated device: its threads, its block, its chance and the error of its launch.

#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "emulator_stacks.h"
#include "emulator_types.h"

namespace biper {
namespace emulator {

constexpr uint64_t kDefaultSeed = 1;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // of a block, on sm_90
constexpr unsigned kMaxGridYZ = 65535;

// Thrown through a thread's frames to end it.
struct Cancelled {};

// Where a thread waits.
struct Site {
  const char* what;
  const char* file;
  int line;
};

// A copy to shared memory that has not arrived.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  unsigned group;
  unsigned char bytes;
  bool is_read;  // `data` is what arrives
  unsigned char data[16];
};

struct Warp;

struct Fiber {
  Context context;
  Warp* warp = nullptr;
  unsigned lane = 0;
  uint3 thread = {0, 0, 0};

  // What it waits for, and with what.
  Site site = {"", "", 0};
  void (*run)(void* const* operands, uint32_t lanes) = nullptr;
  void* operands = nullptr;
  uint32_t mask = 0;
  bool needs_whole_warp = false;
  int predicate = 0;
  int count = 0;

  std::vector<Copy> copies;
  size_t copies_landed = 0;
  unsigned groups = 0;
};

// Masks have a bit for each lane.
struct Warp {
  Fiber fibers[32];
  Stacks stacks;
  uint32_t ready = 0;       // can run
  uint32_t started = 0;     // have run
  uint32_t alive = 0;       // have not returned from the kernel
  uint32_t gathered = 0;    // wait in a collective
  uint32_t at_barrier = 0;  // wait for the block
};

struct Device {
  Context scheduler;
  std::vector<std::unique_ptr<Warp>> warps;
  std::mutex mutex;
  unsigned threads = 0;  // of a block
  unsigned warp_count = 0;

  dim3 grid, block;
  uint3 block_index = {0, 0, 0};
  void (*body)(const void* call) = nullptr;
  const void* call = nullptr;

  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;

  uint64_t random_state = 0;
  bool cancelled = false;
};

inline Device device;
inline Fiber* current = nullptr;
inline thread_local char error_text[640];

// -- randomness -----------------------------------------------------------------------------------

inline uint32_t random_word() {
  uint64_t state = device.random_state;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  device.random_state = state;
  return static_cast<uint32_t>(state >> 32);
}

inline void seed_random(uint64_t seed, uint64_t block) {
  uint64_t state = (seed + 1) * 0x9e3779b97f4a7c15u + block * 0xd1342543de82ef95u;
  state = (state ^ (state >> 31)) * 0xbf58476d1ce4e5b9u;
  device.random_state = (state ^ (state >> 29)) | 1;
  random_word();
}

// One of the bits that are set: the first from a random one.
inline unsigned pick(uint32_t mask) {
  const unsigned start = random_word() & 31;
  const uint32_t turned = (mask >> start) | (mask << ((32 - start) & 31));
  return (static_cast<unsigned>(__builtin_ctz(turned)) + start) & 31;
}

// -- errors ---------------------------------------------------------------------------------------

inline const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

// Keep the first error of a launch, with the thread that it is about (or only the block).
__attribute__((format(printf, 2, 0))) inline void record_list(const Fiber* fiber,
                                                              const char* format, va_list list) {
  if (device.cancelled) return;
  device.cancelled = true;
  const uint3 block = device.block_index;
  int used = std::snprintf(error_text, sizeof(error_text), "block (%u, %u, %u)", block.x, block.y,
                           block.z);
  if (fiber != nullptr) {
    const uint3 thread = fiber->thread;
    used += std::snprintf(error_text + used, sizeof(error_text) - size_t(used),
                          ", thread (%u, %u, %u)", thread.x, thread.y, thread.z);
  }
  used += std::snprintf(error_text + used, sizeof(error_text) - size_t(used), ": ");
  std::vsnprintf(error_text + used, sizeof(error_text) - size_t(used), format, list);
}

__attribute__((format(printf, 2, 3))) inline void record(const Fiber* fiber, const char* format,
                                                         ...) {
  va_list list;
  va_start(list, format);
  record_list(fiber, format, list);
  va_end(list);
}

// End the launch for what the current thread did.
[[noreturn]] __attribute__((format(printf, 1, 2), cold)) inline void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  record_list(current, format, list);
  va_end(list);
  throw Cancelled{};
}

}  // namespace emulator
}  // namespace biper
