// Whole networks as programs: the same bytes however they run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace biper {

struct ProgramRuns {
  int64_t runs = 0;
  std::vector<std::string> differences;  // runs whose bytes are others than the first one's
  uint64_t hash = 0;                     // FNV-1a of the first run's bytes
};

// Runs them with the kernels in use, with several threads, batch sizes and layouts, from several
// callers at once, on our pool of threads and on shared ones.
ProgramRuns program_runs();

// Programs and calls that do not fit; returns those that were not refused.
std::vector<std::string> accepted_misfits();

}  // namespace biper
