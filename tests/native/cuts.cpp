#include "cuts.h"

#include <algorithm>

#include "cut.h"

namespace biper {
namespace {

// Rows of the strips that make up one of `threads` equal shares of all strips.
int64_t rows_of_share(int64_t rows, int64_t strips, int64_t share, int64_t threads) {
  return rows * (strips * (share + 1) / threads) / strips -
         rows * (strips * share / threads) / strips;
}

// Whether threads that each have a share get as many strips and, but for one, as many rows; and
// whether only too few rows or pieces, or enough channels to share instead, leave one without.
bool is_fair(const Cut& cut, int64_t pieces, int64_t threads, int64_t strips) {
  const int64_t most = std::min(pieces, std::max<int64_t>(1, cut.rows / cut.fewest_rows));
  if (strips < 1 || strips > most) return false;
  if (strips < threads) {
    const bool uneven = cut.rows % threads != 0 && cut.rows < 16 * threads;
    return most < threads ? strips == most : uneven && strips == 1 && cut.blocks >= 2 * threads;
  }
  if (strips % threads != 0) return false;
  int64_t least = cut.rows, greatest = 0;
  for (int64_t share = 0; share < threads; ++share) {
    const int64_t rows = rows_of_share(cut.rows, strips, share, threads);
    least = std::min(least, rows);
    greatest = std::max(greatest, rows);
  }
  return greatest - least <= 1;
}

}  // namespace

Cuts cuts() {
  Cuts found;
  for (int64_t rows = 1; rows <= 120; ++rows) {
    for (const int64_t fewest_rows : {2, 4}) {
      for (const int64_t blocks : {1, 2, 4, 8, 32}) {
        for (int64_t threads = 1; threads <= 9; ++threads) {
          for (const int64_t pieces : {int64_t{1}, threads, 4 * threads}) {
            const Cut cut{rows, fewest_rows, blocks};
            ++found.tried;
            found.unfair += !is_fair(cut, pieces, threads, cut.strips(pieces, threads));
          }
        }
      }
    }
  }
  return found;
}

}  // namespace biper
