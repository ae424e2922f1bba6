// Short bursts, of which the fastest count: a burst that was interrupted only looks slower.
//
// The clock is counted by a chain of additions, each of which waits for the one before: one clock
// each on every processor that we know of.
#include "peak.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "dispatch.h"

namespace biper {
namespace {

constexpr int kBursts = 200;
constexpr double kBurstSeconds = 1e-4;
constexpr int64_t kChain = 8;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Adds kChain * rounds times; false where this processor has no such loop here.
bool add_chain(int64_t rounds) {
#if defined(__x86_64__)
  int64_t sum = 0;
  asm volatile(
      "1: add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0\n"
      "add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0\n"
      "dec %1\n jnz 1b"
      : "+r"(sum), "+r"(rounds)
      :
      : "cc");
  return true;
#elif defined(__aarch64__)
  int64_t sum = 0;
  asm volatile(
      "1: add %0, %0, #1\n add %0, %0, #1\n add %0, %0, #1\n add %0, %0, #1\n"
      "add %0, %0, #1\n add %0, %0, #1\n add %0, %0, #1\n add %0, %0, #1\n"
      "subs %1, %1, #1\n b.ne 1b"
      : "+r"(sum), "+r"(rounds)
      :
      : "cc");
  return true;
#else
  static_cast<void>(rounds);
  return false;
#endif
}

// Rounds per second, from the fastest twentieth of the bursts.
template <class Burst>
double rate(const Burst& burst) {
  int64_t rounds = 1000;
  for (;;) {  // long enough for the clock that measures it
    const double start = seconds();
    burst(rounds);
    if (seconds() - start > kBurstSeconds) break;
    rounds *= 2;
  }
  std::vector<double> times;
  for (int i = 0; i < kBursts; ++i) {
    const double start = seconds();
    burst(rounds);
    times.push_back(seconds() - start);
  }
  std::sort(times.begin(), times.end());
  return static_cast<double>(rounds) / times[kBursts / 20];
}

}  // namespace

Peak measure_peak() {
  const Kernels& isa = kernels();
  Peak peak{};
  peak.macs_per_second =
      rate([&isa](int64_t rounds) { isa.peak(rounds); }) * static_cast<double>(isa.macs_per_round);
  if (add_chain(1)) {
    const double clock = rate([](int64_t rounds) { add_chain(rounds); }) * kChain;
    peak.macs_per_clock = peak.macs_per_second / clock;
  }
  return peak;
}

}  // namespace biper
