// Barriers, and the exchanges between the lanes of a warp.
//
// The call's file and line say which one it is: threads that meet in different ones have diverged.

#pragma once

#include <cstdint>
#include <cstring>

#include "emulator_schedule.h"

#define BIPER_EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// -- barriers -------------------------------------------------------------------------------------

inline void __syncthreads(BIPER_EMULATOR_SITE) {
  biper::emulator::wait_for_block(0, {"__syncthreads", file, line});
}
inline int __syncthreads_count(int predicate, BIPER_EMULATOR_SITE) {
  return biper::emulator::wait_for_block(predicate, {"__syncthreads_count", file, line});
}
inline int __syncthreads_or(int predicate, BIPER_EMULATOR_SITE) {
  return biper::emulator::wait_for_block(predicate, {"__syncthreads_or", file, line}) != 0;
}
inline int __syncthreads_and(int predicate, BIPER_EMULATOR_SITE) {
  const int count = biper::emulator::wait_for_block(predicate, {"__syncthreads_and", file, line});
  return static_cast<unsigned>(count) == biper::emulator::device.threads;
}

// -- exchanges ------------------------------------------------------------------------------------

namespace biper {
namespace emulator {

struct Meeting {
  static void run(Meeting* const*, uint32_t) {}
};

// Each lane reads the value of another, or its own.
template <class T>
struct Shuffle {
  T value;
  unsigned source;
  T result;

  static void run(Shuffle* const* lanes, uint32_t mask) {
    for (uint32_t left = mask; left != 0; left &= left - 1) {
      Shuffle& lane = *lanes[__builtin_ctz(left)];
      if (mask >> lane.source & 1) {
        lane.result = lanes[lane.source]->value;
      } else {
        std::memset(&lane.result, 0xa5, sizeof(T));  // undefined
      }
    }
  }
};

template <class T>
T shuffle(uint32_t mask, T value, unsigned source, const Site& site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what the shuffles of CUDA take");
  Shuffle<T> operation = {value, source, value};
  collect(operation, mask, false, site);
  return operation.result;
}

inline unsigned lane_of_current() { return current->lane; }

struct Ballot {
  bool predicate;
  uint32_t result;

  static void run(Ballot* const* lanes, uint32_t mask) {
    uint32_t result = 0;
    for (uint32_t left = mask; left != 0; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      result |= uint32_t{lanes[lane]->predicate} << lane;
    }
    for (uint32_t left = mask; left != 0; left &= left - 1) {
      lanes[__builtin_ctz(left)]->result = result;
    }
  }
};

inline uint32_t ballot(uint32_t mask, int predicate, const Site& site) {
  Ballot operation = {predicate != 0, 0};
  collect(operation, mask, false, site);
  return operation.result;
}

struct Add {
  static unsigned join(unsigned x, unsigned y) { return x + y; }
};
struct And {
  static unsigned join(unsigned x, unsigned y) { return x & y; }
};
struct Or {
  static unsigned join(unsigned x, unsigned y) { return x | y; }
};
struct Xor {
  static unsigned join(unsigned x, unsigned y) { return x ^ y; }
};
template <class T>
struct Min {
  static T join(T x, T y) { return y < x ? y : x; }
};
template <class T>
struct Max {
  static T join(T x, T y) { return x < y ? y : x; }
};

template <class T, class Join>
struct Reduction {
  T value;

  static void run(Reduction* const* lanes, uint32_t mask) {
    T all = lanes[__builtin_ctz(mask)]->value;
    for (uint32_t left = mask & (mask - 1); left != 0; left &= left - 1) {
      all = Join::join(all, lanes[__builtin_ctz(left)]->value);
    }
    for (uint32_t left = mask; left != 0; left &= left - 1) {
      lanes[__builtin_ctz(left)]->value = all;
    }
  }
};

template <class Join, class T>
T reduce(uint32_t mask, T value, const Site& site) {
  Reduction<T, Join> operation = {value};
  collect(operation, mask, false, site);
  return operation.value;
}

}  // namespace emulator
}  // namespace biper

