// Calls that do not fit, which every public function of csrc/cpu must refuse.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace biper {

struct Refusals {
  int64_t calls = 0;
  std::vector<std::string> failures;  // calls that were not refused, or wrote something before
};

// Makes the calls with the kernels in use.
Refusals refusals();

}  // namespace biper
