// How maps are cut into strips for threads.
#pragma once

#include <cstdint>

namespace biper {

struct Cuts {
  int64_t tried = 0, unfair = 0;
};

// Cuts maps of many sizes for some threads.
Cuts cuts();

}  // namespace biper
