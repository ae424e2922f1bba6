#include "strides.h"

#include <limits>

namespace biper {

void Dimensions::join() {
  for (size_t outer = 0; outer + 1 < sizes.size();) {
    const size_t inner = outer + 1;
    bool joined = true;
    for (const std::vector<int64_t>& of : strides) {
      joined = joined && (sizes[outer] == 1 || of[outer] == of[inner] * sizes[inner]);
    }
    const bool alone = sizes[inner] == 1;
    if (!joined && !alone) {
      ++outer;
      continue;
    }
    const auto drop = static_cast<std::ptrdiff_t>(alone ? inner : outer);
    sizes[alone ? outer : inner] *= sizes[static_cast<size_t>(drop)];
    sizes.erase(sizes.begin() + drop);
    for (std::vector<int64_t>& of : strides) of.erase(of.begin() + drop);
  }
}

void require_places(const char* name, const std::vector<int64_t>& sizes,
                    const std::vector<int64_t>& strides, int64_t offset, int64_t values) {
  if (sizes.size() != strides.size()) fail("`" + std::string(name) + "` lacks strides.");
  require_range(name, offset, 0, values - 1);
  int64_t last = offset;
  for (size_t d = 0; d < sizes.size(); ++d) {
    require_range("size", sizes[d], 1, std::numeric_limits<int32_t>::max());
    require_range("stride", strides[d], 0, std::numeric_limits<int32_t>::max());
    last += (sizes[d] - 1) * strides[d];
    if (last >= values) {
      fail("`" + std::string(name) + "` has no number at place " + std::to_string(last) + ".");
    }
  }
}

}  // namespace biper
