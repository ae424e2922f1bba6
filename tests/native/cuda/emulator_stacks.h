// Stacks of the emulated threads, and the switch from one to another.
//
// A switch saves what a called function must preserve and nothing else, without a system call:
// x86-64 and aarch64 in assembly, others (or with BIPER_EMULATOR_UCONTEXT) by swapcontext.
// AddressSanitizer is told of every switch.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if !defined(BIPER_EMULATOR_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define BIPER_EMULATOR_UCONTEXT
#endif

#ifdef BIPER_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define BIPER_EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define BIPER_EMULATOR_ASAN 1
#endif
#endif

#ifdef BIPER_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// What the compiler must not know of the switch: GCC would keep registers across the call that it
// does not see used in it.
#ifdef __clang__
#define BIPER_EMULATOR_OPAQUE __attribute__((noinline, no_sanitize("address", "undefined")))
#else
#define BIPER_EMULATOR_OPAQUE \
  __attribute__((noinline, noipa, no_sanitize_address, no_sanitize_undefined))
#endif

namespace biper {
namespace emulator {

struct Context {
#ifdef BIPER_EMULATOR_UCONTEXT
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// -- the switch -----------------------------------------------------------------------------------

#if defined(BIPER_EMULATOR_UCONTEXT)

inline void prepare_context(Context& context, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = const_cast<void*>(context.stack);
  context.state.uc_stack.ss_size = context.stack_bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

inline void switch_registers(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#elif defined(__x86_64__)

BIPER_EMULATOR_OPAQUE inline void switch_stacks(void** from, void* to) {
  asm volatile(
      "leaq -128(%%rsp), %%rsp\n\t"  // the red zone
      "pushq %%rbp\n\t"
      "pushq %%rbx\n\t"
      "pushq %%r12\n\t"
      "pushq %%r13\n\t"
      "pushq %%r14\n\t"
      "pushq %%r15\n\t"
      "leaq 1f(%%rip), %%rax\n\t"
      "pushq %%rax\n\t"
      "movq %%rsp, (%%rdi)\n\t"
      "movq %%rsi, %%rsp\n\t"
      "popq %%rax\n\t"
      "jmp *%%rax\n"
      "1:\n\t"
      "popq %%r15\n\t"
      "popq %%r14\n\t"
      "popq %%r13\n\t"
      "popq %%r12\n\t"
      "popq %%rbx\n\t"
      "popq %%rbp\n\t"
      "leaq 128(%%rsp), %%rsp"
      : "+D"(from), "+S"(to)
      :
      : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "memory", "cc");
}

// As if something without a return address had called `entry`: 8 bytes below a multiple of 16.
inline void prepare_context(Context& context, void (*entry)()) {
  const uintptr_t end = reinterpret_cast<uintptr_t>(context.stack) + context.stack_bytes;
  void** top = reinterpret_cast<void**>(end & ~uintptr_t{15});
  *--top = nullptr;
  *--top = nullptr;
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  context.stack_pointer = top;
}

#else

BIPER_EMULATOR_OPAQUE inline void switch_stacks(void** from, void* to) {
  asm volatile(
      "sub sp, sp, #176\n\t"
      "stp x19, x20, [sp, #16]\n\t"
      "stp x21, x22, [sp, #32]\n\t"
      "stp x23, x24, [sp, #48]\n\t"
      "stp x25, x26, [sp, #64]\n\t"
      "stp x27, x28, [sp, #80]\n\t"
      "stp x29, x30, [sp, #96]\n\t"
      "stp d8, d9, [sp, #112]\n\t"
      "stp d10, d11, [sp, #128]\n\t"
      "stp d12, d13, [sp, #144]\n\t"
      "stp d14, d15, [sp, #160]\n\t"
      "adr x9, 1f\n\t"
      "str x9, [sp]\n\t"
      "mov x10, sp\n\t"
      "str x10, [%0]\n\t"
      "mov sp, %1\n\t"
      "ldr x16, [sp]\n\t"
      "br x16\n"
      "1:\n\t"
      "ldp x19, x20, [sp, #16]\n\t"
      "ldp x21, x22, [sp, #32]\n\t"
      "ldp x23, x24, [sp, #48]\n\t"
      "ldp x25, x26, [sp, #64]\n\t"
      "ldp x27, x28, [sp, #80]\n\t"
      "ldp x29, x30, [sp, #96]\n\t"
      "ldp d8, d9, [sp, #112]\n\t"
      "ldp d10, d11, [sp, #128]\n\t"
      "ldp d12, d13, [sp, #144]\n\t"
      "ldp d14, d15, [sp, #160]\n\t"
      "add sp, sp, #176"
      : "+r"(from), "+r"(to)
      :
      : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15",
        "x16", "x17", "memory", "cc");
}

inline void prepare_context(Context& context, void (*entry)()) {
  const uintptr_t end = reinterpret_cast<uintptr_t>(context.stack) + context.stack_bytes;
  void** top = reinterpret_cast<void**>(end & ~uintptr_t{15}) - 2;
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  context.stack_pointer = top;
}

#endif

#ifndef BIPER_EMULATOR_UCONTEXT
inline void switch_registers(Context& from, Context& to) {
  switch_stacks(&from.stack_pointer, to.stack_pointer);
}
#endif

// Go on where `to` stands; return when something switches back. `last`: nothing will.
inline void switch_context(Context& from, Context& to, bool last) {
#ifdef BIPER_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#else
  (void)last;
#endif
  switch_registers(from, to);
#ifdef BIPER_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing on a new stack. `caller`: who may have switched here, if its stack is unknown.
inline void finish_first_switch(Context& caller) {
#ifdef BIPER_EMULATOR_ASAN
  if (caller.stack == nullptr) {
    __sanitizer_finish_switch_fiber(nullptr, &caller.stack, &caller.stack_bytes);
  } else {
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  }
#else
  (void)caller;
#endif
}

// -- the stacks of a warp -------------------------------------------------------------------------

class Stacks {
 public:
  Stacks() : memory_(static_cast<unsigned char*>(std::malloc(kCount * kSpacing))) {
    if (memory_ == nullptr) throw std::bad_alloc();
    for (size_t i = 0; i < kCount; ++i) {
      std::memset(at(i) - kGap, kCanary, kGap);
#ifdef BIPER_EMULATOR_ASAN
      __asan_poison_memory_region(at(i) - kGap, kGap);
#endif
    }
  }
  ~Stacks() {
#ifdef BIPER_EMULATOR_ASAN
    __asan_unpoison_memory_region(memory_, kCount * kSpacing);
#endif
    std::free(memory_);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  unsigned char* at(size_t i) { return memory_ + i * kSpacing + kGap; }

  // Tell whether the memory below a stack was as it should be, and make it so. AddressSanitizer
  // tells by itself.
  bool restore_gap(size_t i) {
    bool intact = true;
#ifndef BIPER_EMULATOR_ASAN
    for (unsigned char* byte = at(i) - kGap; byte < at(i); ++byte) {
      intact = intact && *byte == kCanary;
      *byte = kCanary;
    }
#else
    (void)i;
#endif
    return intact;
  }

#ifdef BIPER_EMULATOR_ASAN
  static constexpr size_t kBytes = 256 * 1024;  // its frames are larger
#else
  static constexpr size_t kBytes = 64 * 1024;
#endif

 private:
  static constexpr size_t kCount = 32;
  // An odd number of cache lines, so that the stacks of a warp lie in different sets of a cache.
  static constexpr size_t kGap = 17 * 64;
  static constexpr size_t kSpacing = kBytes + kGap;
  static constexpr unsigned char kCanary = 0xc3;

  unsigned char* memory_;
};

}  // namespace emulator
}  // namespace biper
