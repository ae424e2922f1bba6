// A grid of threads on one processor: who runs, who waits for whom, what went wrong.
//
// A thread runs until it waits. Then another lane of its warp that can run does, taken at random;
// if none can, another warp. So a warp runs as far ahead of the others as it may, and what a
// missing barrier leaves to chance differs from seed to seed.

#pragma once

#include <cstdint>
#include <exception>

#include "emulator_state.h"

namespace biper {
namespace emulator {

// -- giving way -----------------------------------------------------------------------------------

inline void give_way(Fiber& self, bool last) {
  Warp& warp = *self.warp;
  if (warp.ready != 0 && !device.cancelled) {
    const unsigned lane = pick(warp.ready);
    warp.ready &= ~(1u << lane);
    current = &warp.fibers[lane];
    switch_context(self.context, current->context, last);
  } else {
    current = nullptr;
    switch_context(self.context, device.scheduler, last);
  }
}

// Wait until someone sets this lane's bit in `ready`.
inline void park() {
  give_way(*current, false);
  if (device.cancelled) throw Cancelled{};
}

// -- collectives of a warp ------------------------------------------------------------------------

inline uint32_t wanted_lanes(const Fiber& fiber) {
  return fiber.needs_whole_warp ? ~0u : fiber.mask & fiber.warp->alive;
}

// Run the collective that `leader` waits in, for all its lanes, and let all but `last` go on.
inline void run_collective(Fiber& leader, uint32_t last) {
  Warp& warp = *leader.warp;
  const uint32_t lanes = wanted_lanes(leader);
  void* operands[32];
  for (unsigned lane = 0; lane < 32; ++lane) {
    operands[lane] = nullptr;
    if (!(lanes >> lane & 1)) continue;
    const Fiber& other = warp.fibers[lane];
    if (other.run != leader.run || other.mask != leader.mask ||
        other.site.line != leader.site.line) {
      record(&leader, "%s (%s:%d, mask %#x) met %s (%s:%d, mask %#x) of thread (%u, %u, %u)",
             leader.site.what, base_name(leader.site.file), leader.site.line, leader.mask,
             other.site.what, base_name(other.site.file), other.site.line, other.mask,
             other.thread.x, other.thread.y, other.thread.z);
      throw Cancelled{};
    }
    operands[lane] = other.operands;
  }
  leader.run(operands, lanes);
  warp.gathered &= ~lanes;
  warp.ready |= lanes & ~last;
}

// Run Operation::run(operations, lanes) once for all lanes of `mask` that have not returned from
// the kernel; the operations live on the stacks of their lanes, null where there is none.
template <class Operation>
void collect(Operation& operation, uint32_t mask, bool needs_whole_warp, const Site& site) {
  Fiber& self = *current;
  Warp& warp = *self.warp;
  const uint32_t bit = 1u << self.lane;
  if (!(mask & bit)) {
    fail("%s (%s:%d) by lane %u, which its mask %#x leaves out", site.what, base_name(site.file),
         site.line, self.lane, mask);
  }
  self.site = site;
  self.run = [](void* const* operands, uint32_t lanes) {
    Operation* operations[32];
    for (int i = 0; i < 32; ++i) operations[i] = static_cast<Operation*>(operands[i]);
    Operation::run(operations, lanes);
  };
  self.operands = &operation;
  self.mask = mask;
  self.needs_whole_warp = needs_whole_warp;
  warp.gathered |= bit;
  if ((wanted_lanes(self) & ~warp.gathered) == 0) {
    run_collective(self, bit);
  } else {
    park();
  }
}

// -- barriers of a block --------------------------------------------------------------------------

// Wait for all threads of the block; return for how many `predicate` is not 0.
inline int wait_for_block(int predicate, const Site& site) {
  Fiber& self = *current;
  self.site = site;
  self.predicate = predicate != 0;
  self.warp->at_barrier |= 1u << self.lane;
  park();
  return self.count;
}

template <class Visit>
void for_lanes(uint32_t Warp::* which, Visit visit) {
  for (unsigned i = 0; i < device.warp_count; ++i) {
    Warp& warp = *device.warps[i];
    for (uint32_t left = warp.*which; left != 0; left &= left - 1) {
      visit(warp.fibers[__builtin_ctz(left)]);
    }
  }
}

// All threads are at a barrier: let them go on.
inline void release_barrier() {
  const Fiber& first = device.warps[0]->fibers[0];
  int count = 0;
  for_lanes(&Warp::at_barrier, [&](Fiber& fiber) {
    count += fiber.predicate;
    if (fiber.site.line != first.site.line || fiber.site.what != first.site.what) {
      record(&first, "%s (%s:%d) met %s (%s:%d) of thread (%u, %u, %u)", first.site.what,
             base_name(first.site.file), first.site.line, fiber.site.what,
             base_name(fiber.site.file), fiber.site.line, fiber.thread.x, fiber.thread.y,
             fiber.thread.z);
    }
  });
  for_lanes(&Warp::at_barrier, [&](Fiber& fiber) { fiber.count = count; });
  for (unsigned i = 0; i < device.warp_count; ++i) {
    device.warps[i]->ready = device.warps[i]->at_barrier;
    device.warps[i]->at_barrier = 0;
  }
}

// Nobody can run and not all are at a barrier: say why.
inline void record_deadlock() {
  for_lanes(&Warp::gathered, [](Fiber& fiber) {
    const Warp& warp = *fiber.warp;
    const uint32_t missing = wanted_lanes(fiber) & ~warp.gathered;
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(missing | 1u << 31));
    const Fiber& other = warp.fibers[lane];
    if (warp.at_barrier >> lane & 1) {
      record(&fiber, "%s (%s:%d) waits for lane %u, which is at %s (%s:%d)", fiber.site.what,
             base_name(fiber.site.file), fiber.site.line, lane, other.site.what,
             base_name(other.site.file), other.site.line);
    } else if (missing != 0) {
      record(&fiber, "%s (%s:%d) waits for lane %u, which has returned or does not exist",
             fiber.site.what, base_name(fiber.site.file), fiber.site.line, lane);
    } else {
      record(&fiber, "%s (%s:%d) waits for lanes in another collective", fiber.site.what,
             base_name(fiber.site.file), fiber.site.line);
    }
  });
  const Fiber* gone = nullptr;
  for (unsigned i = device.threads; i-- > 0;) {
    const Warp& warp = *device.warps[i / 32];
    if (!(warp.alive >> (i % 32) & 1)) gone = &warp.fibers[i % 32];
  }
  for_lanes(&Warp::at_barrier, [&](Fiber& fiber) {
    const uint3 other = gone == nullptr ? uint3{0, 0, 0} : gone->thread;
    record(&fiber, "%s (%s:%d) waits for thread (%u, %u, %u), which has returned", fiber.site.what,
           base_name(fiber.site.file), fiber.site.line, other.x, other.y, other.z);
  });
}

// -- threads and blocks ---------------------------------------------------------------------------

// The current thread has returned from the kernel: nobody waits for it in a collective any more.
inline void leave_warp() {
  Warp& warp = *current->warp;
  warp.alive &= ~(1u << current->lane);
  for (uint32_t left = warp.gathered; left != 0; left &= left - 1) {
    Fiber& fiber = warp.fibers[__builtin_ctz(left)];
    if ((warp.gathered >> fiber.lane & 1) && (wanted_lanes(fiber) & ~warp.gathered) == 0) {
      run_collective(fiber, 0);
    }
  }
}

inline void run_thread() {
  Warp& warp = *current->warp;
  const uint32_t bit = 1u << current->lane;
  warp.started |= bit;
  try {
    device.body(device.call);
    leave_warp();
  } catch (const Cancelled&) {
  } catch (const std::exception& error) {
    record(current, "%s", error.what());
  } catch (...) {
    record(current, "an exception");
  }
  warp.alive &= ~bit;
}

// Without AddressSanitizer: this frame never ends, and what it poisoned would stay so.
#ifdef __clang__
__attribute__((no_sanitize("address")))
#else
__attribute__((no_sanitize_address))
#endif
inline void fiber_entry() {
  finish_first_switch(device.scheduler);
  run_thread();
  for (;;) give_way(*current, true);
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  switch_context(device.scheduler, fiber.context, false);
}

inline void start_block() {
  for (unsigned i = 0; i < device.warp_count; ++i) {
    Warp& warp = *device.warps[i];
    const unsigned lanes = device.threads - 32 * i;
    warp.ready = warp.alive = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    warp.started = warp.gathered = warp.at_barrier = 0;
    for (unsigned lane = 0; lane < 32 && lane < lanes; ++lane) {
      Fiber& fiber = warp.fibers[lane];
      prepare_context(fiber.context, fiber_entry);
      fiber.copies.clear();
      fiber.copies_landed = 0;
      fiber.groups = 0;
    }
  }
}

// End the threads that have begun; each leaves by an exception.
inline void cancel_block() {
  for_lanes(&Warp::started, [](Fiber& fiber) {
    if (fiber.warp->alive >> fiber.lane & 1) resume(fiber);
  });
}

inline void run_block() {
  start_block();
  while (!device.cancelled) {
    uint32_t runnable = 0;
    unsigned alive = 0;
    unsigned at_barrier = 0;
    for (unsigned i = 0; i < device.warp_count; ++i) {
      const Warp& warp = *device.warps[i];
      runnable |= uint32_t{warp.ready != 0} << i;
      alive += static_cast<unsigned>(__builtin_popcount(warp.alive));
      at_barrier += static_cast<unsigned>(__builtin_popcount(warp.at_barrier));
    }
    if (runnable != 0) {
      Warp& warp = *device.warps[pick(runnable)];
      const unsigned lane = pick(warp.ready);
      warp.ready &= ~(1u << lane);
      resume(warp.fibers[lane]);
    } else if (alive == 0) {
      return;
    } else if (at_barrier == device.threads) {
      release_barrier();
    } else {
      record_deadlock();
    }
  }
  cancel_block();
}

}  // namespace emulator
}  // namespace biper
