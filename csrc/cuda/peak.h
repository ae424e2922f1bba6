// The peak rates of a GPU's units, which are printed with every measured kernel.
#pragma once

namespace biper {

enum PeakKind {
  kPeakBinary = 0,    // bit-MACs of mma.sync m16n8k256, AND and popcount
  kPeakPopcount = 1,  // bit-MACs of POPC on words of 32 bits
  kPeakInt8 = 2,      // MACs of mma.sync m16n8k32 on bytes
  kPeakHalf = 3,      // MACs of mma.sync m16n8k16 on float16 with sums in float32
  kPeakLaunches = 4,  // empty kernels of a CUDA graph, one after the other
};

// Keeps the current device busy with one kind of instruction on registers only, for about five
// times `milliseconds`. Returns nullptr and the median rate of the whole device, in operations
// (one MAC is one) per second, or the reason why this cannot be measured here.
const char* measure_peak(int kind, int milliseconds, double* operations_per_second);

}  // namespace biper
