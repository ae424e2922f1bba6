// The popcount peak of a core: what bounds every binary convolution on it.
#pragma once

namespace biper {

struct Peak {
  double macs_per_second;  // of the calling thread's core
  double macs_per_clock;   // 0 where the clock cannot be counted
};

// Runs the inner loop of the kernels in use on registers alone, for about 50 ms.
Peak measure_peak();

}  // namespace biper