inline void __syncwarp(unsigned mask = ~0u, BIPER_EMULATOR_SITE) {
  biper::emulator::Meeting meeting;
  biper::emulator::collect(meeting, mask, false, {"__syncwarp", file, line});
}

// `width`: a power of two; lanes exchange within groups of as many.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, BIPER_EMULATOR_SITE) {
  const unsigned lane = biper::emulator::lane_of_current();
  const unsigned size = static_cast<unsigned>(width);
  const unsigned from = (lane & ~(size - 1)) | (static_cast<unsigned>(source) & (size - 1));
  return biper::emulator::shuffle(mask, value, from, {"__shfl_sync", file, line});
}

// Lanes of later groups are not read.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, BIPER_EMULATOR_SITE) {
  const unsigned lane = biper::emulator::lane_of_current();
  const unsigned size = static_cast<unsigned>(width);
  const unsigned other = (lane ^ static_cast<unsigned>(bits)) & 31;
  const unsigned from = other <= (lane | (size - 1)) ? other : lane;
  return biper::emulator::shuffle(mask, value, from, {"__shfl_xor_sync", file, line});
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, BIPER_EMULATOR_SITE) {
  const unsigned lane = biper::emulator::lane_of_current();
  const unsigned in_group = lane & (static_cast<unsigned>(width) - 1);
  const unsigned from = by <= in_group ? lane - by : lane;
  return biper::emulator::shuffle(mask, value, from, {"__shfl_up_sync", file, line});
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, BIPER_EMULATOR_SITE) {
  const unsigned lane = biper::emulator::lane_of_current();
  const unsigned after = (lane | (static_cast<unsigned>(width) - 1)) - lane;
  const unsigned from = by <= after ? lane + by : lane;
  return biper::emulator::shuffle(mask, value, from, {"__shfl_down_sync", file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, BIPER_EMULATOR_SITE) {
  return biper::emulator::ballot(mask, predicate, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int predicate, BIPER_EMULATOR_SITE) {
  return biper::emulator::ballot(mask, predicate, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, BIPER_EMULATOR_SITE) {
  return biper::emulator::ballot(mask, !predicate, {"__all_sync", file, line}) == 0;
}

// All lanes that have not returned: whether they have diverged is not known.
inline unsigned __activemask() { return biper::emulator::current->warp->alive; }

#define BIPER_EMULATOR_REDUCE(NAME, TYPE, JOIN)                                              \
  inline TYPE NAME(unsigned mask, TYPE value, BIPER_EMULATOR_SITE) {                         \
    return biper::emulator::reduce<biper::emulator::JOIN>(mask, value, {#NAME, file, line}); \
  }
BIPER_EMULATOR_REDUCE(__reduce_add_sync, unsigned, Add)
BIPER_EMULATOR_REDUCE(__reduce_and_sync, unsigned, And)
BIPER_EMULATOR_REDUCE(__reduce_or_sync, unsigned, Or)
BIPER_EMULATOR_REDUCE(__reduce_xor_sync, unsigned, Xor)
BIPER_EMULATOR_REDUCE(__reduce_min_sync, unsigned, Min<unsigned>)
BIPER_EMULATOR_REDUCE(__reduce_max_sync, unsigned, Max<unsigned>)
BIPER_EMULATOR_REDUCE(__reduce_min_sync, int, Min<int>)
BIPER_EMULATOR_REDUCE(__reduce_max_sync, int, Max<int>)
#undef BIPER_EMULATOR_REDUCE

inline int __reduce_add_sync(unsigned mask, int value, BIPER_EMULATOR_SITE) {
  return static_cast<int>(biper::emulator::reduce<biper::emulator::Add>(
      mask, static_cast<unsigned>(value), {"__reduce_add_sync", file, line}));
}
