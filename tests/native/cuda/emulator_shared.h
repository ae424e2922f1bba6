// Dynamic shared memory, and the copies to shared memory that go on in the background.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "emulator_state.h"
#include "emulator_warp.h"

#ifdef __ELF__
// Bounds of the variables without initial value, static __shared__ ones among them.
extern "C" __attribute__((visibility("hidden"))) char __bss_start[];
extern "C" __attribute__((visibility("hidden"))) char _end[];
#endif

namespace biper {
namespace emulator {

// The block's dynamic shared memory: exactly as large as launched under AddressSanitizer, with
// bytes around it that must not change otherwise.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    // Aligned to 16 bytes and to no more.
    void* memory = nullptr;
    if (posix_memalign(&memory, 32, bytes + kBefore + kAfter) != 0) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(memory);
    std::memset(memory_, kCanary, kBefore);
    std::memset(start() + bytes_, kCanary, kAfter);
#ifdef BIPER_EMULATOR_ASAN
    __asan_poison_memory_region(memory_, kBefore);
#endif
  }
  ~SharedMemory() {
#ifdef BIPER_EMULATOR_ASAN
    __asan_unpoison_memory_region(memory_, kBefore);
#endif
    std::free(memory_);
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  unsigned char* start() { return memory_ + kBefore; }

  void poison() { std::memset(start(), static_cast<int>(random_word() % 255 + 1), bytes_); }

  bool intact() {
#ifndef BIPER_EMULATOR_ASAN
    for (size_t i = 0; i < kBefore; ++i) {
      if (memory_[i] != kCanary) return false;
    }
    for (size_t i = 0; i < kAfter; ++i) {
      if (start()[bytes_ + i] != kCanary) return false;
    }
#endif
    return true;
  }

 private:
  static constexpr size_t kBefore = 32 + 16;
#ifdef BIPER_EMULATOR_ASAN
  static constexpr size_t kAfter = 0;
#else
  static constexpr size_t kAfter = 256;
#endif
  static constexpr unsigned char kCanary = 0xc3;

  size_t bytes_;
  unsigned char* memory_;
};

inline bool is_shared(const unsigned char* address, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const uintptr_t start = reinterpret_cast<uintptr_t>(device.shared);
  if (at >= start && at + bytes <= start + device.shared_bytes) return true;
#ifdef __ELF__
  return at >= reinterpret_cast<uintptr_t>(&__bss_start[0]) &&
         at + bytes <= reinterpret_cast<uintptr_t>(&_end[0]);
#else
  return true;
#endif
}

inline void land(const Copy& copy) {
  std::memcpy(copy.to, copy.is_read ? copy.data : copy.from, copy.bytes);
}

}  // namespace emulator

inline unsigned char* dynamic_shared() { return emulator::device.shared; }

// Arrives when this thread waits for its group, and not before. The source is read at one end of
// that time or the other, at random.
template <int BYTES>
void cp_async(void* shared, const void* global, bool valid, BIPER_EMULATOR_SITE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async copies");
  emulator::Fiber& self = *emulator::current;
  emulator::Copy copy = {};
  copy.to = static_cast<unsigned char*>(shared);
  copy.from = static_cast<const unsigned char*>(global);
  copy.bytes = BYTES;
  copy.group = self.groups;
  const uintptr_t both = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if (both % BYTES != 0) {
    emulator::fail("cp_async<%d> (%s:%d) from %p to %p, not aligned to %d bytes", BYTES,
                   emulator::base_name(file), line, global, shared, BYTES);
  }
  if (!emulator::is_shared(copy.to, BYTES)) {
    emulator::fail("cp_async<%d> (%s:%d) to %p, %td bytes from the start of %zu of shared memory",
                   BYTES, emulator::base_name(file), line, shared,
                   copy.to - emulator::device.shared, emulator::device.shared_bytes);
  }
  copy.is_read = !valid || (emulator::random_word() & 1);
  if (valid && copy.is_read) std::memcpy(copy.data, global, BYTES);
  self.copies.push_back(copy);
}

inline void cp_async_commit() { ++emulator::current->groups; }

template <int PENDING>
void cp_async_wait() {
  emulator::Fiber& self = *emulator::current;
  size_t& landed = self.copies_landed;
  while (landed < self.copies.size() && self.copies[landed].group + PENDING < self.groups) {
    emulator::land(self.copies[landed++]);
  }
  if (landed == self.copies.size()) {
    self.copies.clear();
    landed = 0;
  }
}

}  // namespace biper
