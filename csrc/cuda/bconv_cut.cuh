// The division of a convolution into blocks, and its launches: one file for each kind of product.

#pragma once

#include "bconv_mma.cuh"

namespace biper {

struct TileSize {
  int rows, columns, threads;
};

// Ordered from those that share most to those that leave no processor idle.
constexpr TileSize kTiles[] = {{128, 64, 128}, {64, 64, 128}, {32, 32, 64}};
constexpr int kTileCount = 3;
constexpr int kRaggedTile = 2;  // the only one for kRagged

struct Cut {
  BconvMmaParams params;
  dim3 grid;
  int tile;  // index into kTiles
  Leaving leaving;
  size_t shared_bytes;
};

const char* launch_bits(const Cut& cut, cudaStream_t stream);
const char* launch_bytes(const Cut& cut, cudaStream_t stream);

template <bool BYTES, Leaving LEAVING>
const char* launch_tile(const Cut& cut, cudaStream_t stream) {
  const auto start = [&](void (*kernel)(BconvMmaParams)) {
    return launch(kernel, cut.grid, static_cast<unsigned>(kTiles[cut.tile].threads),
                  cut.shared_bytes, stream, cut.params);
  };
  if (cut.tile == 0) return start(bconv_mma<2, 8, 4, BYTES, LEAVING>);
  if (cut.tile == 1) return start(bconv_mma<1, 8, 4, BYTES, LEAVING>);
  return start(bconv_mma<1, 4, 2, BYTES, LEAVING>);
}

template <bool BYTES>
const char* launch_mma(const Cut& cut, cudaStream_t stream) {
  switch (cut.leaving) {
    case kFloat32Stream:
      return launch_tile<BYTES, kFloat32Stream>(cut, stream);
    case kFloat16Stream:
      return launch_tile<BYTES, kFloat16Stream>(cut, stream);
    case kBfloat16Stream:
      return launch_tile<BYTES, kBfloat16Stream>(cut, stream);
    case kLimits:
      return launch_tile<BYTES, kLimits>(cut, stream);
    default:
      return launch(bconv_mma<1, 4, 2, BYTES, kRagged>, cut.grid,
                    static_cast<unsigned>(kTiles[kRaggedTile].threads), cut.shared_bytes, stream,
                    cut.params);
  }
}

}  // namespace biper
